"""Every system on one real server under one load, beside the simulator's answer to the same question.

    python benchmarks/serving.py                  # six systems, three loads, simulator beside each
    python benchmarks/serving.py --quick          # less of everything, under 90 s
    python benchmarks/serving.py --ablation       # wispprof with one piece switched at a time
    python benchmarks/serving.py --interference   # a 1,500-token prompt arrives while 12 sessions decode

Physics. One engine (the bundled target, real forward passes) serves one system after the other; replay
edges propose what the draft would have proposed, after the time their device takes, over an emulated link.
The fleet runs in a process of its own, and one core is left to it, so that drafting costs the engine nothing.

Centralized serving gives each of n sessions ``v(n) = new / (new * step(n) + n * prompt)`` tokens/s, by the
fitted estimator: its own steps, and everybody's prompts in between. The fastest of four SLO classes (in the
ratios 2 : 4 : 6 : 8) is what it gives to n = ``--devices``; that fleet is "near" capacity, 0.6 and 1.5 times
as many are "below" and "above". Draft steps of three kinds of devices take 0.15, 0.4 and 1.0 of a step at
that load, a round trip 0.3. Where a step's time grows with its rows from the first row on (few cores),
drafts can win little: the table then shows who at least does not lose.

Each request's text is compared with the target's own: any difference fails the run. Figures under "(sim)"
are the simulator's with that server's estimator and measured loop overhead, the mean of three seeds; "±" is
their difference in percent of the real ones. Capacity is the simulator's: most devices at 95 % attainment.

"pace" is the run's median of measured over fitted step time. On a quiet machine it is 1; where neighbours or
heat slowed the machine during one run it says which rows not to compare, and the simulator is given the
estimator at that pace, as the server's own drift correction does (``--as-fitted``: not).

The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from wispprof.artifacts import AcceptanceTrace, bundled, load_trace, save_trace
from wispprof.core import BatchShape, Slo
from wispprof.fitting import FittedEstimator, load_estimator, load_predictor
from wispprof.policies.stream import StreamSettings
from wispprof.reporting.tables import Column, Table, to_rich
from wispprof.runtime.bench import BenchResult, BenchSettings, Mix, Twin, run_bench, twin
from wispprof.simulation import ServerModel, System, system
from wispprof.simulation.devices import DeviceProfile
from wispprof.simulation.links import LinkProfile

if TYPE_CHECKING:
    from wispprof.lm.engine import VerifierEngine

SYSTEMS = {
    "centralized": "centralized",
    "sled_static": "sled-threshold",
    "fcfs": "fcfs",
    "specedge_pipeline": "specedge",
    "wisp": "wisp",
    "wispprof": "wispprof",
}
LOADS = {"below": 0.6, "near": 1.0, "above": 1.5}
CLASSES = (0.25, 0.5, 0.75, 1.0)
DRAFT_SHARES = {"fast": 0.15, "medium": 0.4, "slow": 1.0}
MAX_ITEMS, MAX_TOKENS, CHUNK = 64, 1024, 256
LOOP_MS = 2.0
PROMPT = 96


@dataclass
class Bed:
    """What every run needs. ``mix``: devices and promises; ``rtt_ms`` of the emulated link."""

    engine: VerifierEngine
    estimator: FittedEstimator
    predictor: Path
    trace_file: Path
    trace: AcceptanceTrace
    tokenizer: str
    vocab: int
    near: int
    requests: int
    mix: Mix
    rtt_ms: float
    ttft_ms: float
    max_new: int
    as_fitted: bool
    pool: ProcessPoolExecutor


@dataclass(frozen=True)
class Run:
    """One system at one load, really and simulated. ``overhead_ms``: of the loop, between busy steps."""

    name: str
    devices: int
    real: BenchResult
    simulated: Twin
    step_mean_ms: float
    pace: float
    overhead_ms: float

    @property
    def figures(self) -> dict[str, float]:
        return self.real.figures


# --- what is served ------------------------------------------------------------------------------


def artifacts(folder: Path, quick: bool, long: bool) -> None:
    """Profile the server, take a trace, fit: into ``folder``. ``long``: paths that outlast a long prompt."""
    from wispprof.fitting.run import fit_files
    from wispprof.lm.loading import load_model
    from wispprof.profiling.acceptance import TraceSettings, take_trace
    from wispprof.profiling.grids import Axes
    from wispprof.profiling.server import ServerSettings, profile_server
    from wispprof.profiling.session import Output
    from wispprof.profiling.sweep import SweepSettings

    target = load_model(str(bundled.path("models/reference-pair/target")))
    draft = load_model(str(bundled.path("models/reference-pair/draft")))
    axes = Axes(
        items=(1, 4, 8, 16) if quick else (1, 2, 4, 8, 16),
        new=(1, 3, 7),
        cached=(64, 192),
        skew_items=(4, 12),
        chunk=(32, 96, 256),
        chunk_cached=(0,),
        mixed_items=(4, 12),
    )
    least, most, shot_s = (4, 6, 0.2) if quick else (5, 10, 0.4)
    sweep = SweepSettings(
        target=0.06, least=least, most=most, shot_s=shot_s, sentinel_every=12, drift=0.6
    )
    output = Output(folder / "server", overwrite=True)
    profile_server(ServerSettings(axes=axes, sweep=sweep, output=output), loaded=target)
    count, path = (8, 48) if quick else (24, 72)
    path = 192 if long else path
    settings = TraceSettings(count=count, prompt_tokens=PROMPT, path_tokens=path, depth=8)
    save_trace(take_trace(target, draft, settings), folder / "trace.jsonl")
    fit_files(folder, [folder / "server"], [folder / "trace.jsonl"])


def make_bed(folder: Path, arguments: argparse.Namespace, pool: ProcessPoolExecutor) -> Bed:
    """The engine, and a load scaled to it by the estimator."""
    from wispprof.lm.engine import VerifierEngine
    from wispprof.lm.loading import load_model

    estimator = load_estimator(folder / "estimator.json")
    trace = load_trace(folder / "trace.jsonl")
    target = load_model(str(bundled.path("models/reference-pair/target")))
    most = math.ceil(max(LOADS.values()) * arguments.devices)
    engine = VerifierEngine(target, kv_tokens=4096 + 512 * most, max_sessions=2 * most + 16)
    engine.warm_up()
    near, new = arguments.devices, min(len(p.path) for p in trace.paths)
    prompt = round(statistics.fmean(len(p.prompt) for p in trace.paths))
    step_ms = estimator.predict(BatchShape.uniform(near, 1, prompt + new // 2))[0]
    prompt_ms = estimator.predict(BatchShape.of([(prompt, 0, True)]))[0]
    alone = 1000.0 * new / (new * (step_ms + LOOP_MS) + near * prompt_ms)
    kinds = tuple(
        DeviceProfile(name, draft_ms=max(1.5, round(share * step_ms, 1)))
        for name, share in DRAFT_SHARES.items()
    )
    speeds = tuple(float(f"{share * alone:.3g}") for share in CLASSES)
    return Bed(
        engine,
        estimator,
        folder / "predictor.json",
        folder / "trace.jsonl",
        trace,
        target.info.tokenizer_hash,
        target.info.vocab_size,
        near,
        arguments.requests,
        Mix(kinds, speeds),
        round(0.3 * step_ms, 1),
        max(1000.0, 4.0 * near * prompt_ms),
        new,
        arguments.as_fitted,
        pool,
    )


# --- one run -------------------------------------------------------------------------------------


class Watched:
    """A policy that notes when it let the engine rest."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.name, self.stream = inner.name, inner.stream
        self.rested_ms: list[float] = []

    def plan(self, now_ms: float, sessions: Any, estimator: Any, limits: Any) -> Any:
        plan = self._inner.plan(now_ms, sessions, estimator, limits)
        if not plan.members:
            self.rested_ms.append(now_ms)
        return plan


