"""The simulator: determinism, conservation, and cases whose answer is a formula."""

from __future__ import annotations

from dataclasses import replace

import pytest

from wispprof.policies.interface import Limits, ScheduledItem, StepPlan
from wispprof.policies.linear_cost import LinearCost
from wispprof.settings.edge_settings import DraftingSettings
from wispprof.settings.shared_settings import LinkModel
from wispprof.simulation import SYSTEMS, Scenario, ServerModel, simulate, system
from wispprof.simulation.arrivals import Bursts, ClosedFleet, Lengths, Poisson
from wispprof.simulation.checked_plan import PolicyViolation
from wispprof.simulation.devices import DeviceProfile
from wispprof.simulation.event_loop import Simulation
from wispprof.simulation.metrics import Report
from wispprof.simulation.synthetic_acceptance import SyntheticAcceptance
from wispprof.types import Slo

COST = LinearCost(20.0, row_ms=0.3, kv_ms=0.0002)
DEVICE = DeviceProfile("d", draft_ms=8.0)


def fleet(name: str, count: int = 6, **changes: object) -> Scenario:
    base = Scenario(
        system(name),
        ServerModel(COST, prefill_chunk=128),
        ClosedFleet(count, Lengths(60, 24, 0.3, 0.3), ramp_ms=500.0),
        SyntheticAcceptance(0.75),
        devices=((DEVICE, 1.0),),
        links=((LinkModel(20.0, jitter_ms=2.0, loss=0.01), 1.0),),
        seconds=4.0,
        warmup_s=0.5,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", list(SYSTEMS))
def test_equal_scenarios_give_equal_reports(name: str) -> None:
    one, other = simulate(fleet(name)), simulate(fleet(name))
    assert repr(one) == repr(other)
    assert one.sessions > 0


def test_a_run_ends_once_too_many_sessions_have_missed_for_certain() -> None:
    slow = fleet("fcfs", 40, slos=((Slo(30.0, 800.0), 1.0),), seconds=12.0)
    whole, short = simulate(slow), simulate(replace(slow, most_missed=3))
    assert short.seconds < 0.5 * whole.seconds
    missed = [round(r.sessions * r.violations) for r in (whole, short)]
    assert 3 < missed[1] < missed[0]
    # What ends no run changes none.
    lenient = simulate(replace(slow, most_missed=10_000))
    assert (lenient.attainment, lenient.counters) == (whole.attainment, whole.counters)


def test_another_seed_gives_another_run() -> None:
    assert repr(simulate(fleet("fcfs"))) != repr(simulate(fleet("fcfs", seed=1)))


def _outcome(sim: Simulation) -> tuple[object, ...]:
    report = sim.run()
    times = [(r.device, r.number, r.first_ms, r.last_ms, r.tokens) for r in sim.records]
    counters = report.counters
    return times, counters.drafted, counters.up_bytes, counters.accepted, report.goodput


@pytest.mark.parametrize("name", ["wispprof", "clairvoyant"])
@pytest.mark.parametrize("fixed_ms", [2.0, 20.0])
@pytest.mark.parametrize("resume_ms", [0.0, 6.0])
def test_how_often_a_stream_is_worked_out_changes_nothing(
    name: str, fixed_ms: float, resume_ms: float
) -> None:
    """Asynchronous edges are worked out late: seldom and always must give the same."""
    server = ServerModel(LinearCost(fixed_ms, row_ms=0.3), prefill_chunk=128)
    device = ((replace(DEVICE, resume_ms=resume_ms), 1.0),)
    seldom = Simulation(fleet(name, server=server, devices=device))
    always = Simulation(fleet(name, server=server, devices=device))
    for place in range(4000):
        always.schedule(place * 0.997, lambda now_ms, _: always._catch_up(now_ms), None)
    assert _outcome(seldom) == _outcome(always)


@pytest.mark.parametrize("name", list(SYSTEMS))
def test_what_is_asked_is_what_is_committed(name: str) -> None:
    load = Poisson(2.0, Lengths(40, 20, 0.4, 0.4))
    sim = Simulation(fleet(name, load=load, seconds=60.0, warmup_s=0.0))
    # Requests stop early enough for all to end.
    sim.scenario = replace(sim.scenario, load=_First(load, 6_000.0))
    sim.run()
    assert len(sim.records) > 5
    for record in sim.records:
        assert record.done
        assert record.tokens == record.output_tokens
        assert record.arrival_ms < record.first_ms <= record.last_ms
    assert sim.counters.committed == sum(r.output_tokens for r in sim.records)
    assert sim.server.kv_used == 0
    sim.server.check_integrity()


class _First:
    """Only the requests of a load's beginning."""

    def __init__(self, load: Poisson, until_ms: float) -> None:
        self._load, self._until_ms = load, until_ms

    def requests(self, rng, horizon_ms):  # type: ignore[no-untyped-def]
        return self._load.requests(rng, min(horizon_ms, self._until_ms))


@pytest.mark.parametrize("name", ["fcfs", "wisp", "wispprof"])
def test_committed_tokens_are_the_target_path(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    edges = []
    begin = Simulation.ended

    def ended(self, now_ms, edge):  # type: ignore[no-untyped-def]
        edges.append(edge)
        begin(self, now_ms, edge)

    monkeypatch.setattr(Simulation, "ended", ended)
    simulate(fleet(name))
    assert edges
    for edge in edges:
        output = edge.committed[edge.output.prompt_tokens :]
        assert list(output) == list(edge.output.path)


def test_a_lone_server_only_session_runs_at_the_speed_of_the_step() -> None:
    cost = LinearCost(25.0, row_ms=1.0)
    report = simulate(
        fleet(
            "server-only",
            1,
            server=ServerModel(cost, overhead_ms=0.5, spread=0.0, prefill_chunk=512),
            links=((LinkModel(40.0), 1.0),),
            load=ClosedFleet(1, Lengths(50, 30), ramp_ms=0.0),
        )
    )
    assert report.tpot_ms[0] == pytest.approx(26.5)
    # Up, prompt, what the loop does before it sends (half of all it does), down.
    assert report.ttft_ms[0] == pytest.approx(20.0 + 25.0 + 50.0 + 0.25 + 20.0)


@pytest.mark.parametrize("k", [1, 3])
def test_a_lone_round_takes_drafting_link_and_step(k: int) -> None:
    """Drafts that always fail: each round commits one token and takes k drafts, a round trip and a step."""
    cost = LinearCost(25.0, row_ms=1.0)
    report = simulate(
        fleet(
            "fcfs",
            1,
            system=system("fcfs").replace(controller_options={"k": k}),
            server=ServerModel(cost, overhead_ms=0.5, spread=0.0),
            acceptance=SyntheticAcceptance(1e-4, concentration=100.0),
            links=((LinkModel(40.0), 1.0),),
            load=ClosedFleet(1, Lengths(50, 40), ramp_ms=0.0),
        )
    )
    full = 8.0 * k + 40.0 + 25.0 + (1 + k)
    # The last round drafts nothing (the target's own token ends it), so it is shorter.
    assert report.tpot_ms[0] == pytest.approx(full, rel=0.03)
    assert report.acceptance < 0.01


def test_proactive_drafting_hides_drafting_time() -> None:
    def speed(ahead: int) -> float:
        chosen = system("fcfs").replace(
            controller_options={"k": 4}, drafting=DraftingSettings(proactive=ahead)
        )
        return simulate(fleet("fcfs", 1, system=chosen, acceptance=SyntheticAcceptance(0.95))).throughput

    assert speed(6) > 1.1 * speed(0)


def test_a_rest_costs_every_round_what_it_adds() -> None:
    """One device that waits for its commits: what a rest adds is added once a round. One that drafts on
    meanwhile has no rest."""
    fresh, tired = DEVICE, replace(DEVICE, resume_ms=5.0)

    def run(device: DeviceProfile, ahead: int) -> tuple[float, float]:
        chosen = replace(system("fcfs"), drafting=DraftingSettings(proactive=ahead))
        sure = SyntheticAcceptance(0.999, concentration=1e6)
        report = simulate(fleet("fcfs", 1, system=chosen, devices=((device, 1.0),), acceptance=sure))
        return report.counters.drafting_ms / report.counters.drafted, report.tpot_ms[0]

    k = system("fcfs").controller_options["k"]
    (before_ms, before), (after_ms, after) = run(fresh, 0), run(tired, 0)
    busy_ms, _ = run(tired, 16)
    assert busy_ms < 8.0 + 1.0 / k
    assert before_ms == pytest.approx(8.0)
    assert after_ms == pytest.approx(8.0 + 5.0 / k, rel=0.05)
    assert after > before


@pytest.mark.parametrize(("draft_ms", "rests"), [(2.0, True), (60.0, False)])
def test_a_stream_resumes_only_where_its_lead_was_full(draft_ms: float, rests: bool) -> None:
    device = ((DeviceProfile("d", draft_ms=draft_ms, resume_ms=30.0), 1.0),)
    counters = simulate(fleet("wispprof", 1, devices=device)).counters
    resumed_ms = counters.drafting_ms - draft_ms * counters.drafted
    assert (resumed_ms > 30.0) == rests
    assert rests or resumed_ms == pytest.approx(0.0, abs=1e-6)


def test_a_stream_is_never_slower_than_server_only_for_one_device() -> None:
    for draft_ms in (2.0, 20.0, 200.0):
        device = ((DeviceProfile("d", draft_ms=draft_ms), 1.0),)
        stream = simulate(fleet("wispprof", 1, devices=device))
        alone = simulate(fleet("server-only", 1, devices=device))
        assert stream.throughput >= 0.97 * alone.throughput


def test_memory_bounds_the_sessions_admitted() -> None:
    tight = replace(fleet("fcfs", 12), server=ServerModel(COST, kv_tokens=300))
    sim = Simulation(tight)
    most = 0
    step = sim.server._step

    def watch(now_ms, plan):  # type: ignore[no-untyped-def]
        nonlocal most
        step(now_ms, plan)
        most = max(most, sim.server.kv_used)

    sim.server._step = watch  # type: ignore[method-assign]
    sim.run()
    assert 0 < most <= 300
    assert max(r.ttft_ms for r in sim.records if r.done) > 500.0


def test_host_memory_admits_everybody_and_costs_the_way_back() -> None:
    def run(**memory: object) -> Report:
        return simulate(fleet("wisp", 12, server=ServerModel(COST, **memory)))  # type: ignore[arg-type]

    free, large = run(), run(kv_tokens=10**6, host_kv_ms=1.0)
    assert large == free
    assert run(kv_tokens=300, host_kv_ms=0.0) == free
    tight = run(kv_tokens=300, host_kv_ms=0.5)
    assert tight.mean_step_ms > 1.05 * free.mean_step_ms
    assert tight.ttft_ms[2] < run(kv_tokens=300).ttft_ms[2]
    with pytest.raises(ValueError, match="kv_tokens"):
        ServerModel(COST, host_kv_ms=0.5)


def test_a_request_that_can_never_fit_is_refused_and_others_go_on() -> None:
    report = simulate(
        fleet(
            "fcfs",
            4,
            server=ServerModel(COST, kv_tokens=200),
            load=ClosedFleet(4, Lengths(90, 40, 1.0, 0.0), ramp_ms=100.0),
        )
    )
    assert 0 < report.attainment < 1


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (lambda s: (ScheduledItem(s[0].session), ScheduledItem(s[0].session)), "planned .* twice|drafts"),
        (lambda s: (ScheduledItem("nobody"),), "planned nobody twice, or it is none"),
        (
            lambda s: tuple(ScheduledItem(v.session, prefill=v.prompt_left) for v in s if v.prompt_left),
            "broken planned .* where prefill_chunk is 128",
        ),
        (
            lambda s: tuple(ScheduledItem(v.session, prefill=min(100, v.prompt_left)) for v in (s[0], s[0])),
            "planned .* twice",
        ),
        (lambda s: s[99], r"broken raised IndexError: .* \(.*test_simulation_engine\.py:\d+\)"),
    ],
)
def test_a_policy_beyond_its_limits_is_caught(plan, said: str) -> None:  # type: ignore[no-untyped-def]
    """Negative control: the check that guards every other run can fire."""

    class Broken:
        name, stream = "broken", False

        def plan(self, now_ms, sessions, estimator, limits: Limits) -> StepPlan:  # type: ignore[no-untyped-def]
            return StepPlan(plan(sessions))

    sim = Simulation(fleet("fcfs", 3, load=ClosedFleet(3, Lengths(600, 8), ramp_ms=1.0)))
    sim.server._policy = Broken()
    with pytest.raises((PolicyViolation, ValueError), match=said):
        sim.run()


