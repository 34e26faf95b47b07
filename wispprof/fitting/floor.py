"""How good an estimator could be on a profile: what its own measurements say of each other.

Two oracles stand beside the estimators. One knows what another measurement of each very shape found, of as
many visits as the row has: its error is repeat noise and nothing else. The other knows the quantile of each
shape's own single steps: no bound of one number per shape that holds as often for each of them can lie lower.
One that holds as often over all of them can, where a few shapes stalled.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from wispprof.fitting.features import FloatArray
from wispprof.fitting.rows import Observations
from wispprof.fitting.selection import relative_errors

__all__ = ["bound_floor", "measured_again", "paced_floor"]

HALVINGS = 20


def measured_again(data: Observations, seed: int = 0) -> dict[str, float] | None:
    """Percentage errors of one measurement as a prediction of another; None without rows of several visits.

    A shape's visits are halved at random, again and again. Two halves differ more than two whole rows
    would, by a factor that their numbers of visits give.
    """
    rng = np.random.default_rng(seed)
    again: list[float] = []
    actual: list[float] = []
    for visits in data.visits:
        count = len(visits)
        if count < 2:
            continue
        first = count // 2
        shrink = np.sqrt(2 * first * (count - first)) / count
        for _ in range(HALVINGS):
            order = rng.permutation(count)
            one, other = visits[order[:first]], visits[order[first:]]
            away = float(np.log(np.median(one) / np.median(other))) * shrink
            again.append(float(np.exp(away)))
            actual.append(1.0)
    return relative_errors(np.array(again), np.array(actual)) if again else None


def bound_floor(data: Observations, levels: Sequence[float]) -> dict[float, float]:
    """Mean of each shape's own quantile of single steps ÷ its median, by level."""
    return {level: _mean_quantile(data.samples, data, level) for level in levels}


def paced_floor(data: Observations, levels: Sequence[float]) -> dict[float, float]:
    """The same, did one know at every step how slow the machine is at that moment."""
    return {level: _mean_quantile(data.paced, data, level) for level in levels}


def _mean_quantile(samples: Sequence[FloatArray], data: Observations, level: float) -> float:
    each = [
        float(np.quantile(own, level, method="inverted_cdf")) / median
        for own, median in zip(samples, data.median_ms.tolist(), strict=True)
    ]
    return float(np.mean(each))