class Steps:
    """Shapes and times of all steps, taken where a step log would be."""

    def __init__(self) -> None:
        self.rows: list[tuple[BatchShape, float]] = []

    def note(self, shape: BatchShape, actual_ms: float) -> None:
        self.rows.append((shape, actual_ms))

    def close(self) -> None: ...

    def pace(self, estimator: FittedEstimator) -> float:
        """Median of measured over predicted."""
        return statistics.median(ms / estimator.predict(shape)[0] for shape, ms in self.rows)


def offer(load: BenchSettings, url: str, trace_file: str) -> BenchResult:
    """In the fleet's process: offer the load."""
    return asyncio.run(run_bench(load, url, load_trace(Path(trace_file))))


def load_of(bed: Bed, label: str, devices: int) -> BenchSettings:
    return BenchSettings(
        system=label,
        devices=devices,
        device=bed.mix.device(devices),
        tokens_per_s=bed.mix.tokens_per_s(devices),
        ttft_ms=bed.ttft_ms,
        requests=bed.requests,
        max_new=bed.max_new,
        link=LinkProfile(rtt_ms=bed.rtt_ms),
        predictor=bed.predictor,
    )


def server_model(bed: Bed, overhead_ms: float, pace: float = 1.0) -> ServerModel:
    """The running server as the simulator sees it."""
    fitted = bed.estimator
    return ServerModel(
        fitted.with_scale(fitted.p50_scale * pace, fitted.bound_scale * pace),
        bed.engine.kv_free,
        MAX_ITEMS,
        MAX_TOKENS,
        CHUNK,
        bed.engine.max_context,
        overhead_ms,
    )


