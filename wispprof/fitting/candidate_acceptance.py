"""P(the target's token is this candidate) for the draft's first candidates at a position, for draft trees.

The first candidate is the token of a chain, so its probability is the rejection predictor's. Each further one
is the target's token with a probability of its own if none before it was: a logistic line over its rank, its
share of the probability that is left, and the features of the position. So the probabilities of a position
sum to at most 1, and do not depend on how many candidates are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from wispprof.artifacts.document import LearnedState
from wispprof.artifacts.rows import TracePath
from wispprof.fitting.batch_totals import FloatArray
from wispprof.fitting.rejection_scorers import MINIMUM_REJECTIONS

_LEAST = 1e-6
_INPUTS = 7


@dataclass(frozen=True)
class CandidateRows:
    """Positions that a chain of drafts reached, in the order of
    :func:`~wispprof.fitting.rejection_scorers.token_rows`.

    ``features`` (n, 4), ``depth`` (n,), ``probs`` (n, W); ``rank`` (n,): of the target's token, W if it is no
    candidate.
    """

    features: FloatArray
    depth: np.ndarray
    probs: FloatArray
    rank: np.ndarray


def candidate_rows(paths: Sequence[TracePath]) -> CandidateRows | None:
    """The candidates of every position whose predecessors in the proposal were all accepted; ``None`` if the
    trace does not record them everywhere, or with different widths."""
    features, depths, probs, ranks = [], [], [], []
    for path in paths:
        rows = path.scored_rows()
        if path.target_ranks is None or path.candidate_probs is None:
            return None
        place, depth = np.nonzero(np.arange(path.depth) <= np.asarray(path.accepted[:rows])[:, None])
        features.append(np.asarray(path.features[:rows], dtype=np.float64)[place, depth])
        depths.append(depth)
        probs.append(np.asarray(path.candidate_probs, dtype=np.float64)[place + depth])
        ranks.append(np.asarray(path.target_ranks)[place + depth])
    if len({part.shape[1] for part in probs}) != 1:
        return None
    return CandidateRows(*(np.concatenate(parts) for parts in (features, depths, probs, ranks)))


class CandidateModel(LearnedState):
    """Logistic line of the candidates after the first. ``weights_``: of the inputs, then the intercept."""

    weights_: list[float]

    def finish(self) -> None:
        if len(self.weights_) != _INPUTS + 1 or not np.isfinite(self.weights_).all():
            raise ValueError(f"{len(self.weights_)} weights are not {_INPUTS + 1} finite ones")

    def fit(self, rows: CandidateRows) -> Self:
        """Learn from rows with at least two outcomes after the first candidate."""
        from sklearn.linear_model import LogisticRegression

        inputs = _inputs(rows.features, rows.probs, rows.depth)
        number = np.arange(1, rows.probs.shape[1])
        # A candidate is judged if none before it was the target's token, and no filter excludes it.
        judged = (number <= rows.rank[:, None]) & (rows.probs[:, 1:] > 0)
        table, right = inputs[judged], (number == rows.rank[:, None])[judged]
        mean, spread = table.mean(axis=0), np.maximum(table.std(axis=0), 1e-9)
        line = LogisticRegression(max_iter=1000).fit((table - mean) / spread, right)
        slopes = line.coef_[0] / spread
        self.weights_ = [*slopes.tolist(), float(line.intercept_[0] - slopes @ mean)]
        return self

    def shares(self, features: FloatArray, probs: FloatArray, depth: Any) -> FloatArray:
        """P(the target's token | it is not the first candidate) of the others: features (…, 4), probabilities
        (…, w), depth (…) to (…, w - 1)."""
        weights = np.asarray(self.weights_)
        score = _inputs(features, probs, depth) @ weights[:-1] + weights[-1]
        hit = np.where(probs[..., 1:] > 0, 1 / (1 + np.exp(-np.clip(score, -30.0, 30.0))), 0.0)
        missed = np.cumprod(1 - hit, axis=-1)
        hit[..., 1:] *= missed[..., :-1]
        return hit


def fit_candidates(learn: Sequence[TracePath], tune: Sequence[TracePath]) -> CandidateModel | None:
    """A model of the candidates after the first; ``None`` if the trace records none, or the target's token
    is too seldom one of them."""
    rows = candidate_rows([*learn, *tune])
    if rows is None:
        return None
    right, wrong = (rows.rank > 0) & (rows.rank < rows.probs.shape[1]), rows.rank > 1
    if min(right.sum(), wrong.sum()) < MINIMUM_REJECTIONS:
        return None
    return CandidateModel().fit(rows)


def _inputs(features: FloatArray, probs: FloatArray, depth: Any) -> FloatArray:
    """Of the candidates after the first: (…, w - 1, inputs)."""
    left = np.clip(1 - np.cumsum(probs, axis=-1)[..., :-1], _LEAST, 1)
    share = np.clip(probs[..., 1:] / left, _LEAST, 1)
    own = np.stack(
        (np.broadcast_to(np.log(np.arange(1, probs.shape[-1])), left.shape), np.log(share), np.log(left)), -1
    )
    place = np.concatenate((features[..., :3], np.asarray(depth)[..., None]), -1)
    shape = (*left.shape, place.shape[-1])
    return np.concatenate((own, np.broadcast_to(place[..., None, :], shape)), -1)
