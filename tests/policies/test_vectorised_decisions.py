"""Fast paths of a decision against their slow and obvious references."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from synthetic_step import SyntheticEstimator

from wispprof.fitting.batch_totals import EMPTY
from wispprof.fitting.conformal import LEVELS, RatioBound
from wispprof.fitting.estimator import Domain, FittedEstimator
from wispprof.fitting.step_time_models import WispLinear
from wispprof.policies import Limits, SessionView, make_batch_policy
from wispprof.policies.baselines import SpecEdgePolicy
from wispprof.policies.batch_builder import BatchBuilder
from wispprof.policies.cost_model import MarginalCostCache, MarginalCosts, expected_tokens
from wispprof.policies.draft_selection import BatchArrays, DraftRanking, SessionColumns
from wispprof.types import BatchTotals, Slo, StepTimeEstimator


def fitted() -> FittedEstimator:
    step_model = WispLinear()
    step_model.coef_ = (0.12, 1e-7, 0.06e-3, 18.0)
    ratio = RatioBound(40.0, tuple((f,) * len(LEVELS) for f in (1.1, 1.15, 1.2, 1.3)), (99,) * 4)
    return FittedEstimator(step_model, ratio, Domain(EMPTY, BatchTotals(48, 300, 1 << 17, 1, 1, 4000, 9, 9)))


def queue(rng: random.Random, items: int) -> list[SessionView]:
    prompts, late = rng.choice((0.0, 0.02, 0.3)), rng.uniform(20.0, 900.0)
    views = []
    for number in range(items):
        prompt = rng.randint(1, 900) if rng.random() < prompts else 0
        acceptance_probs = () if prompt else tuple(rng.random() for _ in range(rng.randint(0, 8)))
        views.append(
            SessionView(
                f"s{number}",
                Slo(4.0),
                rng.randint(1, 4000),
                -rng.uniform(0.0, 200.0),
                rng.uniform(-10.0, late),
                prompt,
                acceptance_probs,
                rng.random() < 0.9,
            )
        )
    return views


def one_by_one(sessions: list[SessionView], estimator: StepTimeEstimator, limits: Limits) -> list:
    """WISP's scheduler as it is written: each candidate in turn, priced by adding it."""
    ready = [s for s in sessions if s.ready]
    if not ready:
        return []
    drafts = sum(len(s.acceptance_probs) for s in ready) // len(ready)
    cached = sum(s.cached for s in ready) // len(ready)
    costs = MarginalCostCache().get(estimator, min(len(ready), limits.max_items), 1 + drafts, cached)

    def alone(s: SessionView) -> float:
        new = 1 if s.prompt_left else 1 + len(s.acceptance_probs)
        return estimator.start().add(new, s.cached, s.prompt_left > 0).bound_ms

    def value(s: SessionView) -> float:
        row_ms = costs.row_ms + costs.pair_ms * s.cached
        lone_ms = costs.item_ms + costs.kv_ms * s.cached + row_ms
        if s.prompt_left:
            new = min(s.prompt_left, limits.prefill_chunk)
            return new / s.prompt_left / (lone_ms + (new - 1) * row_ms + 1e-9)
        return expected_tokens(s.acceptance_probs) / (lone_ms + len(s.acceptance_probs) * row_ms + 1e-9)

    urgent = [s for s in ready if s.deadline_ms <= costs.all_bound_ms]
    others = [s for s in ready if s.deadline_ms > costs.all_bound_ms]
    order = sorted(urgent, key=lambda s: s.deadline_ms) + sorted(others, key=lambda s: -value(s))
    build, budget_ms = BatchBuilder(estimator, limits), math.inf
    for session in order:
        late = session in urgent and alone(session) > session.deadline_ms
        allowed = min(budget_ms, math.inf if late else session.deadline_ms)
        if session.prompt_left:
            joined = build.add_prefill(session, allowed) > 0
        else:
            joined = build.add_decode(session, len(session.acceptance_probs), allowed)
        budget_ms = allowed if joined else budget_ms
    return build.items


@pytest.mark.parametrize("estimator", [fitted(), SyntheticEstimator(flat_rows=16, pair=1e-6)])
def test_wisp_plans_what_one_candidate_after_another_would(estimator):
    rng = random.Random(7)
    planned = 0
    for _ in range(120):
        sessions = queue(rng, rng.choice((1, 5, 30, 200)))
        limits = Limits(rng.choice((4, 16, 64)), 4096, rng.choice((16, 256)), 1 << 20)
        plan = make_batch_policy("wisp").plan(0.0, sessions, estimator, limits)
        expected = one_by_one(sessions, estimator, limits)
        if expected:
            assert list(plan.items) == expected
            planned += len(expected)
    assert planned > 1000


@pytest.mark.parametrize("prompt", [0, 200])
def test_prices_in_turn_are_those_of_adding_one_after_another(prompt):
    rng = np.random.default_rng(3)
    new, cached = rng.integers(1, 9, 60), rng.integers(0, 6000, 60)
    batch = fitted().start().add(3, 500)
    batch = batch.add(prompt, 100, True) if prompt else batch
    p50, bound = batch.add_in_turn(new, cached)
    for place, (fed, held) in enumerate(zip(new.tolist(), cached.tolist(), strict=True)):
        batch = batch.add(fed, held)
        assert p50[place] == pytest.approx(batch.p50_ms, rel=1e-12)
        assert bound[place] == pytest.approx(batch.bound_ms, rel=1e-12)


def test_the_ranking_of_some_is_the_ranking_of_all_without_the_others():
    rng = random.Random(5)
    sessions = [s for s in queue(rng, 80) if not s.prompt_left]
    count = len(sessions)
    weight = np.array([rng.uniform(0.2, 4.0) for _ in range(count)])
    costs = MarginalCosts(18.0, 0.01, 0.12, 1e-7, 6e-5, 20.0, 40.0)
    arrays = BatchArrays.of(SessionColumns.of(sessions), costs, weight)
    everyone = DraftRanking.of(arrays, np.ones(count, dtype=bool))
    for most in (None, 7):
        some = np.array([rng.random() < 0.5 for _ in range(count)])
        for ours, theirs in zip(
            everyone.restrict(arrays, some, most), DraftRanking.of(arrays, some, most), strict=True
        ):
            assert np.array_equal(ours, theirs)


def test_expected_tokens_of_many_tails_are_those_of_each():
    sessions = queue(random.Random(11), 60)
    expected = [expected_tokens(s.acceptance_probs) for s in sessions]
    assert SessionColumns.of(sessions).expected_tokens() == pytest.approx(expected)
    assert SessionColumns.of(
        [s._replace(acceptance_probs=()) for s in sessions]
    ).expected_tokens() == pytest.approx(1.0)


def test_a_newcomer_joins_the_smallest_group_while_others_go_on():
    policy = SpecEdgePolicy(groups=2)
    limits, estimator = Limits(8, 64, 16, 1 << 20), SyntheticEstimator()
    sessions = [SessionView(f"s{i}", Slo(4.0), 10, float(i), math.inf) for i in range(3)]
    first = policy.plan(0.0, sessions, estimator, limits)
    assert [m.session for m in first.items] == ["s0", "s2"]
    late = SessionView("late", Slo(4.0), 10, 9.0, math.inf)
    second = policy.plan(1.0, [*sessions, late], estimator, limits)
    assert [m.session for m in second.items] == ["s1", "late"]
