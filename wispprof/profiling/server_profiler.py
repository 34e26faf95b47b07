"""profile-server: times of ragged batch shapes on the verifier engine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from wispprof.artifacts import RowJournal, ServerProfile, StepRow, bundled_path
from wispprof.errors import ProfileError
from wispprof.profiling.engine_runner import EngineRunner
from wispprof.profiling.physics_checks import check_physics
from wispprof.profiling.profile_run import (
    ProfilerSetup,
    SweepPlan,
    collect_profile,
    model_info,
    resumed_header,
    synchronizer,
)
from wispprof.profiling.shape_grid import (
    Axes,
    DeviceCapacity,
    load_axes,
    longest_full_session,
    required_capacity,
    select_within_budget,
    server_workloads,
)
from wispprof.profiling.sweep import Progress, SweepResult
from wispprof.profiling.sweep_cost import CostModel, pilot
from wispprof.profiling.workload import Workload
from wispprof.settings.profiler_settings import ServerProfilerSettings, SweepSettings
from wispprof.types import BatchShape

if TYPE_CHECKING:
    from wispprof.engines.loading import LoadedModel

__all__ = ["EngineRunner", "plan_server", "profile_server"]

BUNDLED_TARGET = "models/reference-pair/target"
QUICK = SweepSettings(
    target=0.05, max_samples=12, max_workload_s=1.5, sentinel_every=2, reference_samples=3
)
STANDARD = SweepSettings(max_samples=21, sentinel_every=1, reference_samples=3)
QUICK_SHAPES = 18
"""What the quick grid measures on any machine: enough shapes to fit an estimator and to hold some out."""

_SEAL_SHARE = 0.01
"""Share of a budget for checking the rows and writing them."""
_PILOT_SHARE = 0.15
"""Most of a budget that may be spent on learning what shots cost."""
_LEAST_CONTEXT = 32
"""Shortest longest session that is worth a profile, tokens."""


def profile_server(
    settings: ServerProfilerSettings,
    progress: Progress | None = None,
    *,
    loaded: LoadedModel | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> ServerProfile:
    """Measure, check against physics, and (with an output path) write a server profile.

    ``loaded`` profiles a model that is loaded already. Ctrl-C leaves the journal with every finished
    visit. Raises :class:`PhysicsViolation` where the times cannot be right; the journal is kept then.
    """
    begin = clock()
    if progress is not None:
        progress(0, 1, "loading the model, timing a few shapes")
    if settings.budget_minutes is None:
        # Nobody asked for a time: slow disks may not cost the quick grid its shapes.
        loaded = loaded or _load(settings)
        begin = clock()
    setup = _set_up(settings, loaded, clock)

    def finish(result: SweepResult, journal: RowJournal | None) -> Any:
        rows = cast("tuple[StepRow, ...]", result.rows)
        physics = check_physics(rows, setup.model).as_dict()
        return rows, {"physics": physics, "left_out": setup.left_out}

    profile = collect_profile(
        setup,
        settings.output,
        finish=finish,
        clock=clock,
        progress=progress,
        budget_s=_budget_left(settings, begin, clock, _SEAL_SHARE)
        if settings.budget_minutes is not None
        else None,
    )
    return cast(ServerProfile, profile)


def plan_server(
    settings: ServerProfilerSettings,
    *,
    loaded: LoadedModel | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> SweepPlan:
    """A dry run: load, time a few shapes, list the shots and say how long they will take."""
    setup = _set_up(settings, loaded, clock)
    setup.close()
    return setup.announce()


def _budget_left(
    settings: ServerProfilerSettings,
    begin: float,
    clock: Callable[[], float],
    kept_back: float = 0.0,
) -> float | None:
    """The budget counts from the call: loading, first prefill and pilot are part of it. ``kept_back``:
    share of it that is not to be spent yet."""
    if settings.budget_s is None:
        return None
    return max(0.0, (1 - kept_back) * settings.budget_s - (clock() - begin))


def _set_up(
    settings: ServerProfilerSettings, loaded: LoadedModel | None, clock: Callable[[], float]
) -> ProfilerSetup[BatchShape]:
    import torch

    from wispprof.engines.torch.engine import TorchEngine

    begin = clock()
    loaded = loaded or _load(settings)
    info, device = loaded.info, loaded.device
    axes = settings.axes or load_axes(settings.grid)
    sweep = settings.sweep or (QUICK if settings.grid == "quick" else STANDARD)
    context = info.max_context
    most = required_capacity(axes, context)
    # What fitted when a sweep began is what its other half must be measured with, too.
    resumed = resumed_header(settings.output).get("engine", {}).get("kv_tokens")
    room = settings.kv_tokens or resumed or _kv_room(device, info.kv_bytes_per_token)
    kv_tokens, longest = _memory(axes, room, most, context)
    sessions = settings.max_sessions or most.sessions
    engine = TorchEngine(
        loaded,
        kv_tokens=kv_tokens,
        max_sessions=sessions + 1,
        backend=settings.backend,
        # Sessions come and go with every visit: without this, most of a sweep would zero memory.
        keep_memory=True,
    )
    runner = EngineRunner(
        engine, longest, seed=sweep.seed, clock=clock, synchronize=synchronizer(device)
    )
    workloads = server_workloads(axes, DeviceCapacity(kv_tokens - longest, sessions, longest))
    sentinel = _sentinel(workloads)
    left = _budget_left(settings, begin, clock)
    pilot_s = math.inf if left is None else _PILOT_SHARE * left
    cost = pilot(runner, workloads, sentinel, sweep, clock, budget_s=pilot_s)
    left = _budget_left(settings, begin, clock)
    whole = len(workloads)
    if left is not None:
        least = QUICK_SHAPES if settings.budget_minutes is None else 0
        workloads = select_within_budget(
            workloads, left, _prices(workloads, sentinel, cost, sweep), least
        )
    return ProfilerSetup(
        "server",
        runner,
        workloads,
        sentinel,
        cost,
        sweep,
        model_info(loaded),
        engine={
            "backend": engine.backend,
            "attention": engine.attention,
            "graphs": engine.capabilities.graphs,
            "kv_tokens": kv_tokens,
            "max_sessions": sessions,
            "max_context": context,
            "device": str(device),
            "threads": torch.get_num_threads(),
        },
        measure={"grid": settings.grid, "axes": _plain(axes)},
        close=runner.close,
        left_out=whole - len(workloads),
    )


def _prices(
    workloads: list[Workload[BatchShape]],
    sentinel: Workload[BatchShape],
    cost: CostModel[BatchShape],
    sweep: SweepSettings,
) -> list[float]:
    """Seconds of each shot with its share of the looks at the sentinel."""
    each = [cost.remaining(workload) for workload in workloads]
    reference_s = cost.reference_s(sentinel) / sweep.sentinel_every
    return [seconds + blocks * reference_s for blocks, seconds in each]


def _load(settings: ServerProfilerSettings) -> LoadedModel:
    from wispprof.engines.loading import load_model, random_model

    if settings.shape:
        return random_model(settings.shape, 0, settings.dtype, settings.device)
    model = settings.model or str(bundled_path(BUNDLED_TARGET))
    return load_model(model, settings.dtype, settings.device)


def _memory(axes: Axes, room: int, most: DeviceCapacity, context: int) -> tuple[int, int]:
    """(KV tokens of the engine, tokens of the session that all others are forks of).

    That session stands beside every shot, so where memory is scarce it has half of it and no more: shots
    with longer sessions are left out. Raises :class:`ProfileError` where next to nothing would remain.
    """
    longest = max(
        most.context, min(context, longest_full_session(axes, min(room, most.kv_tokens + context)))
    )
    longest = min(longest, room // 2)
    if longest < _LEAST_CONTEXT:
        raise ProfileError(
            f"There is room for {room} KV tokens, too few to measure anything.",
            "Choose a smaller dtype, free memory, or give more --kv-tokens.",
        )
    return min(room, most.kv_tokens + longest), longest


def _kv_room(device: Any, bytes_per_token: int) -> int:
    """KV tokens that fit into the memory that is free now, with room left for the rest."""
    import psutil
    import torch

    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] * 0.80
    else:
        free = psutil.virtual_memory().available * 0.30
    return int(free // max(1, bytes_per_token))


def _sentinel(workloads: list[Workload[BatchShape]]) -> Workload[BatchShape]:
    """A shape in the middle of the grid's work: long enough to time well, short enough to repeat."""
    verify = [s for s in workloads if s.kind == "verify"] or workloads
    ordered = sorted(verify, key=lambda workload: (sum(workload.work), workload.key))
    middle = ordered[len(ordered) // 3]
    return replace(middle, key=f"sentinel {middle.key}", kind="sentinel")


def _plain(axes: Axes) -> dict[str, list[float]]:
    return {name: list(getattr(axes, name)) for name in Axes.__dataclass_fields__}
