"""Upper bounds with a stated coverage: split-conformal quantiles of actual ÷ predicted, scaled by regime.

Four regimes: decode steps small and large (by predicted time), and the same with prompt chunks in them.
What lies beyond the prediction is measured in units of how far the regime's samples reach beyond theirs, and
the quantiles of these scores are those of all regimes together: a few dozen shapes tell where nine of ten
samples lie, not where 99 of 100 do. The regimes' factors are joined so that the bound never falls when work
is added; see :meth:`FittedEstimator.bound_of` and :class:`Accumulator` in :mod:`wispprof.fitting.estimator`.

Why it covers: where predictions have not seen their own shape, calibration shapes and a new one are
exchangeable, and the quantile of their scores at n + 1 places covers the new one as often as it says (Vovk et
al., "Algorithmic learning in a random world", ch. 4, split form; scores on a scale: Papadopoulos et al.,
"Inductive confidence machines for regression", 2002). The scales treat all shapes alike; that the new one has
no part in them moves a regime's by one shape in :data:`MINIMUM_REGIME` or more. What is promised is the share
of all steps; that of one regime is near it as far as scores are distributed alike once scaled.

Samples of one shape share its error, so its samples have one vote together, and how many independent scores
there are is told by how much of their variance lies between shapes (:func:`independent_scores`): as many as
shapes where predictions err and steps repeat, as many as samples where steps scatter and predictions are
right.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from wispprof.fitting.batch_totals import FloatArray

__all__ = ["LEVELS", "REGIMES", "RatioBound", "independent_scores", "weighted_quantiles"]

LEVELS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.96, 0.97, 0.98, 0.985, 0.99, 0.995, 1.0)
REGIMES = ("decode-small", "decode-large", "prefill-small", "prefill-large")
MINIMUM_REGIME = 24
"""Shapes a regime must have to get its own scale; below that it shares that of a wider one."""
REACH = 0.9
"""Share of a regime's samples within one unit of its scale."""
STEADIEST = 0.5
"""Least share of the scale of all that a regime's may be: one whose predictions lie too high reaches hardly
beyond them, and in units of that every other reach would be endless."""


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


def _quantiles(groups: Sequence[FloatArray], levels: Sequence[float]) -> list[float]:
    """Quantiles of the values of all groups, each group having one vote."""
    votes = [np.full(len(group), 1.0 / len(group)) for group in groups]
    return weighted_quantiles(np.concatenate(groups), np.concatenate(votes), levels)


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
        kind = (predicted_ms >= split).astype(int) + 2 * prefill.astype(int)
        beyond = [times / ms - 1.0 for times, ms in zip(samples, predicted_ms, strict=True)]
        least = max(1e-6, STEADIEST * _quantiles(beyond, [REACH])[0])
        scale = []
        for regime in range(4):
            members = np.flatnonzero(kind == regime)
            if len(members) < MINIMUM_REGIME:
                members = np.flatnonzero(prefill == (regime >= 2))
            if len(members) < MINIMUM_REGIME:
                members = np.arange(len(kind))
            reach = _quantiles([beyond[i] for i in members], [REACH])[0]
            scale.append(max(least, reach))
        scores = [own / scale[regime] for own, regime in zip(beyond, kind, strict=True)]
        # The finite-sample correction of split conformal prediction: n + 1 places, not n.
        count = independent_scores(scores)
        found = _quantiles(scores, [min(1.0, level * (1 + 1 / count)) for level in LEVELS])
        # A median prediction is itself a promise, so the bound never lies below it.
        factors = [tuple(float(1.0 + unit * max(0.0, q)) for q in found) for unit in scale]
        return cls(split, tuple(factors), tuple(int((kind == r).sum()) for r in range(4)))

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
