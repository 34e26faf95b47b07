"""profile-server: times of ragged batch shapes on the verifier engine.

One master session is prefilled once to the longest context. The sessions of a workload are forks of it,
and every run is rolled back by length. So a block costs its own steps and a copy of keys and values, and
each run starts from the same state.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from wispprof.artifacts import RowJournal, ServerProfile, StepRow
from wispprof.errors import ProfileError
from wispprof.fitting.observations import MINIMUM_SHAPES
from wispprof.profiling.physics_checks import check_physics
from wispprof.profiling.profile_run import (
    ProfilerSetup,
    SweepPlan,
    check_output,
    collect_profile,
    load_pair_model,
    resumed_header,
    synchronizer,
)
from wispprof.profiling.shape_grid import (
    Axes,
    DeviceCapacity,
    axes_record,
    load_axes,
    longest_full_session,
    required_capacity,
    select_within_budget,
    server_workloads,
)
from wispprof.profiling.step_runner import MASTER, ProfiledEngine, StepRunner
from wispprof.profiling.sweep import SweepResult
from wispprof.profiling.sweep_cost import CostModel, choose_probes, pilot
from wispprof.profiling.workload import Workload
from wispprof.settings.profiler_settings import ServerProfilerSettings, SweepSettings
from wispprof.types import BatchShape, Progress, Sampling, StepInput

if TYPE_CHECKING:
    from wispprof.engines.loading import LoadedModel
    from wispprof.engines.torch.engine import TorchEngine

QUICK = SweepSettings(target=0.05, max_samples=12, max_workload_s=1.5, sentinel_every=2, reference_samples=3)
STANDARD = SweepSettings(max_samples=21, sentinel_every=1, reference_samples=3)
QUICK_SHAPES = 18
"""Minimum number of shapes of the quick grid: enough to fit an estimator and to hold some out."""

_FINISH_SHARE = 0.01
"""Share of a budget for checking the rows and writing them."""
_PILOT_SHARE = 0.15
"""Maximum share of a budget for the pilot."""
_MIN_CONTEXT = 32
"""Minimum tokens of the longest session of a profile."""

_PREFILL_CHUNK = 512


def profile_server(
    settings: ServerProfilerSettings,
    progress: Progress | None = None,
    *,
    loaded: LoadedModel | None = None,
    clock: Callable[[], float] = time.perf_counter,
    warn: Callable[[str], None] = lambda message: None,
) -> ServerProfile:
    """Measure, check against physics, and (with an output path) write a server profile.

    ``loaded``: a model that is loaded already. ``warn``: told at once if `wispprof fit` will need more.
    Ctrl-C keeps finished blocks in the journal. Raises :class:`PhysicsViolation` if the times cannot be
    right; the journal is kept.
    """
    check_output(settings.output)
    begin = clock()
    if progress is not None:
        progress(0, 1, "loading the model, timing a few shapes")
    setup = _set_up(settings, loaded, clock)
    if len(setup.workloads) < MINIMUM_SHAPES:
        warn(too_few_shapes(len(setup.workloads)))

    def finish(result: SweepResult, journal: RowJournal | None) -> Any:
        rows = cast("tuple[StepRow, ...]", result.rows)
        physics = check_physics(rows, setup.model).as_dict()
        measured = {row.key for row in rows}
        added = sum(workload.key in measured for workload in setup.spare)
        return rows, {"physics": physics, "left_out": setup.left_out - added}

    profile = collect_profile(
        setup,
        settings.output,
        check=lambda rows: check_physics(rows, setup.model),
        finish=finish,
        clock=clock,
        progress=progress,
        budget_s=_budget_left(settings, begin, clock, _FINISH_SHARE)
        if settings.budget_minutes is not None
        else None,
    )
    return cast(ServerProfile, profile)


def too_few_shapes(count: int) -> str:
    """A warning that the estimator cannot be fitted to so few batch shapes."""
    return (
        f"{count} batch shapes are measured; `wispprof fit` needs at least {MINIMUM_SHAPES}. Give more "
        "--budget-minutes or a larger grid."
    )


def plan_server(
    settings: ServerProfilerSettings,
    *,
    loaded: LoadedModel | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> SweepPlan:
    """A dry run: load, time a few shapes, list the workloads and the expected time."""
    setup = _set_up(settings, loaded, clock)
    setup.close()
    plan = setup.announce()
    if settings.budget_minutes is None or settings.budget_s is None:
        return plan
    return replace(plan, expected_s=min(plan.expected_s, settings.budget_s))


def _budget_left(
    settings: ServerProfilerSettings, begin: float, clock: Callable[[], float], reserved: float = 0.0
) -> float | None:
    """Remaining seconds of the budget, counted from ``begin``, without its ``reserved`` share."""
    if settings.budget_s is None:
        return None
    return max(0.0, (1 - reserved) * settings.budget_s - (clock() - begin))


def _set_up(
    settings: ServerProfilerSettings, loaded: LoadedModel | None, clock: Callable[[], float]
) -> ProfilerSetup[BatchShape]:
    begin = clock()
    axes = settings.axes or load_axes(settings.grid)
    sweep = settings.sweep or settings.precision.applied_to(QUICK if settings.grid == "quick" else STANDARD)
    if settings.engine == "torch":
        profiled = _torch_engine(settings, loaded or _load(settings), axes, sweep, clock)
    else:
        from wispprof.profiling.vllm_profile import load_profiled_vllm

        profiled = load_profiled_vllm(settings, axes, sweep, clock)
    if settings.budget_minutes is None:
        begin = clock()  # Loading, and compiling, count only towards a budget that somebody gave.
    runner, workloads = profiled.runner, profiled.workloads
    sentinel = _sentinel(workloads)
    left = _budget_left(settings, begin, clock)
    pilot_s = math.inf if left is None else _PILOT_SHARE * left
    cost = pilot(runner, workloads, sentinel, sweep, clock, budget_s=pilot_s)
    left = _budget_left(settings, begin, clock)
    in_grid, spare = len(workloads), []
    if left is not None and settings.budget_minutes is None:
        cost_s = _expected_s(workloads, sentinel, cost, sweep)
        workloads = select_within_budget(workloads, left, cost_s, QUICK_SHAPES)
    elif left is not None:
        ranked = choose_probes(workloads, in_grid)
        workloads = _select_by_budget(ranked, left, sentinel, cost, sweep)
        taken = {workload.key for workload in workloads}
        spare = [workload for workload in ranked if workload.key not in taken]
    return ProfilerSetup(
        "server",
        runner,
        workloads,
        sentinel,
        cost,
        sweep,
        profiled.model,
        engine=profiled.record,
        measure={"grid": settings.grid, "axes": axes_record(axes)},
        close=runner.close,
        left_out=in_grid - len(workloads),
        spare=spare,
    )


def _torch_engine(
    settings: ServerProfilerSettings,
    loaded: LoadedModel,
    axes: Axes,
    sweep: SweepSettings,
    clock: Callable[[], float],
) -> ProfiledEngine:
    import torch

    from wispprof.engines.torch.engine import TorchEngine

    info, device = loaded.info, loaded.device
    context = info.max_context
    required = required_capacity(axes, context)
    # A resumed sweep keeps its capacity.
    resumed = resumed_header(settings.output).get("engine", {}).get("kv_tokens")
    available = settings.kv_tokens or resumed or _available_kv(device, info.kv_bytes_per_token)
    kv_tokens, longest = _engine_capacity(axes, available, required, context)
    sessions = settings.max_sessions or required.sessions
    engine = TorchEngine(
        loaded,
        kv_tokens=kv_tokens,
        max_sessions=sessions + 1,
        backend=settings.backend,
        # Every block opens and closes sessions: otherwise most of a sweep would zero memory.
        keep_memory=True,
    )
    runner = EngineRunner(engine, longest, seed=sweep.seed, clock=clock, synchronize=synchronizer(device))
    workloads = server_workloads(axes, DeviceCapacity(kv_tokens - longest, sessions, longest))
    record = {
        "backend": engine.backend,
        "attention": engine.attention,
        "graphs": engine.capabilities.graphs,
        "kv_tokens": kv_tokens,
        "max_sessions": sessions,
        "max_context": context,
        "device": str(device),
        "threads": torch.get_num_threads(),
    }
    return ProfiledEngine(runner, info, workloads, record)


def _select_by_budget(
    workloads: list[Workload[BatchShape]],
    budget_s: float,
    sentinel: Workload[BatchShape],
    cost: CostModel[BatchShape],
    sweep: SweepSettings,
) -> list[Workload[BatchShape]]:
    """Workloads that can be finished within the budget; if those are few, more with one block each.

    Many shapes of which a few samples are known tell an estimator more than a few known precisely.
    """
    reference_s = cost.reference_s(sentinel) / sweep.sentinel_every
    block_s = [cost.block_s(workload, sweep.block + sweep.warmup) + reference_s for workload in workloads]
    begun = select_within_budget(workloads, budget_s, block_s)[:QUICK_SHAPES]
    finished = select_within_budget(workloads, budget_s, _expected_s(workloads, sentinel, cost, sweep), 1)
    return max(finished, begun, key=len)


def _expected_s(
    workloads: list[Workload[BatchShape]],
    sentinel: Workload[BatchShape],
    cost: CostModel[BatchShape],
    sweep: SweepSettings,
) -> list[float]:
    """Seconds of each workload, with its share of the reference measurements."""
    each = [cost.remaining(workload) for workload in workloads]
    reference_s = cost.reference_s(sentinel) / sweep.sentinel_every
    return [seconds + blocks * reference_s for blocks, seconds in each]


def _load(settings: ServerProfilerSettings) -> LoadedModel:
    from wispprof.engines.loading import random_model

    if settings.shape:
        return random_model(settings.shape, 0, settings.dtype, settings.device)
    return load_pair_model(settings.model, "target", settings.dtype, settings.device)


def _engine_capacity(axes: Axes, available: int, required: DeviceCapacity, context: int) -> tuple[int, int]:
    """(KV tokens of the engine, tokens of the master session).

    The master session takes half of ``available`` KV tokens at most; workloads with longer sessions are
    left out. Raises :class:`ProfileError` if too little remains.
    """
    full = longest_full_session(axes, min(available, required.kv_tokens + context))
    longest = min(max(required.context, min(context, full)), available // 2)
    if longest < _MIN_CONTEXT:
        raise ProfileError(
            f"{available} KV tokens fit into memory, too few to measure anything.",
            "Choose a smaller dtype, free memory, or give more --kv-tokens.",
        )
    return min(available, required.kv_tokens + longest), longest


def _available_kv(device: Any, bytes_per_token: int) -> int:
    """KV tokens that fit into a share of the free memory."""
    import psutil
    import torch

    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] * 0.80
    else:
        free = psutil.virtual_memory().available * 0.30
    return int(free // max(1, bytes_per_token))


def _sentinel(workloads: list[Workload[BatchShape]]) -> Workload[BatchShape]:
    """A shape in the middle of the grid's work: long enough to time well, short enough to repeat."""
    verify = [w for w in workloads if w.kind == "verify"] or workloads
    ordered = sorted(verify, key=lambda workload: (sum(workload.work), workload.key))
    middle = ordered[len(ordered) // 3]
    return replace(middle, key=f"sentinel {middle.key}", kind="sentinel")


class EngineRunner(StepRunner):
    """Runs batch shapes on the project's own engine, with sessions of ``longest`` tokens at most."""

    def __init__(
        self,
        engine: TorchEngine,
        longest: int,
        *,
        seed: int = 0,
        clock: Callable[[], float] = time.perf_counter,
        synchronize: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(engine, engine.info.vocab_size, seed=seed, clock=clock, synchronize=synchronize)
        self._engine = engine
        engine.open(MASTER, Sampling())
        for start in range(0, longest, _PREFILL_CHUNK):
            chunk = self._random_tokens(min(_PREFILL_CHUNK, longest - start))
            engine.step([StepInput(MASTER, chunk, needs_logits=False)])

    def open_at(self, name: str, cached: int) -> None:
        self._engine.fork(MASTER, name, cached, private=True)

    def padded_tokens(self) -> int:
        return self._engine.last_padded_tokens

    def close(self) -> None:
        self._engine.close(MASTER)
