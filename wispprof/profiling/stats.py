"""Confidence in a median, without assuming how noise is distributed; and many decisions at once."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence

__all__ = [
    "discoveries",
    "half_width",
    "median_interval",
    "relative_spread",
    "samples_needed",
]

_EXACT = 1000
"""Beyond, the binomial is taken for normal: 2.0**n overflows, and a rank more or less shows nowhere."""
FEWEST = 6
"""Samples below which no order statistics bracket the median with 95 % confidence."""
_NORMAL = statistics.NormalDist()


@functools.cache
def _rank(n: int, confidence: float) -> int:
    """The largest r with P(the r-th smallest and r-th largest of n bracket the median) >= confidence;
    0 where there is none. The count of samples below the median is binomial(n, 1/2)."""
    if n > _EXACT:
        z = _NORMAL.inv_cdf((1 + confidence) / 2)
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


def relative_spread(samples: Sequence[float]) -> float:
    """Standard deviation over median as the range of the samples tells it; 0 of fewer than two.

    The range, because it is what :func:`half_width` of few samples rests on.
    """
    middle = statistics.median(samples) if len(samples) > 1 else 0.0
    if middle <= 0:
        return 0.0
    return (max(samples) - min(samples)) / middle / (2 * _score(1, len(samples)))


@functools.lru_cache(maxsize=4096)
def samples_needed(spread: float, target: float, least: int, most: int) -> int:
    """Samples of normal noise (``spread``: standard deviation over median) until :func:`half_width`
    is expected under ``target``; between ``least`` and ``most``."""
    for n in range(max(FEWEST, least), most):
        if spread * _score(_rank(n, 0.95), n) <= target:
            return n
    return most


@functools.cache
def _score(rank: int, n: int) -> float:
    """How far the rank-th largest of n normal samples is expected from the median (Blom)."""
    return _NORMAL.inv_cdf(1 - (rank - 0.375) / (n + 0.25))


def discoveries(p_values: Sequence[float], rate: float = 0.05) -> list[bool]:
    """Which hypotheses to reject so that at most ``rate`` of the rejected are expected to be true
    (Benjamini and Hochberg 1995)."""
    count = len(p_values)
    order = sorted(range(count), key=lambda i: p_values[i])
    last = max((r for r, i in enumerate(order, 1) if p_values[i] <= rate * r / count), default=0)
    chosen = set(order[:last])
    return [i in chosen for i in range(count)]
