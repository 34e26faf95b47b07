"""The online fit gives the same predictions one by one and over arrays."""

from __future__ import annotations

import numpy as np
import pytest

from wispprof.policies.cost_model import price_batches
from wispprof.server.step_time_tracker import OnlineFit
from wispprof.types import BatchShape


def test_arrays_agree_with_single_additions() -> None:
    fit = OnlineFit()
    for n, c in ((1, 16), (8, 16), (4, 300), (16, 700), (2, 100), (64, 0)):
        fit.observe(BatchShape.uniform(2, n, c), 12.0 + 0.3 * n + 4e-5 * c + 2e-6 * n * c)
    fit.fit()
    estimator = fit.estimator
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