def running(bed: Bed, policy: Any) -> Any:
    from wispprof.runtime.server import ServedModel, ServerSettings, running_server

    model = ServedModel("pair", bed.tokenizer, bed.vocab, bed.engine.max_context)
    settings = ServerSettings(
        admit="all",
        kept_sessions=0,
        max_items=MAX_ITEMS,
        max_tokens=MAX_TOKENS,
        prefill_chunk=CHUNK,
    )
    return running_server(
        settings, engine=bed.engine, model=model, policy=policy, estimator=bed.estimator
    )


async def run(bed: Bed, name: str, what: System, devices: int) -> Run:
    """Serve the load for real, then simulate it."""
    load = load_of(bed, what.label, devices)
    policy = Watched(what.make_batching())
    async with running(bed, policy) as served:
        records = served.server.metrics.steps = deque(maxlen=1 << 17)
        seen = served.server.loop.step_log = Steps()
        real = await asyncio.get_running_loop().run_in_executor(
            bed.pool, offer, load, served.split_url, str(bed.trace_file)
        )
        steps = list(records)
    if not real.lossless or bed.engine.sessions:
        raise SystemExit(f"{name}: texts differ from the target's own, or sessions were left")
    gaps = busy_gaps(steps, policy.rested_ms)
    overhead_ms = statistics.median(gaps) if gaps else LOOP_MS
    pace = seen.pace(bed.estimator)
    simulated = twin(
        load,
        bed.mix,
        what,
        server_model(bed, overhead_ms, 1.0 if bed.as_fitted else pace),
        bed.trace,
        load_predictor(bed.predictor),
    )
    return Run(
        name,
        devices,
        real,
        simulated,
        statistics.fmean(s.actual_ms for s in steps),
        pace,
        overhead_ms,
    )


def busy_gaps(steps: list[Any], rested_ms: list[float]) -> list[float]:
    """Milliseconds from a step's end to the next one's beginning, where the engine was not let rest."""
    gaps = []
    rests = deque(sorted(rested_ms))
    for before, after in itertools.pairwise(steps):
        while rests and rests[0] < before.at_ms:
            rests.popleft()
        if not rests or rests[0] > after.at_ms:
            gaps.append(max(0.0, after.at_ms - after.actual_ms - before.at_ms))
    return gaps


# --- tables --------------------------------------------------------------------------------------


def off(real: float, simulated: float) -> float:
    """Difference in share of the real figure."""
    if math.isnan(real) or math.isnan(simulated):
        return math.nan
    return 0.0 if real == simulated else (simulated - real) / real if real else math.inf


def compared(row: Run) -> dict[str, tuple[float, float]]:
    """Figure by figure: (real, simulated)."""
    figures, sim = row.figures, row.simulated
    return {
        "attainment": (figures["attainment"], sim.attainment),
        "goodput": (figures["goodput_tokens_per_s"], sim.goodput_tokens_per_s),
        "accepted_per_round": (figures["accepted_per_round"], sim.accepted_per_round),
        "step_mean_ms": (row.step_mean_ms, sim.step_mean_ms),
    }


def show(table: Table) -> None:
    from rich.console import Console

    Console(width=max(124, Console().width)).print(to_rich(table))


