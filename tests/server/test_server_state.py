"""The data of the server's page: what they hold, their size, and that nobody pays for them unasked."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from wispprof.edge import EdgeClient, Generation, GenerationRequest, websocket_connections
from wispprof.server import server_state as module
from wispprof.server.app import make_app
from wispprof.server.device_kinds import MAX_KINDS, DeviceKinds
from wispprof.server.engine_client import EngineClient
from wispprof.server.metrics import MAX_SLO_CLASSES, Metrics, StepRecord
from wispprof.server.process import RunningServer, running_server
from wispprof.sessions.pending_drafts import DraftCounters
from wispprof.settings.edge_settings import ClientSettings
from wispprof.settings.server_settings import ServerSettings
from wispprof.testing.fake_engine import FakeEngine
from wispprof.types import Sampling, Slo


async def served(http: httpx.AsyncClient, running: RunningServer, path: str) -> dict[str, Any]:
    response = await http.get(running.http_url + path)
    response.raise_for_status()
    return dict(response.json())


@pytest.mark.parametrize("front_process", [False, True])
async def test_the_page_data_of_a_running_server(front_process: bool) -> None:
    engine = FakeEngine(step_ms=lambda shape: 1.0)
    settings = ServerSettings(admit="all")
    async with (
        running_server(settings, engine=engine, model=engine.served, front_process=front_process) as running,
        EdgeClient(websocket_connections(running.split_url), ClientSettings(name="phone")) as client,
        httpx.AsyncClient() as http,
    ):
        slo = Slo(1.0, 5_000.0)
        first = Generation(client, GenerationRequest((1, 2, 3), 4000, Sampling(), slo))
        stream = first.stream()
        await anext(stream)
        await Generation(client, GenerationRequest((4, 5), 8, Sampling(), slo)).run()
        data = await served(http, running, "/dashboard")
        assert data["kinds"][0] | {"tokens": 0} == {
            "kind": "phone", "open": 1, "drafting": 0, "tokens": 0,
            "drafted": 0, "accepted": 0, "matched": 0, "wasted": 0, "cut": 0, "dropped": {},
        }  # fmt: skip
        [only] = data["classes"]
        assert (only["class"], only["open"], only["met"], only["missed"]) == ("1", 1, 1, 0)
        assert only["slack_ms"] > 0
        assert data["sessions"]["kind"] == ["phone"]
        assert data["sessions"]["all"] == 1
        assert data["kv"]["free"] < data["kv"]["total"]
        steps = data["steps"]
        assert steps["number"] == list(range(steps["first"], steps["next"]))
        assert steps["prefill_tokens"][0] == 3
        assert all(one > 0 for one in steps["actual_ms"])
        again = await served(http, running, f"/dashboard?since={steps['next']}")
        assert again["steps"]["first"] == steps["next"]
        one = await served(http, running, f"/steps/{steps['number'][2]}")
        assert one["step"] == steps["number"][2]
        assert (await http.get(f"{running.http_url}/steps/{10**9}")).status_code == 404
        metrics = (await http.get(running.http_url + "/metrics")).text
        assert 'wispprof:sessions{kind="phone",slo_class="1"} 1.0' in metrics
        assert 'wispprof:slo_slack_seconds{slo_class="1"}' in metrics
        await stream.aclose()


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
async def test_metrics_and_steps_need_the_key_beyond_loopback(host: str) -> None:
    key, engine = "k" * 16, FakeEngine()
    settings = ServerSettings(host=host, api_keys=(key,), admit="all")
    async with running_server(settings, engine=engine, model=engine.served) as running:
        transport = httpx.ASGITransport(make_app(EngineClient.within(running.server)))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
            for path in ("/metrics", "/steps", "/steps/0"):
                found = 404 if path == "/steps/0" else 200  # no step so far
                shown = await http.get(path, headers={"authorization": f"Bearer {key}"})
                assert shown.status_code == found, path
                assert (await http.get(path)).status_code == (401 if host == "0.0.0.0" else found), path
            assert [(await http.get(path)).status_code for path in ("/health", "/ready", "/")] == [200] * 3


def test_clients_cannot_make_counters_without_end() -> None:
    metrics = Metrics()
    for speed in range(1, 3 * MAX_SLO_CLASSES):
        metrics.opened(Slo(float(speed)))
        metrics.ended(Slo(float(speed)), DraftCounters(), "stop", True, 100.0)
    assert len(metrics.attainment) == MAX_SLO_CLASSES + 1
    assert metrics.attainment["other"] == [2 * MAX_SLO_CLASSES - 1, 0]


def test_sessions_without_an_slo_do_not_count_as_met() -> None:
    metrics, counters = Metrics(), DraftCounters()
    for slo in (Slo.of(None), Slo(9.0)):
        metrics.opened(slo)
    for slo, met in ((Slo.of(None), True), (Slo.of(None), True), (Slo(4.0), False), (Slo(4.0), True)):
        metrics.ended(slo, counters, "stop", met, 100.0)
    assert metrics.attainment == {"4": [1, 1]}
    assert (metrics.sessions_met_slo, metrics.sessions_ended) == (1, 2)
    text = metrics.text().decode()
    assert 'slo_attained_total{slo_class="4"} 1.0' in text
    # Both counters exist before anything is counted: an alert on their rates sees the first miss.
    assert 'slo_attained_total{slo_class="9"} 0.0' in text
    assert 'slo_violations_total{slo_class="9"} 0.0' in text
    # What is not known is no number.
    for name in ("time_drift_ratio", "time_bound_scale", "time_bound_coverage"):
        assert f"step_{name} NaN" in text
    assert 'slo_class="none"' not in text
    metrics.ended(Slo.of(None, 500.0), counters, "stop", True, 100.0)
    assert metrics.attainment["ttft"] == [1, 0]


def record(number: int) -> StepRecord:
    return StepRecord(123_456.0 + 5.0 * number, 200, 420, 20, 12.345, 15.678, 13.21, 380, "full", "", 2)


def crowd(sessions: int, steps: int) -> Any:
    """What :func:`server_state` reads of a server, without one."""
    engine = FakeEngine()
    metrics = Metrics()
    for number in range(steps):
        metrics.steps.append(record(number))
    metrics.steps_seen = 7_000 + steps
    from wispprof.server.session import ServerSession
    from wispprof.sessions.session_state import SessionState

    made = []
    for number in range(sessions):
        state = SessionState(
            f"s{number + 10_000}", [1] * 900, slo=Slo(8.0 + number % 3, 500.0), max_new=200, max_context=4096,
            now_ms=123_000.0 + number, stream=True,
        )  # fmt: skip
        listener = SimpleNamespace(key="", kind=f"device-{number % 3}")
        made.append(ServerSession(state, Sampling(), listener, number, 0.0, opened=True))  # type: ignore[arg-type]
    manager = SimpleNamespace(sessions=made, kv_total=1 << 20, load_level=3, waiting=7)
    times = SimpleNamespace(drift=None, learning=True, ratio=1.01)
    return SimpleNamespace(
        manager=manager, metrics=metrics, step_times=times, now_ms=lambda: 124_456.0, run_id="abcd1234",
        state="ok", model=engine.served, policy=SimpleNamespace(name="wispprof", stream=True), plan=None,
        batch_row=None, kv_free=1 << 19,
    )  # fmt: skip


def test_two_hundred_sessions_and_steps_of_a_second_fit_in_30_kb() -> None:
    data = module.server_state(crowd(200, 200), 7_000)
    assert len(data) < 30_000
    found = json.loads(data)
    assert len(found["sessions"]["session"]) == 200
    assert len(found["steps"]["number"]) == 200
    assert found["steps"]["draft_tokens"][0] == 420 - 20 - 198


def test_of_more_sessions_those_with_the_least_slack_are_shown() -> None:
    found = json.loads(module.server_state(crowd(500, 0)))["sessions"]
    assert found["all"] == 500
    assert len(found["slack_ms"]) == module.MAX_SESSIONS
    assert found["slack_ms"] == sorted(found["slack_ms"])


@pytest.mark.parametrize("held", [0, 1, 199, 200, 201, 5000])
def test_of_more_steps_every_nth_is_sent_and_always_the_last(held: int) -> None:
    steps = json.loads(module.server_state(crowd(0, held)))["steps"]
    assert len(steps["number"]) <= module.MAX_STEPS
    assert steps["next"] == 7_000 + held
    if held:
        assert steps["number"][-1] == 7_000 + held - 1
        gaps = {b - a for a, b in zip(steps["number"], steps["number"][1:], strict=False)}
        assert gaps <= {steps["every"]}


def test_clients_cannot_flood_the_metrics_with_kinds() -> None:
    server = crowd(400, 0)
    for number, session in enumerate(server.manager.sessions):
        session.listener.kind = f"x{number}"
    module.update_gauges(server)
    samples = server.metrics.open_sessions.collect()[0].samples
    assert len({one.labels["kind"] for one in samples}) == MAX_KINDS + 1
    assert sum(one.value for one in samples) == 400
    assert len(json.loads(module.server_state(server))["kinds"]) == MAX_KINDS + 1


def test_a_kind_stays_for_ten_minutes_after_its_last_session() -> None:
    """With what became of its drafts; in number no more kinds than are named."""
    sessions = crowd(3 * 40, 0).manager.sessions
    kinds = DeviceKinds()
    for number, session in enumerate(sessions):
        session.listener.kind = f"x{number % 40}"
        session.state.counters.drafted, session.state.counters.wasted = 5, 3
        session.state.counters.dropped["epoch"] = 2
        kinds.ended(session, 1000.0 + number)
    shown = kinds.table([], 601_000.0 + 40)
    assert len(shown) == MAX_KINDS
    assert shown[0] == {
        "kind": "x39", "open": 0, "drafting": 0, "tokens": 0,
        "drafted": 5, "accepted": 0, "matched": 0, "wasted": 3, "cut": 0, "dropped": {"epoch": 2},
    }  # fmt: skip
    [open_again, *_] = kinds.table(sessions[-1:], 601_000.0)
    assert (open_again["kind"], open_again["open"], open_again["drafted"]) == ("x39", 1, 10)
    assert len(kinds.table([], 601_000.0 + 110)) == 10
    assert kinds.table([], 602_000.0) == []


async def test_nothing_is_computed_unless_somebody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("wispprof.server.engine_host.server_state", lambda *_: asked.append(1) or b"{}")
    engine = FakeEngine()
    async with (
        running_server(ServerSettings(admit="all"), engine=engine, model=replace(engine.served)) as running,
        EdgeClient(websocket_connections(running.split_url)) as client,
        httpx.AsyncClient() as http,
    ):
        await Generation(client, GenerationRequest((1, 2), 20)).run()
        assert not asked
        page = await http.get(running.http_url)
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert not asked
        await http.get(f"{running.http_url}/dashboard")
        assert asked == [1]
