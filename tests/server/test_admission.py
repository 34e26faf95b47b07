"""Which requests are refused, with what alternative, and the step times that admission uses."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wispprof.policies import ScheduledItem
from wispprof.policies.linear_cost import LinearCost
from wispprof.server import Refused, VerificationServer
from wispprof.server.admission import Utilization
from wispprof.server.step_time_tracker import OnlineFit, StepTimeTracker
from wispprof.settings.server_settings import ServerSettings
from wispprof.testing.fake_engine import FakeEngine
from wispprof.types import BatchShape, GenerationRequest, Sampling, Slo


class Listener:
    def __init__(self, key: str = "") -> None:
        self.key = key

    def committed(self, *_: object) -> None: ...

    def failed(self, *_: object) -> None: ...


def known(step: float = 10.0, new: float = 1.0) -> LinearCost:
    """A step of ``step`` + ``new`` per token, exactly."""
    return LinearCost(step, new, bound_ratio=1.2)


def server(**changes: object) -> VerificationServer:
    engine = FakeEngine(64, max_context=256)
    settings = ServerSettings(policy="fcfs", **changes)  # type: ignore[arg-type]
    return VerificationServer(engine, engine.served, settings, estimator=known(), now_ms=lambda: 0.0)


def ask(speed: float = 1.0, length: int = 4, **changes: object) -> GenerationRequest:
    return GenerationRequest(
        tuple([1] * length),
        20,
        slo=Slo.of(speed, changes.pop("ttft_ms", None)),  # type: ignore[arg-type]
        **changes,  # type: ignore[arg-type]
    )


def utilization(estimator: LinearCost, sessions: list[tuple[float, int]]) -> float:
    return Utilization.of(estimator, sessions).share


def test_utilization_of_known_step_times() -> None:
    estimator = known(10.0, 1.0)
    # Ten sessions at 10 tokens/s: a step of 10 + 10 ms each 100 ms.
    assert utilization(estimator, [(100.0, 50)] * 10) == pytest.approx(0.2, rel=0.06)
    # A slow session among fast ones costs its own share only.
    mixed = utilization(estimator, [(100.0, 50)] * 10 + [(1000.0, 50)])
    assert mixed - utilization(estimator, [(100.0, 50)] * 10) == pytest.approx(0.001, rel=0.1)


@given(st.lists(st.tuples(st.floats(1.0, 1e4), st.integers(0, 1000)), min_size=1, max_size=20))
def test_one_more_session_never_lowers_the_load(sessions) -> None:
    estimator = known()
    whole = utilization(estimator, sessions)
    assert whole >= utilization(estimator, sessions[:-1])
    *others, (tpot, cached) = sessions
    assert whole == pytest.approx(Utilization.of(estimator, others).with_one_more(cached)(tpot))


def test_a_speed_that_is_not_possible_is_refused_with_one_that_is() -> None:
    one = server()
    with pytest.raises(Refused) as refused:
        one.open(ask(200.0), Listener())
    assert refused.value.code == "slo"
    nearest = refused.value.nearest_tokens_per_s
    assert 0 < nearest < 200.0
    one.open(ask(nearest), Listener())
    with pytest.raises(Refused):
        server().open(ask(nearest * 1.05), Listener())


def test_a_full_server_answers_busy_and_when_to_retry() -> None:
    one = server()
    admitted = 0
    codes = []
    for speed in [10.0] * 100 + [1.0] * 100 + [0.01] * 300:
        try:
            one.open(ask(speed), Listener())
            admitted += speed == 10.0
        except Refused as err:
            codes.append(err.code)
    assert 40 < admitted <= 90
    assert codes[0] == "slo"
    assert codes[-1] == "busy"


def test_admit_all_refuses_no_speed() -> None:
    one = server(admit="all")
    for _ in range(200):
        one.open(ask(1000.0), Listener())


def test_who_asks_for_no_speed_is_never_refused_for_it() -> None:
    one = server(max_waiting=1000)
    with pytest.raises(Refused, match=r"Request --slo \d+(\.\d+)?, or omit --slo\.$"):
        one.open(ask(200.0), Listener())
    for _ in range(900):
        one.open(ask(0.0), Listener())
    with pytest.raises(Refused, match=r"server is full.* omit --slo"):
        one.open(ask(5.0), Listener())
    with pytest.raises(Refused, match="first token"):
        one.open(ask(0.0, ttft_ms=1.0), Listener())


def test_ttft_checks_count_the_queue() -> None:
    one = server(prefill_chunk=16)
    one.open(ask(0.1, 160), Listener())
    with pytest.raises(Refused, match="first token"):
        one.open(ask(0.1, 160, ttft_ms=400.0), Listener())
    one.open(ask(0.1, 160, ttft_ms=900.0), Listener())


def test_limits_per_key_and_in_total() -> None:
    one = server(sessions_per_key=2, max_sessions=3, admit="all")
    mine = Listener("mine")
    one.open(ask(), mine)
    one.open(ask(), mine)
    with pytest.raises(Refused, match="2 sessions") as mine_full:
        one.open(ask(), mine)
    assert mine_full.value.code == "limit"
    one.open(ask(), Listener("yours"))
    with pytest.raises(Refused) as full:
        one.open(ask(), Listener("theirs"))
    assert full.value.code == "busy"


def test_tokens_per_key_are_a_rate() -> None:
    now = [0.0]
    engine = FakeEngine(64)
    settings = ServerSettings(tokens_per_key_per_s=10.0, admit="all")
    one = VerificationServer(engine, engine.served, settings, estimator=known(), now_ms=lambda: now[0])
    one.admission.budget.spend("mine", 250, 0.0)
    with pytest.raises(Refused) as refused:
        one.open(ask(), Listener("mine"))
    assert refused.value.code == "limit"
    assert refused.value.retry_ms > 0
    one.open(ask(), Listener("yours"))
    now[0] = refused.value.retry_ms + 1.0
    one.open(ask(), Listener("mine"))


# --- step times ---


def test_the_online_fit_finds_the_step_times() -> None:
    dice = random.Random(0)
    step_times = StepTimeTracker(None)
    for _ in range(300):
        shape = BatchShape.of(
            (dice.randrange(1, 9), dice.randrange(500)) for _ in range(dice.randrange(1, 17))
        )
        truth = 5.0 + 0.4 * shape.new_tokens + 0.002 * shape.cached_tokens
        step_times.observe(shape, step_times.estimator.predict(shape)[0], truth * dice.uniform(0.95, 1.1))
    probe = BatchShape.uniform(8, 4, 300)
    p50, bound = step_times.estimator.predict(probe)
    truth = 5.0 + 0.4 * 32 + 0.002 * 2400
    assert p50 == pytest.approx(truth, rel=0.05)
    assert truth < bound < 1.3 * truth
    assert step_times.learning


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 500)), min_size=1, max_size=10))
def test_online_predictions_never_fall_if_work_is_added(items) -> None:
    fit = OnlineFit()
    dice = random.Random(1)
    for _ in range(40):
        fit.observe(BatchShape.uniform(dice.randrange(1, 5), 2, 10), dice.uniform(1.0, 9.0))
    estimator = fit.estimator
    batch = estimator.start()
    assert batch.p50_ms == batch.bound_ms == 0.0
    for new, cached in items:
        grown = batch.add(new, cached)
        assert grown.p50_ms >= batch.p50_ms
        assert grown.bound_ms >= grown.p50_ms
        batch = grown
    assert estimator.predict(BatchShape.of(items)) == pytest.approx((batch.p50_ms, batch.bound_ms))


def test_a_policy_defect_does_not_reach_the_engine() -> None:
    one = server()
    session = one.open(ask(), Listener())
    with pytest.raises(ValueError):
        session.state.step_input(ScheduledItem(session.name, drafts=3))


def test_sampling_is_part_of_a_request() -> None:
    assert ask(sampling=Sampling(0.5)).sampling.temperature == 0.5


def test_one_prompt_on_an_idle_server_leaves_capacity() -> None:
    step_times = StepTimeTracker(known())
    step_times.prefilled(1000.0, 500.0)
    assert step_times.prefill_load(1000.0) == pytest.approx(0.05)
    assert step_times.prefill_load(20_000.0) == 0.0
    assert step_times.cycle_ratio == 1.0
    for _ in range(10):
        step_times.cycle(15.0, 10.0)
    assert step_times.cycle_ratio == pytest.approx(1.5)