def comparison(title: str, rows: list[Run]) -> Table:
    return Table(
        title,
        (
            Column("system"),
            Column("kept", "SLO", percent=True, digits=0, best="max"),
            Column("(sim)", percent=True, digits=0),
            Column("±", "%", digits=0),
            Column("goodput", "tok/s", best="max"),
            Column("(sim)", "tok/s"),
            Column("±", "%", digits=0),
            Column("acc.", "/round", digits=2),
            Column("(sim)", digits=2),
            Column("±", "%", digits=0),
            Column("step", "ms"),
            Column("(sim)", "ms"),
            Column("±", "%", digits=0),
            Column("loop", "ms"),
            Column("pace", digits=2),
        ),
        tuple(
            (
                row.name,
                *(
                    cell
                    for real, sim in compared(row).values()
                    for cell in (real, sim, 100.0 * off(real, sim))
                ),
                row.overhead_ms,
                row.pace,
            )
            for row in rows
        ),
    )


def record(row: Run) -> dict[str, Any]:
    found = {
        name: {"real": round(real, 4), "simulated": round(sim, 4), "off": round(off(real, sim), 4)}
        for name, (real, sim) in compared(row).items()
    }
    return {
        "system": row.name,
        "devices": row.devices,
        "requests": int(row.figures["requests"]),
        "seconds": round(row.figures["seconds"], 1),
        "ttft_p95_ms": round(row.figures["ttft_p95_ms"], 1),
        "overhead_ms": round(row.overhead_ms, 2),
        "pace": round(row.pace, 3),
        **found,
    }


# --- the three questions -------------------------------------------------------------------------


def compare(bed: Bed, arguments: argparse.Namespace) -> dict[str, Any]:
    rows: dict[str, list[Run]] = {}
    for load, share in LOADS.items():
        devices = max(1, round(share * bed.near))
        rows[load] = [
            asyncio.run(run(bed, name, system(label), devices)) for name, label in SYSTEMS.items()
        ]
        show(comparison(f"{load} capacity: {devices} devices", rows[load]))
    overhead = {row.name: row.overhead_ms for row in rows["near"]}
    capacity = {
        name: simulated_capacity(bed, system(label), overhead[name])
        for name, label in SYSTEMS.items()
    }
    best = {
        load: max((r for r in found if r.name != "wispprof"), key=_goodput)
        for load, found in rows.items()
    }
    lines = tuple(
        (name, capacity[name], *(_goodput(_of(rows[load], name)) for load in LOADS))
        for name in SYSTEMS
    )
    columns = (
        Column("system"),
        Column("capacity (sim)", "devices", best="max"),
        *(Column(f"goodput {load}", "tok/s", best="max") for load in LOADS),
    )
    show(Table("Capacity and goodput", columns, lines))
    return {
        "loads": {load: [record(r) for r in found] for load, found in rows.items()},
        "capacity_simulated": capacity,
        "wispprof_over_wisp_capacity": round(capacity["wispprof"] / max(1, capacity["wisp"]), 3),
        "wispprof_over_best_other_goodput": {
            load: round(_goodput(_of(rows[load], "wispprof")) / max(1e-9, _goodput(row)), 3)
            for load, row in best.items()
        },
    }


def _of(rows: list[Run], name: str) -> Run:
    return next(row for row in rows if row.name == name)


def _goodput(row: Run) -> float:
    return row.figures["goodput_tokens_per_s"]


