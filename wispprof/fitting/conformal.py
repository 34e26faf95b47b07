"""Upper bounds with a stated coverage: split-conformal quantiles of measured ÷ predicted, by regime.

Regimes are decode steps small and large (by predicted time), and the same with prompt chunks. Scores are
how far samples exceed their prediction, in units of their regime's scale. Quantiles are those of all
regimes together: a few dozen shapes determine a regime's 90 % quantile, but not its 99 % quantile.
:meth:`FittedEstimator.bound_of` joins the regimes so that the bound never falls if work is added.

Calibration shapes and a new shape are exchangeable, so the quantile at n + 1 places covers the new one as
often as stated (Vovk et al., "Algorithmic learning in a random world", ch. 4, split form; scaled scores:
Papadopoulos et al., "Inductive confidence machines for regression", 2002). The stated coverage is that of
all steps; a regime's own is near it if scaled scores are distributed alike.

Samples of one shape share its error, so a shape has one vote. :func:`independent_scores` estimates the
number of independent scores: between the number of shapes and the number of samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from wispprof.fitting.batch_totals import FloatArray

LEVELS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.96, 0.97, 0.98, 0.985, 0.99, 0.995, 1.0)
REGIMES = ("decode-small", "decode-large", "prefill-small", "prefill-large")
MINIMUM_REGIME = 24
"""Shapes that a regime needs for a scale of its own; with fewer it shares that of a wider regime."""
SCALE_QUANTILE = 0.9
"""Share of a regime's samples within one unit of its scale."""
MIN_SCALE_RATIO = 0.5
"""Least ratio of a regime's scale to that of all. If predictions of a regime lie too high, its samples hardly
exceed them, and its own scale would be near zero."""


def weighted_quantiles(values: FloatArray, weights: FloatArray, levels: Sequence[float]) -> list[float]:
    """Smallest values below which at least ``level`` of the weight lies."""
    order = np.argsort(values)
    share = np.cumsum(weights[order]) / weights.sum()
    place = np.searchsorted(share, np.asarray(levels) - 1e-12, side="left")
    return [float(v) for v in values[order][np.minimum(place, len(values) - 1)]]


def independent_scores(groups: Sequence[FloatArray]) -> float:
    """Effective number of independent scores, each group having one vote.

    With a share ρ of the variance between groups and m scores in a group it is
    groups ÷ (ρ + (1 - ρ) · mean of 1 / m) (design effect of clusters: Kish, "Survey sampling", 1965).
    """
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
    def calibrate(cls, predicted_ms: FloatArray, samples: Sequence[FloatArray], prefill: np.ndarray) -> Self:
        """Learn the factors from predictions made without their own shape.

        ``predicted_ms`` (n,), ``samples`` n arrays of measured times, ``prefill`` (n,) bool.
        """
        split = float(np.median(predicted_ms))
        kind = (predicted_ms >= split).astype(int) + 2 * prefill.astype(int)
        excess = [times / ms - 1.0 for times, ms in zip(samples, predicted_ms, strict=True)]
        least = max(1e-6, MIN_SCALE_RATIO * _quantiles(excess, [SCALE_QUANTILE])[0])
        scale = []
        for regime in range(4):
            members = np.flatnonzero(kind == regime)
            if len(members) < MINIMUM_REGIME:
                members = np.flatnonzero(prefill == (regime >= 2))
            if len(members) < MINIMUM_REGIME:
                members = np.arange(len(kind))
            own_scale = _quantiles([excess[i] for i in members], [SCALE_QUANTILE])[0]
            scale.append(max(least, own_scale))
        scores = [own / scale[regime] for own, regime in zip(excess, kind, strict=True)]
        # The finite-sample correction of split conformal prediction: n + 1 places, not n.
        count = independent_scores(scores)
        found = _quantiles(scores, [min(1.0, level * (1 + 1 / count)) for level in LEVELS])
        # The bound never lies below the median.
        factors = [tuple(float(1.0 + unit * max(0.0, q)) for q in found) for unit in scale]
        return cls(split, tuple(factors), tuple(int((kind == r).sum()) for r in range(4)))

    def at(self, coverage: float) -> tuple[float, ...]:
        """The four factors at a coverage, interpolated between levels."""
        if not 0.5 <= coverage < 1:
            raise ValueError(f"coverage must be in [0.5, 1), got {coverage}")
        return tuple(float(np.interp(coverage, LEVELS, row)) for row in self.factors)

    def payload(self) -> dict[str, Any]:
        return {
            "split_ms": self.split_ms,
            "levels": list(LEVELS),
            "factors": {name: list(row) for name, row in zip(REGIMES, self.factors, strict=True)},
            "shapes": list(self.shapes),
        }

    @classmethod
    def from_payload(cls, payload: dict[str, Any]) -> Self:
        levels, rows = payload["levels"], payload["factors"]
        factors = tuple(tuple(np.interp(LEVELS, levels, rows[r]).tolist()) for r in REGIMES)
        return cls(float(payload["split_ms"]), factors, tuple(payload["shapes"]))
