"""The self-calibrating estimator answers alike one by one and over arrays."""

from __future__ import annotations

import numpy as np
import pytest

from wispprof.policies.cost_model import price_batches
from wispprof.server.step_time_tracker import OnlineEstimator
from wispprof.types import BatchShape


def test_arrays_agree_with_single_additions() -> None:
    estimator = OnlineEstimator()
    estimator.weights, estimator.bound_ratio = (12.0, 0.3, 2e-6, 4e-5), 1.2
    new, cached = np.array([1, 5, 64]), np.array([700, 30, 0])
    batch = estimator.start().add(3, 400)
    alone = [batch.add(int(n), int(c)) for n, c in zip(new, cached, strict=True)]
    p50, bound = batch.add_many(new, cached)
    assert np.allclose(p50, [one.p50_ms for one in alone])
    assert np.allclose(bound, [one.bound_ms for one in alone])
    p50, bound = price_batches(estimator, np.stack((new, 0 * new)), cached)
    whole = estimator.predict(BatchShape.of(zip(new, cached, strict=True)))
    assert (p50[0], bound[0]) == pytest.approx(whole)
    assert (p50[1], bound[1]) == (0.0, 0.0)
