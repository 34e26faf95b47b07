"""Capacity search, metrics and published setups."""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from dataclasses import replace
from multiprocessing.connection import wait

import pytest

from wispprof.errors import ArtifactMissing, PlanError, PluginError
from wispprof.policies.linear_cost import LinearCost
from wispprof.simulation import Scenario, ServerModel, reproduce, simulate, system
from wispprof.simulation import capacity_search as search
from wispprof.simulation.arrivals import ClosedFleet, Lengths, Poisson
from wispprof.simulation.capacity_search import CapacityResult, capacity, workers
from wispprof.simulation.metrics import SessionRecord
from wispprof.simulation.reproduce import (
    Figure,
    ReproducedTable,
    linear_server,
    read_setup,
    reproduce_configspec,
    wisp_scenario,
)
from wispprof.simulation.synthetic_acceptance import SyntheticAcceptance
from wispprof.types import Slo


def scenario(name: str, slo: float, fixed_ms: float = 30.0) -> Scenario:
    return Scenario(
        system(name),
        ServerModel(LinearCost(fixed_ms, row_ms=1.5), spread=0.0),
        ClosedFleet(1, Lengths(20, 20), ramp_ms=200.0),
        SyntheticAcceptance(0.7),
        slos=((Slo(slo), 1.0),),
        seconds=4.5,
        warmup_s=1.0,
    )


def test_server_only_capacity_is_its_formula() -> None:
    """Steps of n sessions take 30 + 1.5 n + 0.5 ms, plus a prompt of 20 rows every 30 tokens a session."""
    longer = replace(
        scenario("server-only", 10.0),
        load=ClosedFleet(1, Lengths(20, 30), ramp_ms=200.0),
        seconds=6.0,
    )
    found = capacity(longer, start=16, tolerance=0.0)
    # n rows and n x 20 / 30 prompt rows a step on average: 30.5 + 2.5 n <= 100 ms.
    assert found.devices == pytest.approx((100 - 30.5) / 2.5, abs=2)
    assert found.bounded
    assert found.report is not None
    assert found.report.violations <= 0.05


@pytest.mark.parametrize("name", ["server-only", "fcfs", "wispprof"])
def test_a_stricter_slo_never_raises_capacity(name: str) -> None:
    found = [
        capacity(scenario(name, slo), start=8, most=32, tolerance=0.1).devices for slo in (7.0, 10.0, 15.0)
    ]
    assert found == sorted(found, reverse=True)
    assert found[0] > 0


@pytest.mark.parametrize("name", ["server-only", "fcfs"])
def test_a_slower_server_never_raises_capacity(name: str) -> None:
    found = [capacity(scenario(name, 9.0, ms), start=8, most=32).devices for ms in (20, 50, 80)]
    assert found == sorted(found, reverse=True)


def _report_for(scenario: Scenario, limit: int):  # type: ignore[no-untyped-def]
    assert isinstance(scenario.load, ClosedFleet)
    slo_met = 1.0 if scenario.load.devices <= limit else 0.5
    return replace(_REPORT, attainment=slo_met, sessions=scenario.load.devices)


_REPORT = simulate(replace(scenario("server-only", 1.0), seconds=2.0, warmup_s=0.0))


@pytest.mark.parametrize("limit", [0, 1, 7, 16, 33, 90])
@pytest.mark.parametrize("wide", [1, 3])
def test_the_search_finds_the_edge_whatever_its_width(
    limit: int, wide: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "run_all", lambda many, executor: [_report_for(s, limit) for s in many])
    found = capacity(scenario("fcfs", 1.0), start=4, tolerance=0.0, wide=wide)
    assert found.devices == limit
    assert [size for size, _ in found.probes] == sorted({size for size, _ in found.probes})


def test_the_search_says_when_it_met_its_own_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "run_all", lambda many, executor: [_report_for(s, 999) for s in many])
    found = capacity(scenario("fcfs", 1.0), start=4, most=50)
    assert (found.devices, found.bounded) == (50, False)


def test_only_fleets_have_a_capacity() -> None:
    with pytest.raises(ValueError, match="closed fleet"):
        capacity(replace(scenario("fcfs", 1.0), load=Poisson(1.0)))


def test_unknown_systems_are_named() -> None:
    with pytest.raises(PlanError, match="wispprof"):
        system("magic")
    with pytest.raises(PluginError, match="no_such_module"):
        system("no_such_module:Policy")


@pytest.mark.parametrize(
    ("policy", "label", "controller"),
    [
        ("baselines:FcfsPolicy", "fcfs", "fixed"),
        ("wispprof_policy:WispprofPolicy", "wispprof", "wispprof"),
    ],
)
def test_a_batching_policy_of_a_module_is_a_system(policy: str, label: str, controller: str) -> None:
    name = f"wispprof.policies.{policy}"
    found = system(name)
    assert (found.label, found.controller) == (name, controller)
    assert found.make_batching().stream == (controller == "wispprof")
    ours, theirs = (simulate(scenario(system_name, 1.0)) for system_name in (name, label))
    assert repr(replace(ours, system=label)) == repr(theirs)


# --- SLO attainment ---


def record(**changes: object) -> SessionRecord:
    base = SessionRecord(0, 0, Slo(10.0, ttft_ms=500.0), 0.0, 10, 20)
    base.first_ms, base.last_ms, base.tokens, base.done = 400.0, 2300.0, 20, True
    for name, value in changes.items():
        setattr(base, name, value)
    return base


