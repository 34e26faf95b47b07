"""What a long prompt does to sessions that decode, under ``fcfs`` and under ``wispprof``."""

from __future__ import annotations

import asyncio
import itertools
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from _serving.bed import Bed, load_of, running
from _serving.tables import show
from wispprof.artifacts import AcceptanceTrace, load_trace
from wispprof.reporting.tables import Column, Table
from wispprof.settings.fleet_settings import BenchSettings
from wispprof.simulation import system
from wispprof.types import GenerationRequest, Slo


def interference(bed: Bed, repeats: int) -> dict[str, Any]:
    """A long prompt among sessions that decode, under fcfs and under wispprof."""
    sessions, length = 12, 1500
    rows = []
    for name in ("fcfs", "wispprof"):
        runs = [asyncio.run(_interfere(bed, name, sessions, length)) for _ in range(repeats)]
        rows.append((name, *(statistics.median(figures) for figures in zip(*runs, strict=True))))
    columns = (
        Column("policy"),
        Column("worst gap before", "ms", best="min"),
        Column("worst gap with the newcomer", "ms", best="min"),
        Column("TTFT of the newcomer", "ms", best="min"),
    )
    show(Table(f"{length} prompt tokens arrive while {sessions} sessions decode", columns, tuple(rows)))
    gaps = {row[0]: round(row[2], 1) for row in rows}
    return {
        "worst_gap_ms": gaps,
        "worst_gap_before_ms": {row[0]: round(row[1], 1) for row in rows},
        "ttft_ms": {row[0]: round(row[3], 1) for row in rows},
        "gap_ratio": round(gaps["wispprof"] / gaps["fcfs"], 3),
    }


async def _interfere(bed: Bed, name: str, sessions: int, length: int) -> tuple[float, ...]:
    what = system(name)
    load = replace(load_of(bed, what.label, sessions), tokens_per_s=(bed.mix.speeds[0],))
    async with running(bed, what.make_batching()) as served:
        return await bed.fleet.call(disturb, load, served.split_url, bed.trace_file, length)


def disturb(load: BenchSettings, url: str, trace: Path, length: int) -> tuple[float, ...]:
    """In the fleet's process: (worst gap before, worst gap while the newcomer reads, its TTFT); ms."""
    return asyncio.run(_disturb(load, url, load_trace(trace), length))


async def _disturb(load: BenchSettings, url: str, trace: AcceptanceTrace, length: int) -> tuple[float, ...]:
    from wispprof.bench.fleet import _Fleet
    from wispprof.edge.client import EdgeClient
    from wispprof.edge.generation import Generation

    fleet = _Fleet(load, url, trace, None, None)
    clients = [
        EdgeClient(fleet._connection_factory(i), fleet._client_settings(i)) for i in range(load.devices + 1)
    ]
    for client in clients:
        await client.__aenter__()
    loop = asyncio.get_running_loop()
    commits: list[list[float]] = [[] for _ in range(load.devices)]
    going = asyncio.Event()

    async def decode(number: int) -> None:
        path = trace.paths[number % len(trace.paths)]
        request = GenerationRequest(path.prompt, len(path.path), trace.sampling, Slo(load.tokens_per_s[0]))
        worker, controller = fleet._make_drafting(number, path, clients[number])
        generation = Generation(clients[number], request, worker, controller, fleet.drafting)
        async for _ in generation.stream():
            commits[number].append(loop.time() * 1000.0)
            if all(len(times) >= 4 for times in commits):
                going.set()
        going.set()

    running = [asyncio.create_task(decode(i)) for i in range(load.devices)]
    await going.wait()
    begun = loop.time() * 1000.0
    prompt = [token for path in trace.paths for token in (*path.prompt, *path.path)]
    prompt = (prompt * (1 + length // len(prompt)))[:length]
    newcomer = Generation(
        clients[-1], GenerationRequest(tuple(prompt), 2, trace.sampling, Slo(load.tokens_per_s[0]))
    )
    stats = await newcomer.run()
    ttft = stats.first_ms or math.nan
    await asyncio.gather(*running)
    for client in clients:
        await client.__aexit__(None, None, None)
    before, during = [0.0], [0.0]
    for times in commits:
        # The newcomer's reading meets a gap that overlaps it; its first token ends the reading.
        for left, right in itertools.pairwise(times[1:]):
            if right <= begun:
                before.append(right - left)
            elif left < begun + ttft:
                during.append(right - left)
    return max(before), max(during), ttft
