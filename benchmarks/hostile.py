"""What careless and hostile clients cost the others: large requests, half-open requests, unread replies.

Physics: one event loop reads all sockets. What it parses before it knows the key, and what it keeps for
clients that never finish, everybody pays. So a server process with a fake engine (5 ms a step) is attacked
from a second process, and a third asks `/health`, which needs nothing but the event loop, every few
milliseconds, before and during each attack. Memory is the resident set of the server's processes. A keyed and
a keyless server are attacked in one run. With fewer than three free cores, compare with the quiet row.

    python benchmarks/hostile.py [--seconds 5] [--half-open 1000]

The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import AsyncIterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import httpx
import psutil
from websockets.asyncio.client import connect

from wispprof import protocol
from wispprof.testing.fake_engine import FakeEngine

KEY = "the-key-of-this-benchmark"
BODY_BYTES = 100 << 20
STOP_BYTES = 5 << 20
PROMPT, TOKENS = "a normal client", 64


def run_server(keyed: bool, port: Connection) -> None:
    from wispprof.openai_api import ChatTokenizer
    from wispprof.openai_api.tokenizer import ByteTokenizer
    from wispprof.server import serve
    from wispprof.server.logs import configure_logging
    from wispprof.settings.server_settings import ServerSettings

    configure_logging("error")
    engine = FakeEngine(128, step_ms=lambda shape: 5.0)
    # Within one process attacks are felt most, and the fake tokenizer cannot be loaded by another one.
    keys = (KEY,) if keyed else ()
    settings = ServerSettings(port=0, api_keys=keys, admit="all", fronts=0)
    tokenizer = ChatTokenizer(ByteTokenizer())
    parts = {"engine": engine, "model": engine.served, "tokenizer": tokenizer}
    serve(settings, lambda server, taken: port.send(taken), **parts)


@contextlib.asynccontextmanager
async def server_process(keyed: bool) -> AsyncIterator[tuple[int, psutil.Process]]:
    """A server's port and process."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=run_server, args=(keyed, theirs))
    process.start()
    try:
        port = await asyncio.to_thread(ours.recv)
        yield port, psutil.Process(process.pid)
    finally:
        process.terminate()
        await asyncio.to_thread(process.join, 10.0)


