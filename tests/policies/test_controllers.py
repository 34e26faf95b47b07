"""Controllers with a fixed rule, predictors without a fit, and the load level."""

from __future__ import annotations

import numpy as np
import pytest
from depth_acceptance import DepthAcceptance
from hypothesis import given
from hypothesis import strategies as st
from synthetic_step import SyntheticEstimator

from wispprof.policies import LOAD_LEVELS, RoundContext, load_level, make_controller, slowdown
from wispprof.policies.controllers import ConfidenceAcceptance
from wispprof.policies.cost_model import representative_slowdown
from wispprof.types import DraftFeatures

CONTEXT = RoundContext(draft_ms=10.0, rtt_ms=30.0, server_ms=40.0)


def features(confidence: float) -> DraftFeatures:
    return DraftFeatures(confidence, 1.0, 1.0, 1.0)


def drafted(controller, confidences) -> int:
    """How many tokens a controller drafts when the draft shows these confidences."""
    most = controller.begin(CONTEXT)
    for depth, confidence in enumerate(confidences):
        if depth >= most:
            return depth
        if not controller.go_on(depth, features(confidence)):
            return depth + 1
    return len(confidences)


@pytest.mark.parametrize("k", [0, 1, 5])
def test_fixed_drafts_exactly_k(k):
    assert drafted(make_controller("fixed", k=k), [0.01] * 9) == k


def test_thresholds_stop_after_the_flagged_token():
    assert drafted(make_controller("sled", threshold=0.4, k_max=6), [0.9, 0.5, 0.3, 0.9]) == 3
    assert drafted(make_controller("sled", threshold=0.4, k_max=6), [0.9] * 9) == 6
    by_depth = DepthAcceptance((0.9, 0.8, 0.3, 0.2))
    assert drafted(make_controller("wisp", by_depth, threshold=0.5), [0.1] * 9) == 3


def test_the_acceptance_probability_is_that_of_the_last_token():
    controller = make_controller("fixed", k=4)
    controller.begin(CONTEXT)
    controller.go_on(0, features(0.7))
    assert controller.acceptance_prob() == pytest.approx(0.7)
    controller.go_on(1, features(1.0))
    assert controller.acceptance_prob() < 1


@pytest.mark.parametrize("predictor", [ConfidenceAcceptance(), DepthAcceptance((0.9, 0.6, 0.5))])
def test_one_row_and_many_rows_agree(predictor):
    rows = np.random.default_rng(0).random((5, 4))
    depth = np.arange(5)
    single = [predictor.acceptance_prob(DraftFeatures(*r), int(d)) for r, d in zip(rows, depth, strict=True)]
    assert predictor.acceptance_prob_batch(rows, depth) == pytest.approx(single)


@given(st.floats(1, 50), st.floats(1, 50), st.integers(0, LOAD_LEVELS - 1))
def test_load_level_rises_with_stretch_and_does_not_flap(low, high, previous):
    low, high = sorted((low, high))
    assert load_level(low) <= load_level(high)
    assert load_level(low, previous) <= load_level(high, previous)
    settled = load_level(low, previous)
    assert load_level(low, settled) == settled


def test_every_level_has_a_stretch_of_its_own():
    assert [load_level(representative_slowdown(n)) for n in range(LOAD_LEVELS)] == list(range(LOAD_LEVELS))


def test_stretch_is_one_alone_and_grows_with_sessions():
    estimator = SyntheticEstimator()
    values = [slowdown(estimator, [500] * n) for n in (0, 1, 8, 200)]
    assert values[:2] == [1.0, 1.0]
    assert 1 < values[2] < values[3]
