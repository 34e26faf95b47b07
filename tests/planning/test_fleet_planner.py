"""Fleets: the router, the closed model, the search, the file and the answer on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from typer.testing import CliRunner

from wispprof.artifacts.fleet_answer import FleetAnswer, PayRow, load_fleet, save_fleet
from wispprof.cli import app
from wispprof.errors import PlanError
from wispprof.planning import fleet_planner
from wispprof.planning.fleet_file import FleetSpec, read_fleet
from wispprof.planning.fleet_load import fleet_load
from wispprof.planning.replica_model import SYSTEM_NAMES, ClassLoad, ReplicaModel
from wispprof.planning.session_speed import Runs
from wispprof.policies.linear_cost import LinearCost
from wispprof.reporting.fleet_section import fleet_section
from wispprof.settings.planner_settings import FleetSettings
from wispprof.simulation.arrivals import Lengths, Request
from wispprof.simulation.devices import DeviceProfile
from wispprof.simulation.routed_fleet import Burst, FleetRun, fleet_requests, route
from wispprof.simulation.scenario import ServerModel
from wispprof.simulation.server_models import server_of
from wispprof.types import Slo

FAST, SLOW = LinearCost(6.0, row_ms=0.05, kv_ms=2e-5), LinearCost(24.0, row_ms=0.2, kv_ms=8e-5)
FLEET = """
title = "Test"
model = "tiny"
systems = ["server-only", "wispprof"]

[[devices]]
name = "laptop"
count = 120
requests_per_h = 60
mean_requests_per_h = 30
draft_tokens_per_s = 100
draft_w = 20
slos = {10 = 0.5, 20 = 0.5}
ttft_ms = 4000
prompt = 200
output = 80
spread = 0.2

[[servers]]
name = "fast"
server = "fast"
gpu = "h100_sxm"
kv_tokens = 60000

