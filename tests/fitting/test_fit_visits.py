"""Rows of several visits: each visit was measured on a machine as slow as the sentinel says it was then."""

from __future__ import annotations

import numpy as np
import pytest

from wispprof.artifacts import StepRow
from wispprof.core import BatchShape
from wispprof.fitting.sentinel import drift_factors

SHAPE = BatchShape.uniform(4, 5, 256)


def test_a_row_takes_the_mean_of_its_visits_not_the_pace_of_the_first():
    looks = [
        StepRow("s", "sentinel", SHAPE, tuple(ms * f for f in (0.999, 1.0, 1.001)), order=order)
        for order, ms in ((0, 1.0), (10, 1.0), (20, 1.0), (30, 2.0), (40, 2.0), (50, 1.0))
    ]
    quiet = StepRow("q", "verify", SHAPE, (1.0,) * 4, order=5)
    split = StepRow("v", "verify", SHAPE, (1.0,) * 4, order=5, visits=((5, 2), (35, 2)))
    late = StepRow("l", "verify", SHAPE, (2.0,) * 4, order=35)
    *_, at_rest, between, slow = drift_factors([*looks, quiet, split, late])
    assert slow / at_rest == pytest.approx(2.0, rel=0.01)
    assert between == pytest.approx(np.sqrt(at_rest * slow))
