"""profile-edge: what drafting costs on this device.

Measures draft steps by context length (with features and sampling), the bare forward, several nodes of a
draft tree in one forward, rounds after a rest, prefill speed and the controller's own time. Then it drafts
steadily: a burst, and a longer sustained window in which the device warms up. Energy is measured over the
longer one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from wispprof.artifacts import EdgeProfile, EdgeRow, RowJournal
from wispprof.artifacts.profile import resume_ms
from wispprof.backends import Drafter, TreeDrafter
from wispprof.hardware import energy_meter, sensors
from wispprof.profiling.drafter_runner import (
    ROUND,
    DrafterRunner,
    EdgeAxes,
    EdgePoint,
    edge_workloads,
    load_edge_axes,
)
from wispprof.profiling.physics_checks import check_edge
from wispprof.profiling.profile_run import (
    ProfilerSetup,
    SweepPlan,
    check_output,
    collect_profile,
    load_pair_model,
    synchronizer,
)
from wispprof.profiling.shape_grid import axes_record
from wispprof.profiling.sweep import SweepResult
from wispprof.profiling.sweep_cost import pilot
from wispprof.profiling.workload import round_ms
from wispprof.settings.profiler_settings import EdgeProfilerSettings, SweepSettings
from wispprof.types import ModelInfo, Progress

if TYPE_CHECKING:
    from wispprof.engines.loading import LoadedModel


class SteadyDrafting:
    """Burst and sustained drafting over the sentinel's context, and the energy of the longer window."""

    def __init__(self, setup: ProfilerSetup[EdgePoint], axes: EdgeAxes, clock: Callable[[], float]) -> None:
        device = setup.engine["device"]
        self._runner = cast(DrafterRunner, setup.runner)
        self._context = setup.sentinel.subject.context
        self._sensors, self._meter, self._clock = sensors(device), energy_meter(device), clock
        windows = {"burst": axes.burst_s, "sustained": axes.sustained_s}
        self._windows = {kind: span for kind, span in windows.items() if span > 0}

    @property
    def count(self) -> int:
        """Number of windows."""
        return len(self._windows)

    @property
    def sensor(self) -> str:
        """Name of the energy meter."""
        return self._meter.sensor

    def run(
        self, rows: Sequence[Any], journal: RowJournal | None, report: Callable[[int, str], None]
    ) -> tuple[EdgeRow, ...]:
        """The rows of the sweep and of the windows. Windows of a resumed run are not repeated."""
        done = list(cast("Sequence[EdgeRow]", rows))
        have = {row.kind for row in done}
        longest = max(self._windows.values(), default=0.0)
        for number, (kind, span) in enumerate(self._windows.items()):
            if kind in have:
                continue  # measured before the run was resumed
            report(number, f"{kind} drafting, {span:.0f} s")
            order = max(row.order for row in (*done, *(journal.rows if journal else ()))) + 1
            window, energy = self._window(kind, span, order)
            made = [energy, window] if span == longest else [window]
            for row in made:
                if journal is not None:
                    journal.append(row)
                done.append(row)
        return tuple(sorted(done, key=lambda row: row.order))

    def _window(self, kind: str, span: float, order: int) -> tuple[EdgeRow, EdgeRow]:
        runner, context = self._runner, self._context
        runner.fill_context(context)
        samples: list[float] = []
        self._meter.begin()
        begin = now = self._clock()
        while now - begin < span or not samples:
            runner.draft_round(context)
            before, now = now, self._clock()
            samples.append(round_ms((now - before) * 1000 / ROUND))
        used, state = self._meter.end(), self._sensors.read()
        drafted = len(samples) * ROUND
        joules = None if used.energy_j is None else used.energy_j / drafted
        window = EdgeRow(
            f"{kind} {span:g} s",
            kind,
            context,
            tuple(samples),
            temperature_c=state.temperature_c,
            flags=("throttled",) if state.throttled else (),
            order=order + 1,
        )
        mean = ((now - begin) * 1000 / drafted,)
        energy = EdgeRow(f"energy {span:g} s", "energy", context, mean, energy_j=joules, order=order)
        return window, energy


# A draft step is short compared with preparing its context: many samples per block.
QUICK = SweepSettings(
    target=0.05, block=10, min_samples=20, max_samples=60, max_workload_s=1.0, sentinel_every=6
)
STANDARD = SweepSettings(block=15, min_samples=30, max_samples=120)


