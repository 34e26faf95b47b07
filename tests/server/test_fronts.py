"""Connections in a process of their own: what passes the channel, and what a killed front costs."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys

import httpx
import pytest
from fake_pair import Letters, drafting, edge, truth

from wispprof.artifacts import bundled_model
from wispprof.edge import websocket_connections
from wispprof.engines.tokenizers import load_tokenizer
from wispprof.openai_api import ChatTokenizer
from wispprof.server import running_server
from wispprof.server.channel import DirectWriter, Outbox, SessionReused, SocketWriter, Stop, ToFront, to_front
from wispprof.server.fronts import FrontProcesses, TokenizerStays
from wispprof.settings.server_settings import ServerSettings
from wispprof.testing.fake_engine import FakeEngine
from wispprof.types import BatchShape

SETTINGS = ServerSettings(admit="all", prefix_cache_sessions=0, log_level="error")


def slow(shape: BatchShape) -> float:
    return 2.0


async def test_a_killed_front_is_started_again_and_edges_resume() -> None:
    engine = FakeEngine(step_ms=slow)
    prompts = [[1, 2, n] for n in range(6)]
    async with running_server(SETTINGS, engine=engine, model=engine.served, front_process=True) as running:
        metrics = running.server.metrics
        assert isinstance(running.front, FrontProcesses)
        [front] = running.front.processes
        killed = front.pid
        async with edge(websocket_connections(running.split_url)) as client:
            generations = [drafting(client, prompt, max_new=160) for prompt in prompts]
            tasks = [asyncio.create_task(one.run()) for one in generations]
            while metrics.steps_seen < 12:
                await asyncio.sleep(0.001)
            os.kill(killed, signal.SIGKILL)
            await asyncio.gather(*tasks)
            assert [list(one.output) for one in generations] == [truth(p, 160) for p in prompts]
            assert front.pid != killed
            while len(running.server.manager):
                await asyncio.sleep(0.001)
            assert metrics.connections._value.get() == 1
        await running.server.check_integrity()


async def test_text_and_pages_pass_the_channel() -> None:
    tokenizer = ChatTokenizer(load_tokenizer(bundled_model("target")))
    engine = FakeEngine(4096)
    parts = {"engine": engine, "model": engine.served, "tokenizer": tokenizer}
    async with (
        running_server(SETTINGS, **parts, front_process=True) as running,  # type: ignore[arg-type]
        httpx.AsyncClient(base_url=running.http_url, timeout=30.0) as client,
    ):
        body = {"prompt": "def f(", "max_tokens": 12, "temperature": 0}
        answer = (await client.post("/v1/completions", json=body)).json()
        wanted = tokenizer.decode(engine.target.generate(tokenizer.encode("def f("), 12))
        assert answer["choices"][0]["text"] == wanted.rstrip("\ufffd")
        refused = await client.post("/v1/completions", json={**body, "prompt": "a " * 5000})
        assert refused.status_code == 400
        assert "at most" in refused.text
        assert (await client.get("/health")).json()["status"] == "ok"
        assert "wispprof:generation_tokens_total 12.0" in (await client.get("/metrics")).text
        await running.server.drain(1.0)
        assert (await client.get("/ready")).status_code == 503
        assert (await client.post("/v1/completions", json=body)).status_code == 503


async def test_batches_keep_their_order_however_they_are_cut() -> None:
    got: list[ToFront] = []
    end = SocketWriter(lambda data: got.extend(to_front.decode(data)), lambda: None)
    sent = bytearray()

    class Wire(asyncio.Transport):
        def write(self, data: bytes | bytearray | memoryview) -> None:
            sent.extend(data)

    start = SocketWriter(lambda data: None, lambda: None)
    start.connection_made(Wire())
    outbox: Outbox[ToFront] = Outbox(start)
    wanted = [SessionReused(n, n * n) for n in range(50)]
    for number, message in enumerate(wanted):
        outbox.put(message)
        if number % 7 == 0:
            outbox.flush()
    outbox.put(Stop())
    await asyncio.sleep(0)
    for byte in bytes(sent):
        end.data_received(bytes([byte]))
    assert got == [*wanted, Stop()]


async def test_a_message_that_cannot_be_sent_costs_no_other_one_anything() -> None:
    batches: list[bytes] = []
    outbox: Outbox[ToFront] = Outbox(DirectWriter(batches.append))
    outbox.put(SessionReused(1, 2))
    with pytest.raises(OverflowError):
        outbox.put(SessionReused(1, 1 << 64))
    outbox.put(Stop())
    while not batches:
        await asyncio.sleep(0)
    assert [to_front.decode(batch) for batch in batches] == [[SessionReused(1, 2), Stop()]]


@pytest.mark.parametrize("since", [0, -5, 1 << 63, 10**30])
async def test_steps_since_any_number(since: int) -> None:
    engine = FakeEngine()
    async with (
        running_server(SETTINGS, engine=engine, model=engine.served) as running,
        httpx.AsyncClient(base_url=running.http_url) as client,
    ):
        page = (await client.get(f"/steps?since={since}")).json()
        assert (page["next"], page["steps"]) == (0, [])


@pytest.mark.parametrize("own_process", [False, True])
async def test_a_front_ends_with_its_server(own_process: bool) -> None:
    engine = FakeEngine()
    async with running_server(
        SETTINGS, engine=engine, model=engine.served, front_process=own_process
    ) as running:
        url, front = running.http_url, running.front
        async with httpx.AsyncClient() as client:
            assert (await client.get(f"{url}/ready")).status_code == 200
    if isinstance(front, FrontProcesses):
        with pytest.raises(ProcessLookupError):
            os.kill(front.processes[0].pid, 0)
    async with httpx.AsyncClient() as client:
        with pytest.raises(httpx.ConnectError):
            await client.get(f"{url}/ready")


_LOADS_TOKENIZER = """
import sys
from pathlib import Path
from wispprof.artifacts import bundled_model
from wispprof.server import front_process
front_process.without_torch()
tokenizer = front_process._tokenizer(str(bundled_model("target")))
assert len(tokenizer.encode("def f(x):")) > 2
print(sum(name.split(".")[0] == "torch" and module is not None for name, module in sys.modules.items()))
"""


def test_a_front_process_loads_its_tokenizer_without_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _LOADS_TOKENIZER], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["0"]
    assert not done.stderr


async def test_a_tokenizer_that_cannot_be_saved_stays_in_the_engine_process() -> None:
    engine = FakeEngine()
    with pytest.raises(TokenizerStays):
        async with running_server(
            SETTINGS,
            engine=engine,
            model=engine.served,
            tokenizer=ChatTokenizer(Letters()),
            front_process=True,
        ):
            raise AssertionError("it serves")