def simulated_capacity(bed: Bed, what: System, overhead_ms: float) -> int:
    """Most devices at 95 % attainment: doubling, then halving the interval."""
    predictor = load_predictor(bed.predictor)
    model = server_model(bed, overhead_ms)

    def holds(devices: int) -> bool:
        load = load_of(bed, what.label, devices)
        found = twin(load, bed.mix, what, model, bed.trace, predictor, seeds=(0, 1))
        return found.attainment >= 0.95

    low, high = 0, max(2, bed.near // 2)
    while high < 8 * bed.near and holds(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def ablation(bed: Bed, arguments: argparse.Namespace) -> dict[str, Any]:
    """Each switch of the policy, the other way round from its default."""
    variants: dict[str, dict[str, Any]] = {"wispprof": {}}
    for one in fields(StreamSettings):
        if isinstance(one.default, bool):
            sign = "without" if one.default else "with"
            variants[f"{sign} {one.name}"] = {one.name: not one.default}
    found: dict[str, Any] = {}
    for load in ("near", "above"):
        devices = max(1, round(LOADS[load] * bed.near))
        rows = [
            asyncio.run(run(bed, name, system("wispprof").but(batching_options=options), devices))
            for name, options in variants.items()
        ]
        show(comparison(f"wispprof's pieces, {load} capacity: {devices} devices", rows))
        found[load] = [record(row) for row in rows]
    return {"ablation": found}


def interference(bed: Bed, arguments: argparse.Namespace) -> dict[str, Any]:
    """A long prompt among sessions that decode, under fcfs and under wispprof."""
    sessions, length = 12, 1500
    rows = []
    for name in ("fcfs", "wispprof"):
        runs = [
            asyncio.run(_interfere(bed, name, sessions, length)) for _ in range(arguments.repeats)
        ]
        rows.append((name, *(statistics.median(figures) for figures in zip(*runs, strict=True))))
    columns = (
        Column("policy"),
        Column("worst gap before", "ms", best="min"),
        Column("worst gap with the newcomer", "ms", best="min"),
        Column("TTFT of the newcomer", "ms", best="min"),
    )
    show(
        Table(
            f"{length} prompt tokens arrive while {sessions} sessions decode", columns, tuple(rows)
        )
    )
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
        return await asyncio.get_running_loop().run_in_executor(
            bed.pool, disturb, load, served.split_url, str(bed.trace_file), length
        )


def disturb(load: BenchSettings, url: str, trace_file: str, length: int) -> tuple[float, ...]:
    """In the fleet's process: (worst gap before, worst gap while the newcomer reads, its TTFT); ms."""
    return asyncio.run(_disturb(load, url, load_trace(Path(trace_file)), length))


async def _disturb(
    load: BenchSettings, url: str, trace: AcceptanceTrace, length: int
) -> tuple[float, ...]:
    from wispprof.runtime.bench.fleet import _Fleet
    from wispprof.runtime.edge.client import EdgeClient
    from wispprof.runtime.edge.session import Generation, GenerationRequest

    fleet = _Fleet(load, url, trace, None, None)
    clients = [EdgeClient(fleet._dial_of(i), fleet._client_of(i)) for i in range(load.devices + 1)]
    for client in clients:
        await client.__aenter__()
    loop = asyncio.get_running_loop()
    commits: list[list[float]] = [[] for _ in range(load.devices)]
    going = asyncio.Event()

    async def decode(number: int) -> None:
        path = trace.paths[number % len(trace.paths)]
        request = GenerationRequest(
            path.prompt, len(path.path), trace.sampling, Slo(load.tokens_per_s[0])
        )
        worker, controller = fleet._drafting_of(number, path, clients[number])
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


# --- the command ---------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--ablation", action="store_true")
    parser.add_argument("--interference", action="store_true")
    parser.add_argument("--as-fitted", action="store_true", help="simulate at the profile's pace")
    parser.add_argument("--run", type=Path, help="folder with estimator, predictor and trace")
    parser.add_argument("--devices", type=int, default=10, help="the fleet near capacity")
    parser.add_argument("--requests", type=int, default=0, help="per device")
    parser.add_argument("--repeats", type=int, default=3, help="of the interference")
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    arguments = parser.parse_args()
    arguments.requests = arguments.requests or (2 if arguments.quick else 3)

    import torch

    torch.set_num_threads(arguments.threads)
    began = time.monotonic()
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as made, ProcessPoolExecutor(1, spawn) as pool:
        folder = arguments.run or Path(made)
        if arguments.run is None:
            artifacts(folder, arguments.quick, arguments.interference)
        bed = make_bed(folder, arguments, pool)
        mape = bed.estimator.report["held_out"][bed.estimator.kind]["mape"]
        print(
            f"estimator {bed.estimator.kind}, held-out MAPE {mape:.1f} %; SLO classes "
            f"{', '.join(f'{s:g}' for s in bed.mix.speeds)} tokens/s, first token in "
            f"{bed.ttft_ms:.0f} ms; draft steps {', '.join(f'{k.draft_ms:g}' for k in bed.mix.kinds)} ms, "
            f"RTT {bed.rtt_ms:g} ms; {arguments.threads} engine threads; ready after "
            f"{time.monotonic() - began:.0f} s",
            flush=True,
        )
        if arguments.ablation:
            found = ablation(bed, arguments)
        elif arguments.interference:
            found = interference(bed, arguments)
        else:
            found = compare(bed, arguments)
    summary = {
        "benchmark": "serving",
        "estimator_mape_percent": round(mape, 2),
        "slo_tokens_per_s": list(bed.mix.speeds),
        "threads": arguments.threads,
        "seconds": round(time.monotonic() - began, 1),
        **found,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
