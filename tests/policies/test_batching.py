"""Feasibility of every batching policy: limits, no double planning, no starvation, deadlines."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_step import SyntheticEstimator

from wispprof.errors import PlanError, PluginError
from wispprof.policies import (
    BATCH_POLICIES,
    Limits,
    SessionView,
    make_batch_policy,
    make_controller,
)
from wispprof.types import Slo

SLO = Slo(4.0)


def view(name: str, **options) -> SessionView:
    fields = {"slo": SLO, "cached": 500, "arrived_ms": 0.0, "deadline_ms": 1000.0} | options
    return SessionView(session=name, **fields)


@st.composite
def views(draw) -> list[SessionView]:
    count = draw(st.integers(0, 24))
    sessions = []
    for number in range(count):
        prompt = draw(st.sampled_from([0, 0, 0, 1, 7, 900]))
        acceptance_prob = st.floats(0, 1)
        acceptance_probs = () if prompt else tuple(draw(st.lists(acceptance_prob, max_size=8)))
        due = draw(st.sampled_from([None, 0.0, 5.0, 40.0, 5000.0]))
        sessions.append(
            view(
                f"s{number}",
                cached=draw(st.integers(0, 8000)),
                arrived_ms=draw(st.floats(-500, 0)),
                deadline_ms=draw(st.sampled_from([-50.0, 5.0, 30.0, 60.0, 250.0, math.inf])),
                prompt_left=prompt,
                acceptance_probs=acceptance_probs,
                ready=draw(st.booleans()),
                stream=draw(st.booleans()),
                due_ms=due,
                due_acceptance_probs=tuple(draw(st.lists(acceptance_prob, max_size=4)))
                if due is not None
                else (),
                slo_unreachable=draw(st.booleans()),
            )
        )
    return sessions


limits_of = st.builds(
    Limits,
    max_items=st.integers(1, 16),
    max_tokens=st.integers(1, 200),
    prefill_chunk=st.integers(1, 256),
    kv_free=st.integers(0, 400),
)
estimators = st.builds(
    SyntheticEstimator,
    fixed=st.floats(0.1, 50),
    row=st.floats(0, 1),
    kv=st.floats(0, 1e-3),
    pair=st.floats(0, 1e-5),
    flat_rows=st.sampled_from([0, 16]),
    bucket=st.sampled_from([1, 8]),
)


@pytest.mark.parametrize("name", BATCH_POLICIES)
@settings(max_examples=25, deadline=None)
@given(sessions=views(), limits=limits_of, estimator=estimators)
def test_a_plan_keeps_every_limit_and_starves_nobody(name, sessions, limits, estimator):
    plan = make_batch_policy(name).plan(0.0, sessions, estimator, limits)
    known = {s.session: s for s in sessions}
    names = [m.session for m in plan.items]
    assert len(names) == len(set(names)) <= limits.max_items
    batch = estimator.start()
    tokens = prefill = 0
    for member in plan.items:
        session = known[member.session]
        assert session.ready
        if session.prompt_left:
            assert member.drafts == 0
            assert 0 < member.prefill <= session.prompt_left
            new = member.prefill
            prefill += new
        else:
            assert member.prefill == 0
            assert 0 <= member.drafts <= len(session.acceptance_probs)
            new = 1 + member.drafts
        tokens += new
        batch = batch.add(new, session.cached, bool(session.prompt_left))
    assert tokens <= min(limits.max_tokens, limits.kv_free)
    assert prefill <= limits.prefill_chunk
    assert plan.p50_ms == pytest.approx(batch.p50_ms)
    assert plan.bound_ms == pytest.approx(batch.bound_ms)
    if any(s.ready for s in sessions) and not plan.items:
        assert plan.wake_ms is not None
        assert plan.wake_ms > 0


@settings(max_examples=50, deadline=None)
@given(sessions=views(), limits=limits_of, estimator=estimators)
def test_wisp_never_breaks_a_deadline_it_could_keep(sessions, limits, estimator):
    plan = make_batch_policy("wisp").plan(0.0, sessions, estimator, limits)
    known = {s.session: s for s in sessions}
    if len(plan.items) < 2:
        return
    for member in plan.items:
        session = known[member.session]
        new = 1 if session.prompt_left else 1 + len(session.acceptance_probs)
        alone = estimator.start().add(new, session.cached).bound_ms
        assert plan.bound_ms <= session.deadline_ms or alone > session.deadline_ms


def test_wisp_refuses_what_would_make_the_earliest_deadline_late():
    sessions = [
        view("a", deadline_ms=90.0, acceptance_probs=(0.9,) * 60),
        view("b", deadline_ms=20.1),
    ]
    plan = make_batch_policy("wisp").plan(
        0.0, sessions, SyntheticEstimator(fixed=18, ratio=1.1), Limits(8, 100, 64, 1000)
    )
    assert [m.session for m in plan.items] == ["b"]


def test_wisp_does_not_let_a_late_item_hold_up_the_others():
    sessions = [view("late", deadline_ms=-5.0), view("b", deadline_ms=90.0)]
    plan = make_batch_policy("wisp").plan(0.0, sessions, SyntheticEstimator(), Limits(8, 100, 64, 1000))
    assert [m.session for m in plan.items] == ["late", "b"]


def test_sled_waits_for_its_batch_but_not_for_ever():
    policy = make_batch_policy("sled", batch=3, timeout_ms=50.0)
    waiting = [view("a"), view("b", arrived_ms=20.0)]
    limits = Limits(8, 100, 64, 1000)
    early = policy.plan(30.0, waiting, SyntheticEstimator(), limits)
    assert early.items == ()
    assert early.wake_ms == 50.0
    assert len(policy.plan(50.0, waiting, SyntheticEstimator(), limits).items) == 2
    assert len(policy.plan(30.0, [*waiting, view("c")], SyntheticEstimator(), limits).items) == 3


def test_pipeline_groups_take_turns():
    policy = make_batch_policy("specedge")
    sessions = [view(n) for n in "abcd"]
    limits = Limits(8, 100, 64, 1000)
    turns = [
        {m.session for m in policy.plan(t, sessions, SyntheticEstimator(), limits).items}
        for t in (0.0, 1.0, 2.0)
    ]
    assert turns[0] | turns[1] == set("abcd")
    assert not turns[0] & turns[1]
    assert turns[2] == turns[0]


def test_unknown_names_and_options_name_the_choices():
    with pytest.raises(PluginError, match="server-only"):
        make_batch_policy("best")
    with pytest.raises(PlanError, match="max_batch"):
        make_batch_policy("fcfs", batch=3)
    with pytest.raises(PlanError, match="lag_weight"):
        make_batch_policy("wispprof", trim=True)
    with pytest.raises(PluginError, match="sled"):
        make_controller("best")
    with pytest.raises(PlanError, match="threshold"):
        make_controller("sled", floor=0.1)
