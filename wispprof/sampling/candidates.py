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
from wispprof.sampling.sampler import (
    CANDIDATES,
    MIN_TEMPERATURE,
    divisor,
    has_filter,
    likeliest_kept,
    mask_stop_tokens,
)
from wispprof.types import Sampling


def noise_ranked(
    logits: Tensor, positions: Sequence[int] | np.ndarray, sampling: Sampling, width: int
) -> tuple[Tensor, Tensor]:
    """Candidates (n, width) int64 and their probabilities (n, width) float32, from raw logits (n, V).

    ``positions[i]``: position of the token that row ``i`` proposes. The first candidate is what
    :func:`~wispprof.sampling.sampler.sample_tokens` draws. Probability 0: a filter excludes the token. When
    greedy, candidates are ranked by their logits, with the probabilities of temperature 1. Probabilities
    are not finite where the logits are not.
    """
    width = min(width, logits.shape[1])
    if sampling.min_length:
        logits = mask_stop_tokens(logits, positions, [sampling] * len(logits))
    if sampling.temperature < MIN_TEMPERATURE:
        values, ids = logits.float().topk(width)
        return ids, (values - torch.logsumexp(logits.float(), 1, keepdim=True)).exp_()
    scaled = logits.float() / divisor(sampling)
    words = position_keys([sampling.seed] * len(logits), positions).view(np.int32)
    keys = torch.from_numpy(words).to(logits.device)
    if has_filter(sampling):
        return _among_kept(scaled, keys, sampling, width)
    everything = torch.arange(logits.shape[1], device=logits.device)
    ids = gumbel(keys, everything).add_(scaled).topk(width).indices
    return ids, (scaled.gather(1, ids) - torch.logsumexp(scaled, 1, keepdim=True)).exp_()


def _among_kept(scaled: Tensor, keys: Tensor, sampling: Sampling, width: int) -> tuple[Tensor, Tensor]:
    """:func:`noise_ranked` of rows ``scaled`` (n, V) whose filters exclude tokens."""
    count = max(CANDIDATES, width)
    while True:
        values, ids, keep = likeliest_kept(scaled, [sampling] * len(scaled), count)
        count = ids.shape[1]
        if count == scaled.shape[1] or not bool(keep[:, -1].any()):
            break
        count *= 8
    kept = values.masked_fill(~keep, -torch.inf)
    best = (kept + gumbel(keys, ids)).topk(width).indices
    return ids.gather(1, best), kept.softmax(1).gather(1, best)


def ranks_of(tokens: Sequence[int], candidates: np.ndarray) -> np.ndarray:
    """Rank of each token (m,) among the candidates of its position (m, W), W if it is not one; int32."""
    hit = candidates == np.asarray(tokens)[:, None]
    return np.asarray(np.where(hit.any(1), hit.argmax(1), candidates.shape[1]), dtype=np.int32)
