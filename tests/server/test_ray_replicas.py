"""Replicas: their number by load level; and, if Ray is installed, sessions that survive a lost replica."""

from __future__ import annotations

import asyncio
import importlib.util
import socket
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from wispprof.cli import app
from wispprof.errors import RuntimeFault
from wispprof.server.metrics import Metrics
from wispprof.server.ray_replicas import (
    METRIC,
    LoadLevelPolicy,
    _serve_metrics,
    deployment,
    target_replicas,
)
from wispprof.settings.server_settings import ServerSettings

HAVE_RAY = importlib.util.find_spec("ray") is not None

levels = st.lists(st.floats(0, 4), min_size=1, max_size=8)


@given(levels)
def test_more_load_never_means_fewer_replicas(recorded: list[float]) -> None:
    now = len(recorded)
    less = target_replicas(recorded, now, 0.5, 2.0)
    more = target_replicas([min(4.0, level + 0.7) for level in recorded], now, 0.5, 2.0)
    assert more >= less >= 1


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_replicas_metrics_take_the_key_beyond_loopback(host: str) -> None:
    key = "k" * 16
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = ServerSettings(host=host, port=port - 1, api_keys=(key,))
    listener = _serve_metrics(SimpleNamespace(metrics=Metrics()), settings, 0)
    try:
        url, shown = f"http://127.0.0.1:{port}/metrics", {"authorization": f"Bearer {key}"}
        with httpx.Client(trust_env=False) as http:
            assert http.get(url).status_code == (401 if host == "0.0.0.0" else 200)
            assert "wispprof:load_level" in http.get(url, headers=shown).text
    finally:
        listener.shutdown()
        listener.server_close()


@given(levels)
def test_the_remaining_replicas_can_take_the_load(recorded: list[float]) -> None:
    now = len(recorded)
    wanted = target_replicas(recorded, now, 0.5, 2.0)
    if wanted < now:
        assert wanted == now - 1
        assert sum(recorded) / wanted <= 2.0


@pytest.mark.parametrize(
    ("recorded", "wanted"),
    [
        ([0.0], 1),
        ([2.0], 1),
        ([3.0], 2),
        ([4.0], 2),
        ([4, 4], 4),
        ([0, 0], 1),
        ([1, 1], 2),
        ([], 3),
    ],
)
def test_target_replicas(recorded: list[float], wanted: int) -> None:
    assert target_replicas(recorded, len(recorded) or 3, 0.5, 2.0) == wanted


def test_the_policy_reads_what_replicas_record() -> None:
    policy = LoadLevelPolicy()
    busy = SimpleNamespace(aggregated_metrics={METRIC: {"a": 4.0, "b": 4.0}}, target_num_replicas=2)
    assert policy(busy) == (4, {})
    silent = SimpleNamespace(aggregated_metrics=None, target_num_replicas=2)
    assert policy(silent) == (2, {})
    with pytest.raises(ValueError, match="low < high"):
        LoadLevelPolicy(2.0, 1.0)


def test_without_ray_the_error_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RuntimeFault, match=r"ray\[serve\]"):
        deployment(ServerSettings(target="t"), 2)


@pytest.mark.parametrize(
    "options", [["--tensor-parallel", "2"], ["--port", "0"], ["--live"]], ids=lambda o: o[0]
)
def test_options_that_contradict_ray_are_refused(options: list[str]) -> None:
    done = CliRunner().invoke(app, ["serve", "--ray", *options])
    assert done.exit_code == 2
    assert "Traceback" not in done.output


# --- with Ray -------------------------------------------------------------------------------------


def hash_server(settings: ServerSettings) -> Any:
    from wispprof.server import VerificationServer
    from wispprof.testing.fake_engine import FakeEngine

    engine = FakeEngine(kv_tokens=50_000, step_ms=lambda shape: 4.0)
    return VerificationServer(engine, engine.served, settings)


@pytest.mark.skipif(not HAVE_RAY, reason="needs wispprof[ray]")
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore")
def test_a_session_survives_its_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    # On a busy machine Ray's proxy needs longer to start than Ray Serve waits before it kills it (5 s).
    monkeypatch.setenv("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "120")
    monkeypatch.setenv("RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S", "120")
    import ray
    from ray import cloudpickle, serve

    cloudpickle.register_pickle_by_value(__import__(__name__))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    settings = replace(ServerSettings(target="hash", admit="all"), port=port)
    ray.init(include_dashboard=False, num_cpus=2, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(deployment(settings, 2, build=hash_server, cpus=0.1), name="w", route_prefix="/")
        assert asyncio.run(_generate_while_one_dies(port)) == []
    finally:
        serve.shutdown()
        ray.shutdown()


async def _generate_while_one_dies(port: int) -> list[int]:
    """Numbers of the edges whose text was wrong."""
    import ray

    from wispprof.edge import EdgeClient, Generation, websocket_connections
    from wispprof.edge import GenerationRequest as Request
    from wispprof.settings.edge_settings import ClientSettings
    from wispprof.testing.fake_engine import FakeTarget

    target = FakeTarget(256)
    prompts = [(3 + i, 7, 11) for i in range(4)]
    wanted = [target.generate(prompt, 400) for prompt in prompts]
    half = asyncio.Event()

    async def edge(number: int) -> list[int]:
        settings = ClientSettings(name=str(number))
        async with EdgeClient(websocket_connections(f"127.0.0.1:{port}"), settings) as client:
            generation = Generation(client, Request(prompts[number], 400))
            task = asyncio.create_task(generation.run())
            while len(generation.output) < 100 and not task.done():
                await asyncio.sleep(0.005)
            half.set()
            await task
            return list(generation.output)

    edges = [asyncio.create_task(edge(i)) for i in range(len(prompts))]
    await half.wait()
    named = ray.util.list_named_actors(all_namespaces=True)
    replica = min(one["name"] for one in named if one["name"].startswith("SERVE_REPLICA"))
    ray.kill(ray.get_actor(replica, namespace="serve"))
    found = await asyncio.gather(*edges)
    return [i for i, text in enumerate(found) if text != wanted[i]]