@pytest.mark.parametrize(
    ("changes", "now", "slo_met"),
    [
        ({}, 9000.0, True),
        ({"last_ms": 2301.0}, 9000.0, False),
        ({"first_ms": 501.0}, 9000.0, False),
        ({"done": False, "tokens": 10, "last_ms": 1300.0}, 1310.0, True),
        ({"done": False, "tokens": 10, "last_ms": 1310.0}, 1311.0, False),
        ({"done": False, "tokens": 3, "last_ms": 500.0}, 600.0, None),
        ({"done": False, "tokens": 3, "last_ms": 500.0}, 2000.0, False),
        ({"done": False, "tokens": 0, "first_ms": math.nan}, 400.0, None),
        ({"done": False, "tokens": 0, "first_ms": math.nan}, 501.0, False),
        ({"refused": True}, 10.0, False),
    ],
)
def test_slo_met(changes: dict[str, object], now: float, slo_met: bool | None) -> None:
    assert record(**changes).slo_met(now) is slo_met


# --- published setups ---


def test_setups_ship_and_build() -> None:
    setup = read_setup("wisp")
    assert setup["published"]["capacity"]["8"]["wisp"] == 86
    built = wisp_scenario(setup, "wisp", 8.0, setup["assumption"][0])
    assert built.server.estimator.predict is not None
    assert built.system.batching_options == {"urgency": 32.0}
    assert built.slos[0][0] == Slo(8.0, 1250.0)
    assert (built.warmup_s, built.seconds) == (16.0, 48.0)
    assert read_setup("specedge")["prices"]["edge"] == 0.35
    with pytest.raises(ArtifactMissing):
        read_setup("nothing")


def test_assumptions_override_one_kind_of_system() -> None:
    setup = read_setup("wisp")
    memory = next(a for a in setup["assumption"] if a["name"] == "and KV memory")
    mine, theirs = (wisp_scenario(setup, kind, 2.0, memory) for kind in ("wisp", "server-only"))
    assert mine.server.kv_tokens == theirs.server.kv_tokens == 39_700
    assert mine.server.host_kv_ms == 0.052
    assert theirs.server.host_kv_ms is None
    assert (theirs.system.batching, theirs.system.controller) == ("fcfs", None)
    assert theirs.seconds == 128.0


def test_ratios_take_what_an_assumption_leaves_alone_from_the_one_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    devices = {"wisp": 30, "wisp-carry": 60, "server-only": 20}

    def known(scenario: Scenario, **_: object) -> CapacityResult:
        return CapacityResult(devices.get(scenario.system.label, 0), 0.05, None, (), True)

    monkeypatch.setattr(reproduce, "capacity", known)
    figures = {f.name: f.simulated for f in reproduce.reproduce_wisp().figures}
    assert figures["capacity at 2 tok/s, wisp"]["fair"] == 30
    ratio = figures["capacity at 2 tok/s, wisp / server-only"]
    assert (ratio["fair"], ratio["slack carries over"]) == (1.5, 3.0)
    # No device served is no ratio.
    assert math.isnan(figures["goodput at 8 tok/s, wisp / sled"]["fair"])


def test_assumptions_override_the_server() -> None:
    model = linear_server({"fixed_ms": 5.0, "row_ms": 1.0, "max_items": 7}, fixed_ms=6.0)
    assert model.max_items == 7
    assert model.estimator.start().add(1, 0).p50_ms == 7.0


def test_verdicts_name_what_makes_the_difference() -> None:
    comparison = ReproducedTable("t", "c", 0.2, {"fair": "", "odd": ""}, ())
    assert comparison.verdict(Figure("a", 2.0, {"fair": 2.3, "odd": 9.0})) == "met: fair"
    assert comparison.verdict(Figure("a", 2.0, {"fair": 1.0, "odd": 1.9})) == "met under: odd"
    missed = comparison.verdict(Figure("a", 2.0, {"fair": 1.0, "odd": math.nan}))
    assert missed == "not met; nearest: fair, -50%"
    assert comparison.verdict(Figure("a", 2.0, {"fair": math.nan})) == "not simulated"


def test_every_published_choice_of_configspec_is_met() -> None:
    found = reproduce_configspec()
    assert len(found.figures) == 1 + 2 * 4 + 6 * 5
    for figure in found.figures:
        assert found.verdict(figure) == "met: paper's search", figure


def test_load_moves_the_constant_of_configspec_and_its_choices() -> None:
    figures = {figure.name: figure.simulated for figure in reproduce_configspec().figures}
    loads = ("one session", "128 sessions", "256 sessions")
    constant, *times = (figures["T_verify at K = 5, s"][name] for name in ("paper's search", *loads))
    assert times == sorted(times)
    assert times[0] < 0.1 * constant < times[2]
    lengths = [
        figures["Jetson AGX Orin, best goodput: length K"][name] for name in ("paper's search", *loads)
    ]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] == 8 > lengths[-1]


def test_what_ends_early_ends_its_workers() -> None:
    """Ctrl-C during a search ends the workers without waiting for their runs."""

    def interrupted() -> None:
        with workers(2) as executor:
            assert executor is not None
            assert executor.submit(os.getpid).result() != os.getpid()
            executor.submit(time.sleep, 600)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    # The executor's own thread reaps them too, and who comes second is told that the process still lives:
    # its sentinel says when it has ended.
    for process in multiprocessing.active_children():
        assert wait([process.sentinel], timeout=60)


def test_one_job_needs_no_workers() -> None:
    with workers(1) as executor:
        assert executor is None
