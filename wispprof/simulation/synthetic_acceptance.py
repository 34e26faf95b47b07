"""Simulated outputs drawn from a model of acceptance, for setups of which only averages are known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from wispprof.policies.controllers import ConfidenceAcceptance
from wispprof.policies.tree_shapes import LATER_RANKS, rank_rates
from wispprof.simulation.simulated_output import SimulatedOutput
from wispprof.types import DraftFeatures, DraftToken, RejectionPredictor

_LEVELS = 64
_RIGHT, _WRONG = 1, 0


class SyntheticAcceptance:
    """Outputs drawn from a model with four parameters.

    Each output position has its own acceptance probability ``q``, drawn from a Beta distribution of mean
    ``acceptance`` and concentration ``concentration`` (small: ``q`` is near 0 or 1). With probability
    ``persistence`` a position inherits the ``q`` of the one before it. The predictor observes
    ``logit(q)`` with Gaussian noise of standard deviation ``noise`` and returns the calibrated
    probability given that. At noise 0 it knows ``q`` (not the outcome); at large noise it knows only the
    mean.

    For draft trees, a wrong first candidate is replaced by one of later rank at the rates of
    :data:`~wispprof.policies.tree_shapes.LATER_RANKS`.
    """

    def __init__(
        self,
        acceptance: float = 0.75,
        *,
        concentration: float = 2.0,
        persistence: float = 0.0,
        noise: float = 1.0,
    ) -> None:
        if not 0 < acceptance < 1 or concentration <= 0 or not 0 <= persistence <= 1 or noise < 0:
            raise ValueError(
                "Synthetic acceptance needs 0 < acceptance < 1, concentration > 0, "
                f"0 <= persistence <= 1 and noise >= 0, got {acceptance}, {concentration}, "
                f"{persistence}, {noise}"
            )
        self.acceptance = acceptance
        self.concentration = concentration
        self.persistence = persistence
        self.noise = noise
        # Synthetic features are calibrated: their confidence is the probability.
        self.predictor: RejectionPredictor = ConfidenceAcceptance(0.0, 1.0)
        self._edges, self._levels = _calibration(acceptance, concentration, noise)
        self._right = [DraftToken(_RIGHT, features) for features in self._levels]
        self._wrong = [DraftToken(_WRONG, features) for features in self._levels]
        self._candidates = [rank_rates(features.confidence) for features in self._levels]
        self._later = np.cumsum(LATER_RANKS)

    def output(self, seed: Sequence[int], prompt_tokens: int, output_tokens: int) -> SimulatedOutput:
        rng = np.random.default_rng([s & 0xFFFFFFFF for s in seed])
        right, level = self._draw(rng, output_tokens)
        levels = level.tolist()
        wrong = [self._wrong[i] for i in levels]
        proposals = [
            self._right[i] if ok else missed
            for i, ok, missed in zip(levels, right.tolist(), wrong, strict=True)
        ]
        # Draws for trees come last: chains see the same outputs without them.
        later = 1 + np.searchsorted(self._later, rng.random(output_tokens))
        ranks = np.where(right, 0, later).tolist()
        # After a wrong draft, confidence goes on like on the path.
        return SimulatedOutput(
            prompt_tokens,
            [_RIGHT] * output_tokens,
            proposals,
            OffPath(wrong),
            ranks,
            [self._candidates[i] for i in levels],
        )

    def _draw(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        a = self.acceptance * self.concentration
        q = rng.beta(a, self.concentration - a, count)
        if self.persistence > 0:
            fresh = rng.random(count) >= self.persistence
            fresh[0] = True
            q = q[np.maximum.accumulate(np.where(fresh, np.arange(count), 0))]
        right = rng.random(count) < q
        seen = _logit(q) + self.noise * rng.standard_normal(count)
        return right, np.searchsorted(self._edges, seen)


class OffPath(Sequence[Sequence[DraftToken]]):
    """By position: the wrong tokens of the positions after it (at least one), sliced on access."""

    __slots__ = ("_wrong",)

    def __init__(self, wrong: list[DraftToken]) -> None:
        self._wrong = wrong

    def __len__(self) -> int:
        return len(self._wrong)

    def __getitem__(self, place: int) -> Sequence[DraftToken]:  # type: ignore[override]
        wrong = self._wrong
        return wrong[min(place + 1, len(wrong) - 1) :]


def _logit(q: np.ndarray) -> np.ndarray:
    q = np.clip(q, 1e-6, 1 - 1e-6)
    value: np.ndarray = np.log(q) - np.log1p(-q)
    return value


@lru_cache(maxsize=64)
def _calibration(
    acceptance: float, concentration: float, noise: float
) -> tuple[np.ndarray, tuple[DraftFeatures, ...]]:
    """Calibration of the noisy ``logit(q)``: quantile edges, and features of the mean ``q`` in each bin."""
    rng = np.random.default_rng(20260120)
    a = acceptance * concentration
    q = rng.beta(a, concentration - a, 200_000)
    seen = _logit(q) + noise * rng.standard_normal(q.size)
    edges = np.quantile(seen, np.linspace(0, 1, _LEVELS + 1)[1:-1])
    bins = np.searchsorted(edges, seen)
    mean = np.bincount(bins, q, _LEVELS) / np.maximum(1, np.bincount(bins, minlength=_LEVELS))
    mean = np.maximum.accumulate(mean)
    return edges, tuple(_features(float(p)) for p in mean)


def _features(confidence: float) -> DraftFeatures:
    """Features of a two-way choice with this confidence: plausible, and monotone in it."""
    p = min(max(confidence, 1e-6), 1 - 1e-6)
    entropy = -(p * math.log(p) + (1 - p) * math.log1p(-p))
    margin = math.log(p) - math.log1p(-p)
    return DraftFeatures(p, entropy, margin, 1.0 + abs(margin))
