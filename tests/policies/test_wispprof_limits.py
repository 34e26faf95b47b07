"""The ``wispprof`` policy at its limits: drafts that cannot pay, more sessions than slots, long prompts."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_step import SyntheticEstimator

from wispprof.policies import Limits, SessionView, make_batch_policy
from wispprof.policies.cost_model import expected_tokens, mean_costs
from wispprof.policies.draft_selection import BatchArrays, DraftRanking, SessionColumns
from wispprof.types import BatchTotals, Slo

LIMITS = Limits(64, 4096, 256, 1 << 20)


def stream(name: str, **options) -> SessionView:
    fields = {
        "slo": Slo(4.0),
        "cached": 100,
        "arrived_ms": 0.0,
        "deadline_ms": 1e9,
        "stream": True,
    } | options
    return SessionView(session=name, **fields)


class ByTotals(SyntheticEstimator):
    """The same prices, asked for many at once."""

    __slots__ = ()

    def predict_totals(self, totals: BatchTotals[Any]) -> tuple[np.ndarray, np.ndarray]:
        columns = (totals.sum_new, totals.sum_cached, totals.attention_pairs)
        p50 = [self.time(*map(int, row)) for row in zip(*columns, strict=True)]
        return np.array(p50), np.array(p50) * self.ratio


tails_of = st.lists(st.lists(st.floats(0, 1), max_size=5).map(tuple), min_size=1, max_size=9)


@settings(max_examples=50, deadline=None)
@given(tails=tails_of, contexts=st.lists(st.integers(0, 4000), min_size=9, max_size=9))
def test_where_drafts_cannot_pay_the_plan_is_that_of_server_only(tails, contexts):
    """A row costs what a committed token does here: no draft that may be wrong is worth it."""
    estimator = SyntheticEstimator(fixed=0.0, row=1.0, kv=0.0)
    sessions = [
        stream(str(i), acceptance_probs=tuple(min(p, 0.99) for p in t), cached=contexts[i])
        for i, t in enumerate(tails)
    ]
    ours = make_batch_policy("wispprof", wait_for_drafts=False).plan(0.0, sessions, estimator, LIMITS)
    theirs = make_batch_policy("server-only").plan(0.0, sessions, estimator, LIMITS)
    assert set(ours.items) == set(theirs.items)
    assert ours.p50_ms == pytest.approx(theirs.p50_ms)


@settings(max_examples=60, deadline=None)
@given(
    tails=tails_of,
    fixed=st.floats(0.1, 20),
    row=st.floats(0.01, 2),
    bucket=st.sampled_from([1, 4, 16]),
)
def test_many_prices_at_once_and_one_by_one_agree(tails, fixed, row, bucket):
    """An estimator that prices all cutoffs at once gets at least the rate of one asked step by step."""
    numbers = {"fixed": fixed, "row": row, "bucket": bucket, "pair": 1e-5}
    sessions = [stream(str(i), acceptance_probs=t, cached=200 * i) for i, t in enumerate(tails)]
    by_name = {s.session: s for s in sessions}

    def rate(estimator) -> float:
        plan = make_batch_policy("wispprof", wait_for_drafts=False).plan(0.0, sessions, estimator, LIMITS)
        won = sum(expected_tokens(by_name[m.session].acceptance_probs[: m.drafts]) for m in plan.items)
        return won / plan.p50_ms

    at_once, one_by_one = rate(ByTotals(**numbers)), rate(SyntheticEstimator(**numbers))
    assert at_once == pytest.approx(one_by_one, rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(tails=tails_of, items=st.integers(1, 40), cached=st.integers(0, 5000))
def test_every_cutoff_takes_leading_drafts_of_its_sessions(tails, items, cached):
    estimator = SyntheticEstimator(row=0.3, kv=1e-4)
    costs = mean_costs(ByTotals(row=0.3, kv=1e-4), items, 3, cached)
    assert costs == pytest.approx(mean_costs(estimator, items, 3, cached))
    sessions = [stream(str(i), acceptance_probs=t, cached=cached + i) for i, t in enumerate(tails)]
    arrays = BatchArrays.of(SessionColumns.of(sessions), costs, np.linspace(0.5, 2.0, len(tails)))
    members = np.arange(len(tails)) % 3 != 1
    ranking = DraftRanking.of(arrays, members)
    for taken in range(len(ranking.order) + 1):
        keep = ranking.drafts(taken, len(tails))
        assert keep.sum() == taken
        assert not keep[~members].any()
        gains = [expected_tokens(t[:k]) for t, k in zip(tails, keep.tolist(), strict=True)]
        assert arrays.expected_tokens(keep) == pytest.approx(gains)
        worth = float((arrays.expected_tokens(keep) * arrays.weight) @ members)
        assert ranking.value[taken] == pytest.approx(worth)
    totals = ranking.totals(np.arange(len(ranking.order) + 1), arrays.cached, members)
    for taken, row in enumerate(zip(*totals, strict=True)):
        new = (ranking.drafts(taken, len(tails)) + 1)[members]
        held = arrays.cached[members]
        expected = [len(new), new.sum(), held.sum(), new @ held, (new * new).sum()]
        expected += [held.max(), new.max(), 0]
        assert row == pytest.approx(expected)
    density = np.diff(ranking.value) / np.diff(ranking.cost_ms)
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in itertools.pairwise(density))


def test_with_more_sessions_than_slots_the_most_urgent_go_and_unreachable_slos_last():
    sessions = [stream(f"calm{i}", deadline_ms=5000.0 + i) for i in range(40)]
    sessions += [stream(f"late{i}", deadline_ms=20.0 + i) for i in range(6)]
    sessions += [stream(f"unmet{i}", deadline_ms=-9e5, slo_unreachable=True) for i in range(40)]
    sessions += [stream("starved", deadline_ms=9e5, arrived_ms=-1e6)]
    plan = make_batch_policy("wispprof").plan(
        0.0, sessions, SyntheticEstimator(), Limits(8, 4096, 256, 1 << 20)
    )
    chosen = {m.session for m in plan.items}
    assert chosen == {"starved", "calm0", *(f"late{i}" for i in range(6))}


def chunk(policy: str, running: list[SessionView], prompt: SessionView, estimator) -> tuple:
    plan = make_batch_policy(policy).plan(0.0, [*running, prompt], estimator, LIMITS)
    fed = next(m.prefill for m in plan.items if m.session == prompt.session)
    return plan.p50_ms, fed


@pytest.mark.parametrize("speed", [1.0, 4.0, 16.0])
def test_a_prompt_that_has_time_does_not_use_up_a_slow_slo(speed):
    """Beside slow SLOs a chunk could be large; a prompt that is not due takes little all the same."""
    running = [stream(str(i), slo=Slo(speed)) for i in range(12)]
    prompt = stream("new", prompt_left=1500, cached=0, slo=Slo(speed), deadline_ms=math.inf)
    estimator = SyntheticEstimator(fixed=5.0, row=0.5, kv=0.0)
    alone = estimator.start().add(12, 100).p50_ms
    ours, fed = chunk("wispprof", running, prompt, estimator)
    theirs, whole = chunk("fcfs", running, prompt, estimator)
    assert fed < whole == 256
    assert ours <= theirs / 2
    assert ours <= 4.0 * estimator.ratio * alone


def test_a_prompt_that_is_due_takes_what_it_needs_of_slow_slos():
    running = [stream(str(i), slo=Slo(2.0)) for i in range(12)]
    estimator = SyntheticEstimator(fixed=5.0, row=0.5, kv=0.0)
    fed = {}
    for due_ms in (math.inf, 3000.0, 900.0):
        prompt = stream("new", prompt_left=1500, cached=0, slo=Slo(2.0), deadline_ms=due_ms)
        fed[due_ms] = chunk("wispprof", running, prompt, estimator)[1]
    assert fed[math.inf] == fed[3000.0] < fed[900.0]