def profile_edge(
    settings: EdgeProfilerSettings,
    progress: Progress | None = None,
    *,
    loaded: LoadedModel | None = None,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> EdgeProfile:
    """Measure, check, and (with an output path) write an edge profile. Ctrl-C keeps finished blocks.

    ``sleep`` idles the device before a round.
    """
    check_output(settings.output)
    report = progress or (lambda done, total, status: None)
    report(0, 1, "loading the draft, timing a few steps")
    setup = _set_up(settings, loaded, clock, sleep)
    windows = SteadyDrafting(setup, _axes(settings), clock)
    made = 0

    def report_sweep(done: int, total: int, status: str) -> None:
        nonlocal made
        made = total
        report(done, total + windows.count, status)

    def finish(result: SweepResult, journal: RowJournal | None) -> Any:
        rows = windows.run(
            result.rows, journal, lambda done, what: report(made + done, made + windows.count, what)
        )
        report(made + windows.count, made + windows.count, "done")
        return rows, _summary(rows, windows.sensor)

    profile = collect_profile(
        setup, settings.output, check=check_edge, finish=finish, clock=clock, progress=report_sweep
    )
    return cast(EdgeProfile, profile)


def plan_edge(
    settings: EdgeProfilerSettings,
    *,
    loaded: LoadedModel | None = None,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> SweepPlan:
    """A dry run: the workloads, and the expected time with the windows after them."""
    return _set_up(settings, loaded, clock, sleep).announce()


@dataclass(frozen=True)
class _Device:
    """A drafter to measure, and its record for the manifest."""

    drafter: Drafter
    model: ModelInfo
    engine: dict[str, Any]
    synchronize: Callable[[], None] = lambda: None


def _torch_device(settings: EdgeProfilerSettings, loaded: LoadedModel | None) -> _Device:
    import torch

    from wispprof.drafters.torch_drafter import torch_drafter

    if loaded is None:
        loaded = load_pair_model(settings.draft, "draft", settings.dtype, settings.device)
    device = loaded.device
    return _Device(
        torch_drafter(loaded),
        loaded.info,
        {"backend": "torch", "device": str(device), "threads": torch.get_num_threads()},
        synchronizer(device),
    )


def _llamacpp_device(settings: EdgeProfilerSettings) -> _Device:
    from wispprof.drafters.gguf_model import GgufModel
    from wispprof.drafters.llama_cpp import LlamaCppDrafter

    model = GgufModel(Path(settings.draft), settings.llama, settings.device)
    device = settings.device if settings.device != "auto" else "cpu"
    engine = {"backend": "llama.cpp", "device": device, "gpu_layers": model.gpu_layers}
    return _Device(LlamaCppDrafter(model), model.info, {**engine, "threads": model.budget.threads})


def _axes(settings: EdgeProfilerSettings) -> EdgeAxes:
    axes = settings.axes or load_edge_axes(settings.grid)
    if settings.sustained_s is not None:
        axes = replace(axes, sustained_s=settings.sustained_s)
    return axes


def _set_up(
    settings: EdgeProfilerSettings,
    loaded: LoadedModel | None,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
) -> ProfilerSetup[EdgePoint]:
    axes = _axes(settings)
    gguf = loaded is None and settings.draft.endswith(".gguf")
    device = _llamacpp_device(settings) if gguf else _torch_device(settings, loaded)
    sweep = settings.sweep or settings.precision.applied_to(QUICK if settings.grid == "quick" else STANDARD)
    runner = DrafterRunner(
        device.drafter,
        device.model.vocab_size,
        settings.sampling,
        seed=sweep.seed,
        clock=clock,
        synchronize=device.synchronize,
        sleep=sleep,
    )
    trees = isinstance(device.drafter, TreeDrafter)
    workloads = edge_workloads(axes, device.model.max_context, trees)
    steps = [workload for workload in workloads if workload.kind == "draft_step"]
    sentinel = replace(steps[len(steps) // 2], key="sentinel", kind="sentinel")
    return ProfilerSetup(
        "edge",
        runner,
        workloads,
        sentinel,
        pilot(runner, workloads, sentinel, sweep, clock),
        sweep,
        device.model,
        device.engine,
        measure={"grid": settings.grid, "axes": axes_record(axes)},
        after_s=axes.burst_s + axes.sustained_s,
    )


def _summary(rows: Sequence[EdgeRow], sensor: str) -> dict[str, Any]:
    """Tokens/s in a burst, sustained and of prefill; J per drafted token; ms that a rest adds to a round, and
    that each further node adds to a forward."""
    summary: dict[str, Any] = {"energy_sensor": sensor}
    for row in rows:
        if row.kind in ("burst", "sustained"):
            summary[f"{row.kind}_tokens_per_s"] = round(1000 / row.median_ms, 2)
        if row.kind == "energy":
            summary["energy_j_per_token"] = row.energy_j
    rounds = [row.context for row in rows if row.kind == "round"]
    if rounds:
        added = statistics.median(resume_ms(rows, context) for context in rounds)
        summary["resume_ms"] = round(added, 3)
    nodes = sorted((row.tokens, row.median_ms) for row in rows if row.kind == "nodes")
    if len(nodes) > 1:
        (fewest, least_ms), (most, most_ms) = nodes[0], nodes[-1]
        summary["extra_node_ms"] = round((most_ms - least_ms) / (most - fewest), 4)
    prefills = [row for row in rows if row.kind == "prefill"]
    if prefills:
        best = max(row.tokens / row.median_ms for row in prefills)
        summary["prefill_tokens_per_s"] = round(1000 * best, 1)
    return summary