class Watch:
    """Latency of ``/health`` over a new connection each time, and the server's peak memory."""

    def __init__(self, port: int, process: psutil.Process) -> None:
        self._port, self._process = port, process

    async def during(
        self, attack: str, seconds: float, count: int
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """(figures, what the attack found). It runs in a process of its own."""
        begin_mb = self._memory_mb()
        task = None
        if attack != "quiet":
            work = asyncio.to_thread(attack_process, attack, self._port, seconds, count)
            task = asyncio.create_task(work)
        times, peak_mb, end = [], begin_mb, time.perf_counter() + seconds
        while time.perf_counter() < end or (task is not None and not task.done()):
            begin = time.perf_counter()
            status, _ = await ask(self._port, b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
            assert status == 200, status
            times.append((time.perf_counter() - begin) * 1000.0)
            peak_mb = max(peak_mb, self._memory_mb())
            await asyncio.sleep(0.005)
        found = await task if task is not None else {}
        figures = {
            "p50_ms": statistics.median(times),
            "p99_ms": statistics.quantiles(times, n=100)[98],
            "max_ms": max(times),
            "memory_mb": peak_mb - begin_mb,
        }
        return {name: round(value, 2) for name, value in figures.items()}, found

    def _memory_mb(self) -> float:
        own = [self._process, *self._process.children(recursive=True)]  # the front is a process of its own
        return sum(float(one.memory_info().rss) for one in own) / 2**20


async def ask(port: int, head: bytes, body: bytes = b"") -> tuple[int, float]:
    """Status and time to it in ms. A body is sent while the status is awaited, as curl does."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    begin = time.perf_counter()

    async def send() -> None:
        writer.write(head)
        for start in range(0, len(body), 1 << 16):
            writer.write(body[start : start + (1 << 16)])
            await writer.drain()

    sending = asyncio.create_task(send())
    try:
        line = await reader.readline()
        status_ms = (time.perf_counter() - begin) * 1000.0
        return int(line.split()[1]), status_ms
    finally:
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        writer.transport.abort()


def head(length: int, key: str = "") -> bytes:
    shown = f"authorization: Bearer {key}\r\n" if key else ""
    return (
        f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n{shown}"
        f"content-type: application/json\r\ncontent-length: {length}\r\n\r\n"
    ).encode()


# --- attacks --------------------------------------------------------------------------------------


async def large_requests(port: int, seconds: float) -> dict[str, Any]:
    """Four clients send 100 MB body without a key, one after the other."""
    body = b'{"prompt": "' + b"x" * BODY_BYTES
    answers: list[tuple[int, float]] = []

    async def client() -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            answers.append(await ask(port, head(len(body)), body))

    await asyncio.gather(*(client() for _ in range(4)))
    return {
        "answers": len(answers),
        "statuses": sorted({status for status, _ in answers}),
        "status_p99_ms": round(statistics.quantiles([ms for _, ms in answers], n=100)[98], 2),
    }


async def half_open(port: int, count: int) -> dict[str, Any]:
    """``count`` connections send half a request each; then a normal client asks."""
    lines = (b"", b"POST /v1/comp", b"GET /health HTTP/1.1\r\nhost: loc", head(1000)[:-2], head(1000) + b"x")
    opened = []
    for number in range(count):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(lines[number % len(lines)])
        opened.append(writer)
    try:
        return {"open": len(opened), **await normal_client(port)}
    finally:
        for writer in opened:
            writer.transport.abort()


async def normal_client(port: int) -> dict[str, Any]:
    wanted = bytes(FakeEngine(128).target.generate(list(PROMPT.encode()), TOKENS)).decode()
    body = {"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    auth = {"authorization": f"Bearer {KEY}"}
    begin = time.perf_counter()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=auth, timeout=60.0) as client:
        answer = await client.post("/v1/completions", json=body)
    seconds = time.perf_counter() - begin
    exact = answer.status_code == 200 and answer.json()["choices"][0]["text"] == wanted
    return {"exact": exact, "client_s": round(seconds, 2)}


async def many_stops(port: int) -> dict[str, Any]:
    """5 MB of stop strings, with the key."""
    body = json.dumps({"prompt": "a", "stop": ["x" * 5000] * (STOP_BYTES // 5004)}).encode()
    status, status_ms = await ask(port, head(len(body), KEY), body)
    return {"statuses": [status], "status_p99_ms": round(status_ms, 2)}


async def unread_pongs(port: int) -> dict[str, Any]:
    """16 edges ask for 64 KiB pongs and read none of them."""
    ping = protocol.encode(protocol.Ping(1, b"", 1 << 16))

    async def deaf() -> None:
        async with connect(f"ws://127.0.0.1:{port}/v1/split", compression=None, max_queue=1) as socket:
            await socket.send(protocol.encode(protocol.Hello(protocol.PROTOCOL_VERSION, "", "", KEY)))
            socket.transport.pause_reading()
            with contextlib.suppress(Exception):
                for _ in range(1000):
                    await asyncio.wait_for(socket.send(ping), 1.0)
            socket.transport.abort()

    await asyncio.gather(*(deaf() for _ in range(16)), return_exceptions=True)
    return {"edges": 16}


ATTACKS = {
    "100 MB body": lambda port, seconds, count: large_requests(port, seconds),
    "half-open": lambda port, seconds, count: half_open(port, count),
    "5 MB of stop": lambda port, seconds, count: many_stops(port),
    "unread pongs": lambda port, seconds, count: unread_pongs(port),
}


def attack_process(name: str, port: int, seconds: float, count: int) -> dict[str, Any]:
    """Run an attack in another process; what it found."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=run_attack, args=(name, port, seconds, count, theirs))
    process.start()
    try:
        found: dict[str, Any] = ours.recv() if ours.poll(120.0) else {"failed": "no answer for 120 s"}
    finally:
        process.kill()
        process.join()
    return found


def run_attack(name: str, port: int, seconds: float, count: int, found: Connection) -> None:
    found.send(asyncio.run(ATTACKS[name](port, seconds, count)))


async def attacked(keyed: bool, seconds: float, count: int) -> dict[str, dict[str, Any]]:
    """Figures of every attack on one server."""
    rows = {}
    async with server_process(keyed) as (port, process):
        await normal_client(port)
        watch = Watch(port, process)
        for name in ("quiet", *ATTACKS):
            figures, found = await watch.during(name, seconds, count)
            rows[name] = {**figures, **found}
            times = " ".join(f"{figures[key]:>8.1f}" for key in ("p50_ms", "p99_ms", "max_ms", "memory_mb"))
            shown = ", ".join(f"{key} {value}" for key, value in found.items())
            server = "keyed" if keyed else "keyless"
            print(f"{server:>8} {name:>14} {times}  {shown}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--half-open", type=int, default=1000)
    arguments = parser.parse_args()
    print(f"{'server':>8} {'attack':>14} {'p50 ms':>8} {'p99 ms':>8} {'max ms':>8} {'+MB':>8}  found")
    results = {
        name: asyncio.run(attacked(keyed, arguments.seconds, arguments.half_open))
        for name, keyed in (("keyed", True), ("keyless", False))
    }
    print(json.dumps({"benchmark": "hostile", **results}))


if __name__ == "__main__":
    main()
