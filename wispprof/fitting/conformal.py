"""Upper bounds with a stated coverage: split-conformal quantiles of actual ÷ predicted, by regime.

Four regimes: decode steps small and large (by predicted time), and the same with prompt chunks in
them. The regimes' factors are joined so that the bound never falls when work is added; see
:meth:`RatioBound.decode` and :meth:`RatioBound.mixed`.

Source: Vovk et al., "Algorithmic learning in a random world", ch. 4 (Mondrian, split form). Samples of
one shape share its error, so its samples have one vote together, and how many independent scores there
are is told by how much of their variance lies between shapes (:func:`independent_scores`): as many as
shapes where predictions err and steps repeat, as many as samples where steps scatter and predictions are
right.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from wispprof.fitting.features import FloatArray

__all__ = ["LEVELS", "REGIMES", "RatioBound", "independent_scores", "weighted_quantiles"]

LEVELS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.96, 0.97, 0.98, 0.985, 0.99, 0.995, 1.0)
REGIMES = ("decode-small", "decode-large", "prefill-small", "prefill-large")
MINIMUM_REGIME = 24
"""Shapes a regime must have to get its own factor; below that it shares the pooled one."""


def weighted_quantiles(
    values: FloatArray, weights: FloatArray, levels: Sequence[float]
) -> list[float]:
    """Smallest values below which at least ``level`` of the weight lies."""
    order = np.argsort(values)
    share = np.cumsum(weights[order]) / weights.sum()
    place = np.searchsorted(share, np.asarray(levels) - 1e-12, side="left")
    return [float(v) for v in values[order][np.minimum(place, len(values) - 1)]]


def independent_scores(groups: Sequence[FloatArray]) -> float:
    """How many independent scores these are worth, each group having one vote: with a share ρ of the variance
    between groups and m scores in a group, groups ÷ (ρ + (1 - ρ) · mean of 1 / m) (the design effect of
    clusters: Kish, "Survey sampling", 1965)."""
    several = [group for group in groups if len(group) > 1]
    if not several or len(groups) < 2:
        return float(len(groups))
    inverse = float(np.mean([1 / len(group) for group in groups]))
    within = float(np.mean([group.var(ddof=1) for group in several]))
    means = np.array([group.mean() for group in groups])
    between = max(0.0, float(means.var(ddof=1)) - within * inverse)
    share = between / (between + within) if between + within > 0 else 1.0
    return len(groups) / (share + (1 - share) * inverse)


@dataclass(frozen=True)
class RatioBound:
    """Quantiles of actual ÷ predicted, as rows of ``factors`` (4 regimes × :data:`LEVELS`).

    ``split_ms``: predicted time from which a step is large. ``shapes``: calibration shapes by regime.
    """

    split_ms: float
    factors: tuple[tuple[float, ...], ...]
    shapes: tuple[int, ...]

    @classmethod
    def calibrate(
        cls,
        predicted_ms: FloatArray,
        samples: Sequence[FloatArray],
        prefill: np.ndarray,
    ) -> Self:
        """Learn the factors from predictions that did not see their own shape.

        ``predicted_ms`` (n,), ``samples`` n arrays of measured times, ``prefill`` (n,) bool.
        """
        split = float(np.median(predicted_ms))
        large = predicted_ms >= split
        kind = large.astype(int) + 2 * prefill.astype(int)
        pooled = cls._quantiles(predicted_ms, samples, np.arange(len(predicted_ms)))
        factors, counts = [], []
        for regime in range(4):
            members = np.flatnonzero(kind == regime)
            if len(members) < MINIMUM_REGIME:
                members = np.flatnonzero(prefill == (regime >= 2))
            counts.append(int((kind == regime).sum()))
            enough = len(members) >= MINIMUM_REGIME
            factors.append(cls._quantiles(predicted_ms, samples, members) if enough else pooled)
        return cls(split, tuple(factors), tuple(counts))

    @staticmethod
    def _quantiles(
        predicted: FloatArray, samples: Sequence[FloatArray], members: np.ndarray
    ) -> tuple[float, ...]:
        ratios = np.concatenate([samples[i] / predicted[i] for i in members])
        votes = np.concatenate([np.full(len(samples[i]), 1.0 / len(samples[i])) for i in members])
        # The finite-sample correction of split conformal prediction: n + 1 places, not n.
        count = independent_scores([np.log(samples[i] / predicted[i]) for i in members])
        levels = [min(1.0, level * (1 + 1 / count)) for level in LEVELS]
        # A median prediction is itself a promise, so the bound never lies below it.
        return tuple(max(1.0, q) for q in weighted_quantiles(ratios, votes, levels))

    def at(self, coverage: float) -> tuple[float, ...]:
        """The four factors at a coverage, interpolated between levels."""
        if not 0.5 <= coverage < 1:
            raise ValueError(f"coverage must be in [0.5, 1), got {coverage}")
        return tuple(float(np.interp(coverage, LEVELS, row)) for row in self.factors)

    def level_of(self, regime: int, ratio: float) -> float:
        """Share of calibration ratios at or below this one; 1.0 beyond the largest."""
        row = self.factors[regime]
        place = bisect_left(row, ratio)
        return LEVELS[min(place, len(LEVELS) - 1)]

    def regime(self, p50_ms: float, prefill: bool) -> int:
        """Index into :data:`REGIMES`."""
        return int(p50_ms >= self.split_ms) + 2 * int(prefill)

    def payload(self) -> dict[str, Any]:
        return {
            "split_ms": self.split_ms,
            "levels": list(LEVELS),
            "factors": {name: list(row) for name, row in zip(REGIMES, self.factors, strict=True)},
            "shapes": list(self.shapes),
        }

    @classmethod
    def from_payload(cls, payload: dict[str, Any]) -> Self:
        levels = [float(v) for v in payload["levels"]]
        rows = []
        for name in REGIMES:
            row = [float(v) for v in payload["factors"][name]]
            rows.append(tuple(float(v) for v in np.interp(LEVELS, levels, row)))
        return cls(
            float(payload["split_ms"]), tuple(rows), tuple(int(v) for v in payload["shapes"])
        )
