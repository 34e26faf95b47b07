"""What every run stands on: artifacts, the engine, and a load scaled to it by the estimator."""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _serving.timed_engine import TimedEngine
from wispprof.artifacts import AcceptanceTrace, bundled_model, load_trace, save_trace
from wispprof.bench import FleetProcess, LoadMix
from wispprof.engines import EngineOptions, LoadedEngine, load_engine
from wispprof.engines.engine_process import load_engine_process
from wispprof.fitting import FittedEstimator, load_estimator
from wispprof.settings.fleet_settings import BenchSettings
from wispprof.settings.shared_settings import LinkModel
from wispprof.simulation import ServerModel
from wispprof.simulation.devices import DeviceProfile
from wispprof.types import BatchShape, Sampling, StepInput

if TYPE_CHECKING:
    from wispprof.server.process import RunningServer

LOADS = {"below": 0.6, "near": 1.0, "above": 1.5}
CLASSES = (0.2125, 0.425, 0.6375, 0.85)
"""In the ratios 2 : 4 : 6 : 8. Not 1: chance decides whether a load just at its SLO meets it."""
DRAFT_SHARES = {"fast": 0.15, "medium": 0.4, "slow": 1.0}
MAX_ITEMS, MAX_TOKENS, CHUNK = 64, 1024, 256
LOOP_MS = 2.0
REFERENCE_STEPS = 16
PROMPT = 96


@dataclass
class Bed:
    """What every run needs. ``mix``: devices and SLO classes; ``rtt_ms`` of the emulated link."""

    loaded: LoadedEngine
    estimator: FittedEstimator
    predictor: Path
    trace_file: Path
    trace: AcceptanceTrace
    near: int
    rounds: int
    requests: int
    mix: LoadMix
    rtt_ms: float
    ttft_ms: float
    max_new: int
    as_fitted: bool
    fleet: FleetProcess
    apart: Sequence[int]


def artifacts(folder: Path, arguments: argparse.Namespace) -> None:
    """Profile the server, take a trace, fit: into ``folder``. Call it in another process: vLLM runs once in
    one."""
    import torch

    from wispprof.engines.loading import load_model
    from wispprof.fitting.pipeline import fit_files
    from wispprof.profiling.acceptance_trace import collect_trace
    from wispprof.profiling.server_profiler import profile_server
    from wispprof.profiling.shape_grid import Axes
    from wispprof.settings.profiler_settings import (
        Output,
        ServerProfilerSettings,
        SweepSettings,
        TraceSettings,
    )

    torch.set_num_threads(arguments.threads)
    # Paths that outlast a long prompt.
    quick, long = arguments.quick, arguments.interference
    axes = Axes(
        items=(1, 4, 8, 16) if quick else (1, 2, 4, 8, 16),
        new=(1, 3, 7),
        cached=(64, 192),
        skew_items=(4, 12) if quick else (2, 4, 8, 12, 16),
        chunk=(32, 96, 256),
        # A long prompt is read over what it has cached so far, and that belongs to its price.
        chunk_cached=(0, 512, 1024) if long else (0,),
        mixed_items=(4, 12),
    )
    least, most, shot_s = (4, 6, 0.2) if quick else (5, 10, 0.4)
    sweep = SweepSettings(
        target=0.06,
        min_samples=least,
        max_samples=most,
        max_workload_s=shot_s,
        sentinel_every=12,
        drift=0.6,
    )
    output = Output(folder / "server", overwrite=True)
    profile_server(
        ServerProfilerSettings(
            engine=arguments.engine, dtype="float32", axes=axes, sweep=sweep, output=output
        )
    )
    count, path = (8, 48) if quick else (24, 72)
    path = 192 if long else path
    settings = TraceSettings(count=count, prompt_tokens=PROMPT, path_tokens=path, depth=8)
    target, draft = load_model(bundled_model("target")), load_model(bundled_model("draft"))
    save_trace(collect_trace(target, draft, settings), folder / "trace.jsonl")
    fit_files(folder, [folder / "server"], [folder / "trace.jsonl"])


