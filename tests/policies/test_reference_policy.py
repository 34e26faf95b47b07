"""Whole decisions of the ``wispprof`` policy against a slow and obvious one."""

from __future__ import annotations

import dataclasses
import itertools
import random
import statistics
from functools import partial
from typing import Any, NamedTuple

import pytest
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from reference_policy import Decision, ReferencePolicy
from reference_step import value_of
from synthetic_step import SyntheticEstimator

from wispprof.artifacts.rows import StepRow
from wispprof.fitting import FittedEstimator
from wispprof.fitting.evaluation import assemble
from wispprof.fitting.observations import Observations
from wispprof.fitting.wispprof_model import ModelChoice, WispprofStepTime
from wispprof.policies import Limits, SessionView, StepPlan
from wispprof.policies.cost_model import BoolArray, FloatArray, IntArray
from wispprof.policies.draft_selection import BatchArrays, DraftRanking
from wispprof.policies.urgency import Urgency
from wispprof.policies.wispprof_policy import WispprofPolicy
from wispprof.policies.wispprof_settings import WispprofSettings
from wispprof.types import BatchShape, Slo, StepTimeEstimator, VerifyItem


def fitted() -> FittedEstimator:
    """A ``wispprof`` estimator, its residual included, of a server whose rows come in graph buckets."""
    truth = SyntheticEstimator(fixed=6.0, row=0.4, kv=4e-4, pair=2e-6, bucket=4)
    rng, rows = random.Random(1), []
    for number in range(60):
        items = [VerifyItem(rng.randint(1, 8), rng.randint(0, 5000)) for _ in range(rng.randint(1, 9))]
        if number % 4 == 0:
            items.append(VerifyItem(rng.choice((16, 64, 128)), rng.randint(0, 1000), True))
        shape = BatchShape(tuple(items))
        times = tuple(truth.predict(shape)[0] * rng.uniform(0.97, 1.05) for _ in range(5))
        kind = "mixed" if shape.prefill_tokens else "verify"
        rows.append(StepRow(shape.key(), kind, shape, times, order=number))
    data = Observations.of(rows)
    step_model = WispprofStepTime(choice=ModelChoice(alpha=0.85, rounds=15)).fit(data)
    return assemble(step_model, step_model.p50_many(data.totals), data)


ESTIMATORS: dict[str, StepTimeEstimator] = {
    "linear": SyntheticEstimator(),
    "deep": SyntheticEstimator(fixed=4.0, row=0.3, kv=4e-3, pair=2e-5),
    "stairs": SyntheticEstimator(fixed=3.0, row=0.8, kv=1e-4, bucket=8),
    "flat": SyntheticEstimator(fixed=2.0, row=0.5, kv=2e-3, flat_rows=16),
    "fitted": fitted(),
}


class World(NamedTuple):
    """Sessions before a server, and the times at which it asks who goes next."""

    sessions: list[SessionView]
    estimator: str
    limits: Limits
    asked_ms: tuple[float, ...]


