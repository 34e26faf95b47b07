"""Which of the draft's candidates the target takes: ranks by position, and calibrated probabilities of them.

Candidates are ranked by *logits / T + the position's noise* (docs/decisions/draft-trees.md). A node of a tree
is accepted if its parent is and its rank is that of the target's token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from wispprof.artifacts.rows import AcceptanceTrace

_BINS = 12
_PRIOR = 2.0
"""Observations that the mean over all positions counts for in each bin."""

Candidates = Sequence[Sequence[float]]


def trace_rates(trace: AcceptanceTrace) -> tuple[float, ...]:
    """Shares of the ranks 0, 1, … in a trace; empty if it has none."""
    found = [path.target_ranks for path in trace.paths if path.target_ranks is not None]
    if not found or any(path.candidate_probs is None for path in trace.paths):
        return ()
    ranks = np.concatenate(found)
    width = max(path.candidate_probs.shape[1] for path in trace.paths if path.candidate_probs is not None)
    return tuple((np.bincount(ranks, minlength=width + 1)[:width] / max(1, len(ranks))).tolist())


def calibrated_candidates(trace: AcceptanceTrace) -> list[Candidates] | None:
    """By path: P(the target takes each candidate), (m, W), from the draft's probability of it and its rank.

    ``None`` if the trace lacks ranks. Frequencies in bins of the probability, by rank.
    """
    if any(path.target_ranks is None or path.candidate_probs is None for path in trace.paths):
        return None
    ranks = np.concatenate([path.target_ranks for path in trace.paths if path.target_ranks is not None])
    probs = np.concatenate([path.candidate_probs for path in trace.paths if path.candidate_probs is not None])
    calibrated: NDArray[np.float64] = np.empty(probs.shape, dtype=np.float64)
    for rank in range(probs.shape[1]):
        column, hit = probs[:, rank], (ranks == rank).astype(np.float64)
        edges = np.unique(np.quantile(column, np.linspace(0, 1, _BINS + 1)[1:-1]))
        place = np.searchsorted(edges, column)
        seen = np.bincount(place, minlength=len(edges) + 1)
        hits = np.bincount(place, hit, len(edges) + 1)
        calibrated[:, rank] = ((hits + _PRIOR * hit.mean()) / (seen + _PRIOR))[place]
    calibrated /= np.maximum(1.0, calibrated.sum(1, keepdims=True))
    ends = np.cumsum([len(path.path) for path in trace.paths])[:-1]
    return [part.tolist() for part in np.split(calibrated, ends)]