def test_bursts_hurt_only_while_they_last() -> None:
    calm = simulate(fleet("fcfs", load=Bursts(1.0, 1.0, 4.0, 1.0, Lengths(40, 20))))
    burst = simulate(fleet("fcfs", load=Bursts(1.0, 60.0, 4.0, 1.0, Lengths(40, 20))))
    assert burst.ttft_ms[1] > calm.ttft_ms[1]


def test_no_prefix_cache_costs_throughput() -> None:
    kept = simulate(fleet("sled-fixed", 10))
    lost = simulate(fleet("sled-fixed-nocache", 10))
    assert lost.mean_step_ms > kept.mean_step_ms
    assert lost.throughput < kept.throughput


def test_the_clairvoyant_never_drafts_for_nothing() -> None:
    report = simulate(fleet("clairvoyant"))
    assert report.acceptance > 0.99
    assert report.counters.wasted_tokens <= 0.02 * report.counters.drafted


def test_slos_and_devices_are_dealt_by_weight() -> None:
    slos = ((Slo(1.0), 3.0), (Slo(2.0), 1.0))
    sim = Simulation(fleet("fcfs", 40, slos=slos))
    sim.run()
    kinds = {r.device: r.slo.tokens_per_s for r in sim.records}
    assert 27 <= sum(v == 1.0 for v in kinds.values()) <= 33
