"""A draft's first candidates at a position, in the order in which the position's noise would choose them.

The target chooses the largest *logits / T + noise*. A draft that ranks its candidates the same way names the
target's token among its first few far more often than one that ranks them by probability.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from wispprof.sampling.position_noise import gumbel, position_keys
from wispprof.sampling.sampler import MIN_TEMPERATURE, filtered_probs
from wispprof.types import Sampling


def noise_ranked(
    logits: Tensor, positions: Sequence[int] | np.ndarray, sampling: Sampling, width: int
) -> tuple[Tensor, Tensor]:
    """Candidates (n, width) int64 and their probabilities (n, width) float32, from raw logits (n, V).

    ``positions[i]``: position of the token that row ``i`` proposes. The first candidate is what
    :func:`~wispprof.sampling.sampler.sample_tokens` draws. Probability 0: a filter excludes the token. When
    greedy, candidates are ranked by their logits, with the probabilities of temperature 1.
    """
    width = min(width, logits.shape[1])
    if sampling.temperature < MIN_TEMPERATURE:
        probs = logits.float().softmax(-1)
        ids = logits.topk(width).indices
        return ids, probs.gather(1, ids)
    probs = filtered_probs(logits, sampling)
    words = position_keys([sampling.seed] * len(logits), positions).view(np.int32)
    keys = torch.from_numpy(words).to(logits.device)
    noise = gumbel(keys, torch.arange(logits.shape[1], device=logits.device))
    ids = (probs.log() + noise).topk(width).indices
    return ids, probs.gather(1, ids)


def ranks_of(tokens: Sequence[int], candidates: np.ndarray) -> np.ndarray:
    """Rank of each token (m,) among the candidates of its position (m, W), W if it is not one; int32."""
    hit = candidates == np.asarray(tokens)[:, None]
    return np.asarray(np.where(hit.any(1), hit.argmax(1), candidates.shape[1]), dtype=np.int32)
