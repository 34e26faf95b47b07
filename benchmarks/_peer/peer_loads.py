"""Closed fleets of devices: HTTP clients that cost little CPU, or drafting edges, in a process of their own.

An HTTP client stores what arrives and reads it after the load has ended.
"""

from __future__ import annotations

import asyncio
import json
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from wispprof.artifacts import AcceptanceTrace, load_trace
from wispprof.bench import run_bench
from wispprof.bench.bench_result import MetricsWatch
from wispprof.settings.fleet_settings import BenchSettings
from wispprof.settings.shared_settings import LinkModel
from wispprof.simulation.devices import device_of

_TOKENS = re.compile(rb'(?<!prompt_)token_ids": ?\[([0-9, ]*)\]')
_DONE, _EVENT = b"data: [DONE]", b"data: {"


@dataclass(frozen=True)
class Load:
    """Who asks, for what. ``slo``: classes in tokens/s, which devices take in turn. ``rtt_ms``, ``device``:
    link and drafting speed of edges."""

    trace: Path
    devices: int
    requests: int
    tokens: int
    slo: tuple[float, ...]
    rtt_ms: float
    device: str


@dataclass(frozen=True)
class Answer:
    """One request: output tokens, time to the first, and time per token after it."""

    tokens: int
    ttft_ms: float
    tpot_ms: float
    met: bool
    exact: bool


def figures(answers: list[Answer], seconds: float, client_s: float) -> dict[str, float]:
    """What the users saw, and the CPU that the clients took."""
    return {
        "attainment": sum(one.met for one in answers) / len(answers),
        "goodput": sum(one.tokens for one in answers if one.met) / seconds,
        "tokens_per_s": sum(one.tokens for one in answers) / seconds,
        "ttft_ms": statistics.median(one.ttft_ms for one in answers),
        "tpot_ms": statistics.median(one.tpot_ms for one in answers),
        "exact": sum(one.exact for one in answers) / len(answers),
        "seconds": seconds,
        "client_cores": client_s / seconds,
    }


# --- HTTP -----------------------------------------------------------------------------------------


class _Connection(asyncio.Protocol):
    """One kept-alive connection: a request at a time, its bytes stored as they come."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport
        self._ended: asyncio.Future[float]
        self.received = bytearray()
        self.first_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        held = self.received
        held += data
        if not self.first_s and _EVENT in held:
            self.first_s = time.perf_counter()
        if _DONE in held[-len(data) - len(_DONE) :] and not self._ended.done():
            self._ended.set_result(time.perf_counter())

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._ended.done():
            self._ended.set_exception(RuntimeError(f"connection lost: {bytes(self.received[:500])!r}"))

    def send(self, request: bytes) -> asyncio.Future[float]:
        """The time at which the last event has come."""
        self.received, self.first_s = bytearray(), 0.0
        self._ended = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._ended

    def close(self) -> None:
        self._ended.cancel()
        self._transport.close()


async def _over_http(address: str, load: Load, trace: AcceptanceTrace, watch: bool) -> dict[str, float]:
    host, port = address.split(":")
    loop, paths, requests = asyncio.get_running_loop(), trace.paths, []
    for path in paths:
        # No seed: one for each request slows vLLM's sampler down.
        body = json.dumps(
            {
                "model": "target",
                "prompt": list(path.prompt),
                "max_tokens": min(load.tokens, len(path.path)),
                "temperature": trace.sampling.temperature,
                "stream": True,
                "ignore_eos": True,
                "return_token_ids": True,
            }
        ).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\n"
        requests.append(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    stored: list[tuple[int, int, float, float, float, bytearray]] = []

    async def device(number: int) -> None:
        _, connection = await loop.create_connection(_Connection, host, int(port))
        for request in range(load.requests):
            index = (number + request * load.devices) % len(paths)
            sent_s = time.perf_counter()
            last_s = await connection.send(requests[index])
            stored.append((number, index, sent_s, connection.first_s, last_s, connection.received))
        connection.close()

    watching = MetricsWatch(f"ws://{address}") if watch else None
    if watching is not None:
        await watching.begin()
    begin, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(device(number) for number in range(load.devices)))
    seconds, used = time.perf_counter() - begin, time.process_time() - cpu
    steps = [] if watching is None else (await watching.end())[0]
    answers = []
    for number, index, sent_s, first_s, last_s, received in stored:
        tokens = [int(t) for found in _TOKENS.findall(received) for t in found.split(b",") if t.strip()]
        path = paths[index].path[: load.tokens]
        tpot_ms = (last_s - first_s) * 1000 / max(1, len(path) - 1)
        met = tpot_ms <= 1000 / load.slo[number % len(load.slo)]
        if len(tokens) != len(path):
            raise RuntimeError(f"{len(tokens)} of {len(path)} tokens: {bytes(received[:300])!r}")
        answers.append(Answer(len(path), (first_s - sent_s) * 1000, tpot_ms, met, tokens == list(path)))
    found = figures(answers, seconds, used)
    return found if not steps else {**found, "step_ms": statistics.median(ms for _, _, ms in steps)}


# --- edges ----------------------------------------------------------------------------------------


async def _over_edges(address: str, load: Load, trace: AcceptanceTrace) -> dict[str, float]:
    settings = BenchSettings(
        system="wispprof",
        device=(device_of(load.device),),
        link=LinkModel(rtt_ms=load.rtt_ms),
        devices=load.devices,
        tokens_per_s=load.slo,
        requests=load.requests,
        max_new=load.tokens,
        ramp_ms=0.0,
    )
    cpu = time.process_time()
    result = await run_bench(settings, address, trace)
    used = time.process_time() - cpu
    if result.errors:
        raise RuntimeError(f"requests of edges failed: {result.errors}")
    answers = []
    for one in result.results:
        stats = one.stats
        tpot_ms = stats.tpot_ms or 0.0
        met = tpot_ms <= 1000 / one.slo.tokens_per_s
        answers.append(Answer(stats.tokens, stats.first_ms or 0.0, tpot_ms, met, one.lossless))
    found = figures(answers, result.figures["seconds"], used)
    steps = result.figures
    per_step = steps["tokens_per_s"] * steps["seconds"] / max(1.0, steps.get("steps", 0.0))
    return {
        **found,
        "accepted": steps["accepted_per_round"],
        "acceptance": steps["acceptance"],
        "step_ms": steps.get("step_p50_ms", float("nan")),
        "tokens_per_step": per_step,
    }


def run_load(system: str, address: str, load: Load) -> dict[str, float]:
    """Load a server; called in a process of its own."""
    from wispprof.bench.fleet import run_high_res

    trace = load_trace(load.trace)
    if system == "e":
        return run_high_res(_over_edges(address, load, trace), load.devices)
    return run_high_res(_over_http(address, load, trace, system == "d"), load.devices)
