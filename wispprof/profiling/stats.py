"""Confidence in a median, without assuming how noise is distributed."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence

__all__ = ["half_width", "median_interval"]

_EXACT = 1000
"""Beyond, the binomial is taken for normal: 2.0**n overflows, and a rank more or less shows nowhere."""
FEWEST = 6
"""Samples below which no order statistics bracket the median with 95 % confidence."""


@functools.cache
def _rank(n: int, confidence: float) -> int:
    """The largest r with P(the r-th smallest and r-th largest of n bracket the median) >= confidence;
    0 where there is none. The count of samples below the median is binomial(n, 1/2)."""
    if n > _EXACT:
        z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
        return math.floor((n - z * math.sqrt(n)) / 2)
    tail, rank = 0.0, 0
    while True:
        tail += math.comb(n, rank) / 2.0**n
        if 2 * tail > 1 - confidence:
            return rank
        rank += 1


def median_interval(samples: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Order-statistic confidence interval of the median; infinite with fewer than six samples."""
    rank = _rank(len(samples), confidence) if samples else 0
    if rank == 0:
        return -math.inf, math.inf
    ordered = sorted(samples)
    return ordered[rank - 1], ordered[-rank]


def half_width(samples: Sequence[float], confidence: float = 0.95) -> float:
    """Half the interval's width relative to the median; infinite while it is unknown."""
    low, high = median_interval(samples, confidence)
    middle = statistics.median(samples) if samples else 0.0
    return (high - low) / 2 / middle if middle > 0 else math.inf