def make_bed(
    folder: Path, arguments: argparse.Namespace, fleet: FleetProcess, apart: Sequence[int] = ()
) -> Bed:
    """The engine, and a load scaled to it by the estimator. ``apart``: cores of the fleet and of fronts."""
    estimator = load_estimator(folder / "estimator.json")
    trace = load_trace(folder / "trace.jsonl")
    most = math.ceil(max(LOADS.values()) * arguments.devices)
    load = load_engine_process if arguments.engine == "torch" else load_engine
    os.environ.setdefault("OMP_NUM_THREADS", str(arguments.threads))
    loaded = load(
        arguments.engine,
        EngineOptions(
            bundled_model("target"),
            "float32",
            kv_tokens=4096 + 512 * most,
            max_sessions=2 * most + 16,
            max_items=MAX_ITEMS,
            max_tokens=MAX_TOKENS,
            prefix_cache=False,
        ),
    )
    if arguments.timed:
        timed = TimedEngine(trace, estimator, loaded.model, loaded.engine.kv_tokens)
        loaded = loaded._replace(engine=timed)
    loaded.engine.warm_up(every_size=True)
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
        loaded,
        estimator,
        folder / "predictor.json",
        folder / "trace.jsonl",
        trace,
        near,
        arguments.rounds,
        arguments.requests,
        LoadMix(kinds, speeds),
        round(0.3 * step_ms, 1),
        max(1000.0, 4.0 * near * prompt_ms),
        new,
        arguments.as_fitted,
        fleet,
        apart,
    )


def load_of(bed: Bed, label: str, devices: int, slowdown: float = 1.0) -> BenchSettings:
    """The load of ``devices``, as it is on a machine that has become ``slowdown`` times as slow."""
    profiles = tuple(replace(kind, draft_ms=kind.draft_ms * slowdown) for kind in bed.mix.profiles)
    mix = LoadMix(profiles, tuple(speed / slowdown for speed in bed.mix.speeds))
    return BenchSettings(
        system=label,
        devices=devices,
        device=mix.device(devices),
        tokens_per_s=mix.tokens_per_s(devices),
        ttft_ms=bed.ttft_ms * slowdown,
        requests=bed.requests,
        hold=True,
        max_new=bed.max_new,
        link=LinkModel(rtt_ms=bed.rtt_ms * slowdown),
        predictor=bed.predictor,
    )


def slowdown_now(bed: Bed) -> float:
    """Measured over fitted time of undrafted steps, one after the other, at this moment."""
    engine, names = bed.loaded.engine, [f"reference {number}" for number in range(bed.near)]
    prompt = list(range(1, PROMPT + 1))
    for name in names:
        engine.open(name, Sampling())
        engine.step([StepInput(name, prompt, needs_logits=False)])
    ratios = []
    for number in range(REFERENCE_STEPS):
        begin = time.perf_counter()
        engine.step([StepInput(name, [number + 1]) for name in names])
        took_ms = (time.perf_counter() - begin) * 1000.0
        shape = BatchShape.uniform(len(names), 1, PROMPT + number)
        ratios.append(took_ms / bed.estimator.predict(shape)[0])
    for name in names:
        engine.close(name)
    return statistics.median(ratios)


def server_model(bed: Bed, overhead_ms: float, pace: float = 1.0, spread: float | None = None) -> ServerModel:
    """The running server as the simulator sees it; ``pace``, ``spread``: of step times, if they were seen."""
    fitted = bed.estimator
    return ServerModel(
        fitted.with_scale(fitted.p50_scale * pace, fitted.bound_scale * pace),
        bed.loaded.engine.kv_free,
        MAX_ITEMS,
        MAX_TOKENS,
        CHUNK,
        bed.loaded.model.max_context,
        overhead_ms,
        spread or None,
    )


@asynccontextmanager
async def running(bed: Bed, policy: Any) -> AsyncIterator[RunningServer]:
    """A server on the bed's engine. Its front runs beside the fleet, on the cores that are left to it."""
    from wispprof.server import running_server
    from wispprof.server.garbage_collector import calm_garbage_collector
    from wispprof.settings.server_settings import ServerSettings

    settings = ServerSettings(
        admit="all",
        prefix_cache_sessions=0,
        max_items=MAX_ITEMS,
        max_tokens=MAX_TOKENS,
        prefill_chunk=CHUNK,
    )
    engine, model, _ = bed.loaded
    async with running_server(
        settings,
        engine=engine,
        model=model,
        policy=policy,
        estimator=bed.estimator,
        front_process=True,
    ) as served:
        for process in served.front.processes if bed.apart else ():
            os.sched_setaffinity(process.pid, bed.apart)
        with calm_garbage_collector():
            yield served