probabilities = st.floats(0.0, 1.0)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """One to eight sessions with tails of up to six drafts; some late, some ahead, some with a draft due."""
    limits = Limits(
        draw(st.sampled_from((64, 64, 64, 3, 2))),
        draw(st.sampled_from((4096, 4096, 4096, 9))),
        draw(st.sampled_from((16, 256))),
        draw(st.sampled_from((1 << 20, 1 << 20, 1 << 20, 6))),
    )
    count = draw(st.integers(1, 8))
    crowded = count > min(limits.max_items, limits.max_tokens, limits.kv_free)
    sessions = []
    for number in range(count):
        prompt = draw(st.sampled_from((0, 0, 0, 0, 0, 40, 2000)))
        due = draw(st.booleans())
        # If there are fewer slots than sessions, no two may be equally urgent.
        oldest, last = not crowded or number == 0, not crowded or number == count - 1
        deadline_ms = draw(st.floats(-40.0, 100.0) | st.floats(100.0, 3000.0) | st.just(1e6))
        sessions.append(
            SessionView(
                f"s{number}",
                Slo(draw(st.sampled_from((1.0, 4.0, 15.0)))),
                cached=draw(st.sampled_from((0, 100, 900, 4000, 15000))),
                arrived_ms=draw(st.sampled_from((0.0, -90.0, -600.0))) if oldest else 0.0,
                deadline_ms=deadline_ms + 0.001 * number,
                prompt_left=prompt,
                acceptance_probs=() if prompt else tuple(draw(st.lists(probabilities, max_size=6))),
                ready=draw(st.integers(0, 9)) > 0,
                stream=True,
                due_ms=draw(st.floats(0.0, 4.0) | st.floats(0.0, 40.0)) if due and not prompt else None,
                due_acceptance_probs=(draw(probabilities),) if due and not prompt else (),
                committed=draw(st.sampled_from((0, 20, 400))),
                slo_unreachable=last and draw(st.integers(0, 4)) == 0,
                tokens_left=draw(st.sampled_from((1, 8, 60, 1 << 20))),
            )
        )
    later = draw(st.lists(st.floats(1.0, 60.0), max_size=2))
    asked_ms = tuple(itertools.accumulate((0.0, *later)))
    return World(sessions, draw(st.sampled_from(sorted(ESTIMATORS))), limits, asked_ms)


def agree(plan: StepPlan, plain: Decision) -> bool:
    """The same members with the same drafts and chunks, or the same time to ask again."""
    if not plan.items or not plain.scheduled:
        return not plan.items and not plain.scheduled and plan.wake_ms == plain.wake_ms
    return {m.session: m for m in plan.items} == plain.scheduled


def equals(plan: StepPlan, plain: Decision, world: World) -> bool:
    """Other drafts that are exactly as good: which of the two it is rounding decides."""
    decode = {s.session for s in world.sessions if not s.prompt_left}
    ours, theirs = (
        {m.session: m.drafts for m in members if m.session in decode}
        for members in (plan.items, plain.scheduled.values())
    )
    if not ours or not theirs or ours == theirs:
        return False
    estimator = ESTIMATORS[world.estimator]
    values = [
        value_of(world.sessions, keep, plain.weights, estimator, plain.extra_ms) for keep in (ours, theirs)
    ]
    return values[0] == pytest.approx(values[1], rel=1e-9)


def difference(world: World, policy: WispprofPolicy, plain: ReferencePolicy) -> str:
    """What the two answer to the first question to which they answer differently; empty where to none."""
    estimator = ESTIMATORS[world.estimator]
    for now_ms in world.asked_ms:
        plan = policy.plan(now_ms, world.sessions, estimator, world.limits)
        decision = plain.plan(now_ms, world.sessions, estimator, world.limits)
        if not agree(plan, decision):
            return "" if equals(plan, decision, world) else f"{now_ms} ms: {plan}, {decision}"
    return ""


SWITCHES = tuple(f.name for f in dataclasses.fields(WispprofSettings) if isinstance(f.default, bool))
switched = st.sampled_from(({}, {}, *({name: False} for name in SWITCHES)))


@settings(max_examples=400)
@given(world=worlds(), off=switched)
def test_the_policy_decides_as_its_docstrings_say(world: World, off: dict[str, bool]) -> None:
    chosen = WispprofSettings(**off)
    assert not difference(world, WispprofPolicy(chosen), ReferencePolicy(chosen))


class Longer(WispprofPolicy):
    """Takes a draft more than the best."""

    def _best_cutoff(
        self, arrays: BatchArrays, ranking: DraftRanking, *more: Any
    ) -> tuple[BoolArray, IntArray]:
        members, keep = super()._best_cutoff(arrays, ranking, *more)
        taken = min(int(keep.sum()) + 1, len(ranking.order))
        return members, ranking.drafts(taken, len(keep))


