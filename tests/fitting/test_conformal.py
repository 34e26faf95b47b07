"""Factors that make a bound of a median: what a regime's few shapes tell, and whose errors count."""

from __future__ import annotations

import numpy as np
import pytest

from wispprof.fitting.conformal import RatioBound, independent_scores


def test_scores_count_by_how_much_of_them_is_independent() -> None:
    rng = np.random.default_rng(0)
    own, shared = rng.standard_normal((40, 25)), rng.standard_normal((40, 1))
    assert independent_scores(list(own)) > 600  # scatter alone: nearly every sample
    assert independent_scores(list(shared + 0.01 * own)) == pytest.approx(40, rel=0.01)
    half = independent_scores(list(shared + own))
    assert 60 < half < 110
    assert independent_scores([v[:1] for v in own]) == 40
    assert independent_scores([own[0]]) == 1


def test_a_regime_known_from_few_shapes_borrows_the_tail_of_all() -> None:
    """Regimes of 30 shapes, each wider than the last: each has its own factor, and none for 99 % is the
    largest of its samples."""
    rng = np.random.default_rng(1)
    predicted, prefill = np.repeat([1.0, 9.0, 1.0, 9.0], 30), np.repeat([0, 0, 1, 1], 30) > 0
    wide = (0.03, 0.04, 0.05, 0.06)
    samples = [
        ms * (1 + w * rng.standard_normal(100)) for ms, w in zip(predicted, np.repeat(wide, 30), strict=True)
    ]
    bound = RatioBound.calibrate(predicted, samples, prefill)
    for level, deviations in ((0.95, 1.645), (0.99, 2.326)):
        found = [f - 1 for f in bound.at(level)]
        assert found == pytest.approx([w * deviations for w in wide], rel=0.1)


def test_predictions_that_are_too_high_do_not_stretch_the_bound_of_others() -> None:
    rng = np.random.default_rng(1)
    predicted, prefill = np.repeat([1.0, 9.0], 60), np.zeros(120, dtype=bool)
    samples = [
        ms * (1 + 0.05 * rng.standard_normal(9)) * (0.8 if ms == 1.0 and shape % 30 else 1.0)
        for shape, ms in enumerate(predicted)
    ]
    assert max(RatioBound.calibrate(predicted, samples, prefill).at(0.99)) < 1.3
    exact = [np.full(9, ms) for ms in predicted]
    assert max(RatioBound.calibrate(predicted, exact, prefill).at(0.99)) == 1.0