[[servers]]
name = "slow"
server = "slow"
gpu = "l40s"
kv_tokens = 60000
"""
QUICK = FleetSettings(
    probe_sessions=100, check_sessions=100, sampled=1, confirming=2, verified=1, warmup_s=10.0
)


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FleetSpec:
    """Servers by name, without files."""
    made = {"fast": ServerModel(FAST), "slow": ServerModel(SLOW)}
    monkeypatch.setattr(fleet_planner, "server_of", lambda name: (made[name], "modelled"))
    monkeypatch.setattr(fleet_planner, "_BURSTS_S", 60.0)
    (tmp_path / "fleet.toml").write_text(FLEET)
    return read_fleet(tmp_path / "fleet.toml", SYSTEM_NAMES)


def loads(**changes: object) -> list[ClassLoad]:
    base = ClassLoad(
        "laptop",
        4.0,
        200,
        100,
        0.0,
        DeviceProfile.from_speed("l", 80.0),
        20.0,
        Slo(12.0),
        Runs.geometric(0.75),
    )
    return [replace(base, **changes)]  # type: ignore[arg-type]


def test_a_router_balances_and_loses_nothing() -> None:
    requests = [Request(10.0 * n, 10, 10) for n in range(1000)]
    dealt = route(requests, 7, lambda request: 300.0)
    assert sorted(r for server in dealt for r in server) == requests
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 2
    # One long request keeps its server out of turn while it lasts.
    long = route([Request(0.0, 1, 1), *requests[:20]], 2, lambda r: 1e6 if r.prompt_tokens == 1 else 15.0)
    assert max(map(len, long)) > 12


def test_arrivals_have_their_rates_and_bursts(spec: FleetSpec) -> None:
    classes = fleet_load(spec).simulated
    usual = fleet_requests(classes, 1200.0, 3)
    burst = fleet_requests(classes, 1200.0, 3, Burst(3.0))
    assert len(usual) == pytest.approx(2400, rel=0.06)
    assert len(burst) == pytest.approx(2400 * (1 + 2 * 20 / 60), rel=0.06)
    assert {r.client for r in usual} == {0, 1}


def test_more_load_or_a_slower_server_never_needs_fewer() -> None:
    for name in SYSTEM_NAMES:
        few = ReplicaModel(ServerModel(FAST, kv_tokens=50_000), name, loads()).servers_needed()
        more = ReplicaModel(ServerModel(FAST, kv_tokens=50_000), name, loads(per_s=40.0)).servers_needed()
        slower = ReplicaModel(ServerModel(SLOW, kv_tokens=50_000), name, loads()).servers_needed()
        assert 0 < few <= more, name
        assert slower == 0 or few <= slower, name
    never = ReplicaModel(ServerModel(SLOW, kv_tokens=50_000), "server-only", loads(slo=Slo(60.0)))
    assert never.servers_needed() == 0


def test_an_estimate_simulates_nothing(spec: FleetSpec) -> None:
    answer = fleet_planner.plan_fleet(spec, replace(QUICK, estimate=True))
    assert answer.complete
    assert not any(option.simulated for option in answer.options)
    prices = [o.dollars_per_h for o in answer.options if o.servers]
    assert len(prices) == 4
    assert prices == sorted(prices)


def test_ctrl_c_leaves_what_is_known(spec: FleetSpec) -> None:
    def stop(doing: str) -> None:
        if doing.endswith("servers"):
            raise KeyboardInterrupt

    answer = fleet_planner.plan_fleet(spec, QUICK, progress=stop)
    assert not answer.complete
    assert answer.notes[0].startswith("Interrupted")
    assert not any(option.simulated for option in answer.options)  # one probe decides nothing
    assert all(option.servers for option in answer.options)


def test_a_fleet_is_ranked_verified_and_written(spec: FleetSpec, tmp_path: Path) -> None:
    told: list[str] = []
    answer = fleet_planner.plan_fleet(spec, QUICK, progress=told.append)
    holding = [o for o in answer.options if o.servers]
    assert [o.dollars_per_h for o in holding] == sorted(o.dollars_per_h for o in holding)
    assert told
    best = holding[0]
    assert best.simulated
    assert best.attainment is not None
    assert best.attainment >= spec.target
    assert best.fleet_attainment is not None
    assert best.bought == best.servers + 1
    assert best.dollars_per_h == pytest.approx(best.bought * {"fast": 4.76, "slow": 1.40}[best.server])
    # The day's mean is half of the busiest hour: 120 devices, 60 outputs of 80 tokens (spread 0.2) an hour.
    tokens_per_h = 120 * 30 * 80 * 1.0202
    assert best.dollars_per_mtoken == pytest.approx(1e6 * best.dollars_per_h / tokens_per_h, rel=1e-3)
    pays = (
        PayRow("a", "h100", "tiny", 0, 1, 1.5, 3, "stream"),
        PayRow("a", "h100", "tiny", 4, 9, 0.9, 1, "round"),
    )
    answer = replace(answer, pays=pays)
    save_fleet(answer, tmp_path / "fleet.json")
    assert load_fleet(tmp_path / "fleet.json") == answer
    section = fleet_section(answer)
    assert section is not None
    assert section["headline"].startswith(f"Buy {best.bought} server")
    cells = section["pays"][0].cells
    assert cells[(0.0, 0)].heat is not None
    assert cells[(0.0, 4)].heat is None


def test_no_server_is_an_answer(spec: FleetSpec) -> None:
    hard = replace(spec, devices=(replace(spec.devices[0], slos={"500": 1.0}),))
    answer: FleetAnswer = fleet_planner.plan_fleet(hard, QUICK)
    assert answer.best is None
    assert {o.bound_by for o in answer.options} == {"never"}
    section = fleet_section(answer)
    assert section is not None
    assert "No candidate" in section["headline"]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("count = 120", "cuont = 120", "count"),
        ("draft_tokens_per_s = 100", "", "draft_tokens_per_s"),
        ("slos = {10 = 0.5, 20 = 0.5}", "slos = {fast = 1}", "tokens/s"),
        ('gpu = "h100_sxm"', 'gpu = "abacus"', "abacus"),
        ('"wispprof"]', '"wisprof"]', "wispprof"),
        ("[[servers]]", "[[server]]", "servers"),
        ("title =", "title", "TOML"),
    ],
)
def test_a_wrong_description_names_the_entry(tmp_path: Path, before: str, after: str, message: str) -> None:
    file = tmp_path / "fleet.toml"
    file.write_text(FLEET.replace(before, after))
    with pytest.raises(PlanError) as caught:
        read_fleet(file, SYSTEM_NAMES)
    assert message in f"{caught.value}"


def test_the_command_prints_the_answer(
    spec: FleetSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = "--probe-sessions 100 --check-sessions 100 --sampled 1 --confirming 1 --verified 1 --warmup 10"
    done = CliRunner().invoke(app, ["fleet", "fleet.toml", "--jobs", "1", *options.split()])
    assert done.exit_code == 0, done.output
    assert "Buy " in done.output
    assert "Runner-up" in done.output
    assert load_fleet(tmp_path / "fleet.json").title == "Test"


def test_lengths_may_share_a_prefix() -> None:
    request = Lengths(1000, 10, reused=0.4).request(Random(0), 5.0, 2)
    assert (request.time_ms, request.client, request.reused) == (5.0, 2, 400)


def test_every_example_names_servers_that_are_shipped() -> None:
    for file in sorted((Path(__file__).parents[2] / "examples" / "fleets").glob("*.toml")):
        for candidate in read_fleet(file, SYSTEM_NAMES).servers:
            model, note = server_of(candidate.server)
            assert model.kv_tokens, note


def test_servers_that_differ_leave_the_attainment_uncertain() -> None:
    alike = FleetRun(by_server=((95, 100), (95, 100), (95, 100)))
    apart = FleetRun(by_server=((100, 100), (100, 100), (85, 100)))
    assert alike.attainment == apart.attainment == 0.95
    assert alike.server_error == 0.0
    assert apart.server_error == pytest.approx(0.05)
    assert FleetRun(by_server=((9, 10),)).server_error == 0.0


def test_a_fleet_that_misses_the_target_gets_more_servers(
    spec: FleetSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[int] = []
    plain = fleet_planner._verified

    def too_few(one: fleet_planner._Search, *others: object) -> object:
        if one.servers > 1 and not searched:
            searched.append(one.servers)
            one.servers = 1
        return plain(one, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(fleet_planner, "_verified", too_few)
    many = tuple(replace(of, count=500) for of in spec.devices)
    needy = replace(spec, servers=spec.servers[1:], systems=("server-only",), devices=many)
    (option,) = fleet_planner.plan_fleet(needy, QUICK).options
    assert searched
    assert option.servers > 1
    assert option.fleet_attainment is not None
    assert option.fleet_attainment >= spec.target
