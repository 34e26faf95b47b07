"""What all drafters that run a language model share: the token sequence, and features of raw logits."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from wispprof.backends import Drafter
from wispprof.errors import EngineError
from wispprof.sampling.sampler import sample_tokens_numpy
from wispprof.types import DraftFeatures, DraftToken, Sampling


class ModelDrafter(Drafter):
    """Holds one sequence, whose first ``_cached`` tokens have KV. Not thread-safe.

    Tokens drawn elsewhere (a prompt, a correction) are only appended; the next draft computes their KV.
    Tokens are drawn with the target's position noise (:mod:`~wispprof.sampling.sampler`).
    """

    _cached: int

    def __init__(self, max_context: int) -> None:
        self.max_context = max_context
        self._tokens: list[int] = []
        self._sampling = Sampling()

    @property
    def length(self) -> int:
        return len(self._tokens)

    @property
    def tokens(self) -> list[int]:
        """A copy of the tokens held."""
        return list(self._tokens)

    def open(self, tokens: Sequence[int], sampling: Sampling) -> None:
        """Start from at least one committed token. KV of a prefix shared with the old sequence stays."""
        new = [int(t) for t in tokens]
        if not new:
            raise EngineError("A draft sequence begins with at least one token.")
        self._check(len(new))
        pairs = zip(self._tokens[: self._cached], new, strict=False)
        differs = (i for i, (old, other) in enumerate(pairs) if old != other)
        self._cached = next(differs, min(self._cached, len(self._tokens), len(new)))
        self._tokens, self._sampling = new, sampling

    def extend(self, tokens: Sequence[int]) -> None:
        self._check(len(self._tokens) + len(tokens))
        self._tokens.extend(int(t) for t in tokens)

    def rollback(self, length: int) -> None:
        if not 1 <= length <= len(self._tokens):
            raise EngineError(f"Cannot roll back {len(self._tokens)} draft tokens to {length}.")
        del self._tokens[length:]
        self._cached = min(self._cached, length)

    def _propose(self, logits: np.ndarray, hidden: np.ndarray | None = None) -> DraftToken:
        """Draw the next token from raw logits (V,) float32, which are not kept intact, and append it.

        ``hidden``: bool (V,) of tokens that must not be drawn.
        """
        drawn = logits if hidden is None else np.where(hidden, np.float32(-np.inf), logits)
        token = sample_tokens_numpy(drawn, len(self._tokens), self._sampling)
        self._check_drawn(token)
        features = features_numpy(logits)
        self._tokens.append(token)
        return DraftToken(token, features)

    def _check_drawn(self, token: int) -> None:
        """Raise :class:`EngineError` if the logits were not finite; forget the KV that made them so."""
        if token < 0:
            self._cached = 0
            raise EngineError(
                "The draft model's logits are not finite.",
                "Check its weights, or run it with another --dtype.",
            )

    def _check(self, length: int) -> None:
        if length > self.max_context:
            raise EngineError(
                f"{length} draft tokens exceed the draft model's context of {self.max_context}.",
                "Stop drafting for this session, or give the draft model a longer context.",
            )


@lru_cache(maxsize=4)
def _ones(size: int) -> np.ndarray:
    return np.ones(size, dtype=np.float32)


class _Scratch(threading.local):
    """Memory for weights, kept by each thread: fresh memory of this size costs a page fault for each page."""

    def __init__(self) -> None:
        self._weights = np.empty(0, dtype=np.float32)

    def weights(self, size: int) -> np.ndarray:
        if len(self._weights) != size:
            self._weights = np.empty(size, dtype=np.float32)
        return self._weights


_scratch = _Scratch()


def features_numpy(logits: np.ndarray) -> DraftFeatures:
    """Features of one row of raw logits (V,) float32; does not keep ``logits`` intact.

    Vocabularies have 260,000 tokens, so sums are products with ones (a third of the time), and nothing is
    passed over twice.
    """
    size = len(logits)
    ones = _ones(size)
    best = int(logits.argmax())
    logits -= logits[best]
    mean = float(logits @ ones) / size
    spread = max(0.0, float(logits @ logits) / size - mean * mean) ** 0.5
    weights = np.exp(logits, out=_scratch.weights(size))
    total = float(weights @ ones)
    # H = log Z - E[l - top]
    entropy = float(np.log(total)) - float(weights @ logits) / total
    logits[best] = -np.inf
    second = float(logits.max()) if size > 1 else -np.inf
    return DraftFeatures(1.0 / total, max(0.0, entropy), -second, spread)


def features_torch(logits: Tensor) -> Tensor:
    """The same for rows (n, V) on any device: (n, 4) float32 there, in the order of the fields."""
    rows = logits.float()
    log_p = rows.log_softmax(-1)
    p = log_p.exp()
    two = rows.topk(2, dim=-1).values
    entropy = -(p * log_p).sum(-1).clamp(max=0.0)
    return torch.stack((p.amax(-1), entropy, two[:, 0] - two[:, 1], rows.std(-1, correction=0)), -1)
