"""How precisely a median is known, by order statistics, which assume nothing about the noise."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence

from wispprof.artifacts.rows import EdgeRow, StepRow

ROUGH = 0.25
"""Half width of an interval, relative to the median, above which a time decides nothing."""
_MAX_EXACT_SAMPLES = 1000
"""Above, the normal approximation of the binomial is used: 2.0**n overflows, and the rank differs by one at
most."""


@functools.cache
def interval_rank(n: int, confidence: float) -> int:
    """Largest r so that the r-th smallest and r-th largest of n samples bracket the median; 0 without one.

    The number of samples below the median is binomial(n, 1/2).
    """
    if n > _MAX_EXACT_SAMPLES:
        z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
        return math.floor((n - z * math.sqrt(n)) / 2)
    below, rank = 0.0, 0
    while True:
        below += math.comb(n, rank) / 2.0**n
        if 2 * below > 1 - confidence:
            return rank
        rank += 1


def median_interval(samples: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Order-statistic confidence interval of the median; infinite with fewer than six samples."""
    rank = interval_rank(len(samples), confidence) if samples else 0
    if rank == 0:
        return -math.inf, math.inf
    ordered = sorted(samples)
    return ordered[rank - 1], ordered[-rank]


def half_width(samples: Sequence[float], confidence: float = 0.95) -> float:
    """Half the width of the interval, relative to the median; infinite if the interval is."""
    low, high = median_interval(samples, confidence)
    median = statistics.median(samples) if samples else 0.0
    return (high - low) / 2 / median if median > 0 else math.inf


def known_to(rows: Sequence[EdgeRow | StepRow]) -> float:
    """Median half width of measured rows: half of them are known less precisely. Rows with too few samples
    to tell are left out; 0 without others."""
    widths = [half_width(row.samples_ms) for row in rows if row.source == "measured"]
    finite = [width for width in widths if width < math.inf]
    return statistics.median(finite) if finite else 0.0


def noisy_count(rows: Sequence[EdgeRow | StepRow]) -> str:
    """``20 of 23 rows are noisy``, references aside."""
    measured = [row for row in rows if row.kind != "sentinel"]
    return f"{sum('noisy' in row.flags for row in measured)} of {len(measured)} rows are noisy"
