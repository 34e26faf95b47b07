"""Marginal costs of a step, taken from an estimator."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_step import SyntheticEstimator

from wispprof.policies.cost_model import mean_costs, price_batches
from wispprof.types import BatchCost, StepTimeEstimator


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 9000))
def test_slopes_recover_a_linear_estimator(items, new, cached):
    estimator = SyntheticEstimator(fixed=3.0, row=0.25, kv=2e-4, pair=1e-5)
    costs = mean_costs(estimator, items, new, cached)
    assert costs.kv_ms == pytest.approx(2e-4, rel=0.02)
    assert costs.pair_ms == pytest.approx(1e-5, rel=0.02)
    # The pairs inside a chunk are not in the linear form; they are what the row's slope is off by.
    assert costs.row_ms == pytest.approx(0.25, rel=0.02)
    assert math.isclose(costs.fixed_ms + costs.item_ms, 3.0, rel_tol=0.2)


def test_batches_are_priced_alike_by_totals_and_one_by_one():
    estimator = SyntheticEstimator(kv=1e-3)

    class ByTotals(SyntheticEstimator):
        def predict_totals(self, totals):
            p50 = np.array(
                [self.time(int(n), int(c), 0) for n, c in zip(totals.sum_new, totals.sum_cached, strict=True)]
            )
            return p50, p50 * self.ratio

    new = np.array([[1, 2, 0], [0, 0, 0], [3, 1, 5]])
    cached = np.array([10, 500, 900])
    one_by_one = price_batches(estimator, new, cached)
    at_once = price_batches(ByTotals(kv=1e-3), new, cached)
    assert np.allclose(one_by_one, at_once)


@dataclass(frozen=True, slots=True)
class PaddedBatch(BatchCost):
    """A step whose attention is padded to the longest context."""

    items: int = 0
    rows: int = 0
    longest: int = 0

    @property
    def p50_ms(self) -> float:
        if not self.items:
            return 0.0
        return 8.0 + 0.25 * self.rows + 0.002 * self.items * self.longest + 0.01 * self.longest

    @property
    def bound_ms(self) -> float:
        return self.p50_ms

    def add(self, new: int, cached: int, prefill: bool = False) -> PaddedBatch:
        return PaddedBatch(self.items + 1, self.rows + new, max(self.longest, cached))


class PaddedEstimator(StepTimeEstimator):
    coverage = 0.95

    def start(self) -> BatchCost:
        return PaddedBatch()


@pytest.mark.parametrize("items", [1, 4, 16, 48])
@pytest.mark.parametrize("cached", [100, 300, 2000])
def test_a_session_is_charged_for_its_own_share_of_padded_attention(items, cached):
    """Sessions of equal contexts: one of them less saves its rows and its padding, no more."""
    costs = mean_costs(PaddedEstimator(), items, 3, cached)
    each_ms = costs.item_ms + cached * costs.kv_ms + 3 * (costs.row_ms + cached * costs.pair_ms)
    assert each_ms == pytest.approx(3 * 0.25 + 0.002 * cached)
    assert costs.fixed_ms == pytest.approx(8.0 + 0.01 * cached)