class Latest(WispprofPolicy):
    """Takes the late for the early."""

    def _weights(self, sessions: list[SessionView], urgency: Urgency, *more: Any) -> FloatArray:
        return super()._weights(sessions, urgency._replace(slack_ms=-urgency.slack_ms), *more)


def without(name: str) -> WispprofPolicy:
    return WispprofPolicy(WispprofSettings(**{name: False}))


BROKEN = {
    **{f"without {name}": partial(without, name) for name in SWITCHES},
    "a draft too many": Longer,
    "deadlines reversed": Latest,
}


@pytest.mark.parametrize("broken", BROKEN)
def test_the_comparison_sees_a_policy_that_decides_otherwise(broken: str) -> None:
    """The negative control of the test above."""
    chosen = settings(max_examples=4000, phases=[Phase.generate], derandomize=True, database=None)

    def seen(world: World) -> bool:
        return bool(difference(world, BROKEN[broken](), ReferencePolicy()))

    find(worlds(), seen, settings=chosen)


# --- against every possible step ------------------------------------------------------------------


def calm(rng: random.Random, estimator: str) -> World:
    """At most four sessions of at most three drafts, and no deadline that presses."""
    sessions = [
        SessionView(
            f"s{number}",
            Slo(4.0),
            cached=rng.choice((0, 100, 900, 4000, 15000)),
            arrived_ms=0.0,
            deadline_ms=1e6,
            acceptance_probs=tuple(rng.random() ** 0.5 for _ in range(rng.randint(0, 3))),
            stream=True,
        )
        for number in range(rng.randint(1, 4))
    ]
    return World(sessions, estimator, Limits(64, 4096, 256, 1 << 20), (0.0,))


def shares(estimator: str, policy: type[WispprofPolicy] = WispprofPolicy) -> tuple[list[float], list[float]]:
    """What calm steps reach of the most expected tokens per ms: of any step in which everybody advances, and
    of any step of any of the sessions."""
    rng = random.Random(4)
    of_whole, of_any = [], []
    for _ in range(150):
        world = calm(rng, estimator)
        sessions, estimates = world.sessions, ESTIMATORS[estimator]
        names = [s.session for s in sessions]

        def rate(keep: dict[str, int], sessions=sessions, estimates=estimates) -> float:
            return value_of(sessions, keep, dict.fromkeys(keep, 1.0), estimates, 0.0)

        plan = policy().plan(0.0, sessions, estimates, world.limits)
        ours = rate({m.session: m.drafts for m in plan.items})
        # Of each session: its first 0, 1, … drafts, or the session stays out.
        tails = [(*range(len(s.acceptance_probs) + 1), None) for s in sessions]
        rates = {False: [0.0], True: [0.0]}
        for choice in itertools.product(*tails):
            keep = {name: k for name, k in zip(names, choice, strict=True) if k is not None}
            if keep:
                rates[None not in choice].append(rate(keep))
        of_whole.append(ours / max(rates[True]))
        of_any.append(ours / max(rates[True] + rates[False]))
    return of_whole, of_any


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_calm_step_is_the_best_of_all_in_which_everybody_advances(estimator: str) -> None:
    of_whole, _ = shares(estimator)
    assert statistics.fmean(of_whole) > 0.999
    assert min(of_whole) > 0.98


@pytest.mark.parametrize(("estimator", "least"), [("linear", 1.0), ("stairs", 0.9)])
def test_where_caches_cost_little_nobody_could_be_left_out_for_more(estimator: str, least: float) -> None:
    """Where reading a deep cache outweighs a step's fixed part, a step without its session has the higher
    rate; it takes part all the same, for it would have to be read in another step."""
    assert min(shares(estimator)[1]) > least - 1e-9
    assert min(shares("deep")[1]) < 0.5


def test_brute_force_sees_a_draft_too_many() -> None:
    """The negative control: one draft more than the best is seen to cost."""
    of_whole, _ = shares("stairs", Longer)
    assert statistics.fmean(of_whole) < 0.99
    assert min(of_whole) < 0.9
