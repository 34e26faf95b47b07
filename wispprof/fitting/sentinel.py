"""What the sentinel says about a busy machine: how slow it was when each row was measured.

The sentinel is one shape repeated through the sweep. Where its times move far more than its samples
scatter, the machine moved, and every row near it was measured on a machine as much slower or faster.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from wispprof.artifacts.records import StepRow
from wispprof.fitting.features import FloatArray

__all__ = ["drift_factors"]

MINIMUM_SENTINELS = 4


def drift_factors(rows: Sequence[StepRow]) -> FloatArray:
    """How slow the machine was at each row, (n,), against its typical speed; ones where unknown.

    The logarithm of the sentinel's median is interpolated over the order of measurement; a row measured
    in several visits has the mean of theirs. It is shrunk
    by the share of its variance that its samples' scatter does not explain, so that on a quiet machine
    the sentinel's own noise is not written into every row.
    """
    seen = sorted((r for r in rows if r.kind == "sentinel"), key=lambda r: r.order)
    shapes = {r.shape.key() for r in seen}
    if len(seen) < MINIMUM_SENTINELS or len(shapes) != 1:
        return np.ones(len(rows))
    order = np.array([r.order for r in seen], dtype=np.float64)
    level = np.log([r.median_ms for r in seen])
    scatter = [
        np.var(np.log(r.samples_ms), ddof=1) / len(r.samples_ms)
        for r in seen
        if len(r.samples_ms) > 1
    ]
    # A median is about half as precise again as a mean (π / 2 in variance).
    noise = 1.57 * float(np.mean(scatter)) if scatter else 0.0
    spread = float(np.var(level, ddof=1))
    share = max(0.0, 1.0 - noise / spread) if spread > 0 else 0.0
    level -= np.median(level)
    moved = np.empty(len(rows))
    for number, row in enumerate(rows):
        places, samples = zip(*(row.visits or ((row.order, 1),)), strict=True)
        moved[number] = np.average(np.interp(places, order, level), weights=samples)
    factors: FloatArray = np.exp(share * moved)
    return factors
