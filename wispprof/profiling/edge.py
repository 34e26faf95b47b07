"""profile-edge: what drafting costs on this device.

Draft steps by context length (features and sampling included) and the bare forward beside them, whole
rounds after a rest, prefill speed, the controller's own time, then two windows of steady drafting: a burst,
and a sustained one that shows what is left when the device is warm. Energy is counted over the sustained
window, or the burst.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from wispprof.artifacts import EdgeProfile, EdgeRow, ModelInfo, RowJournal, bundled
from wispprof.artifacts.drafting import resume_ms
from wispprof.core import Drafter, Sampling
from wispprof.profiling.cost import pilot
from wispprof.profiling.drafting import (
    EDGE_GRIDS,
    DrafterShooter,
    EdgeAxes,
    EdgePoint,
    edge_shots,
    load_edge_axes,
)
from wispprof.profiling.physics import check_edge
from wispprof.profiling.session import (
    Announcement,
    Output,
    Setup,
    model_info,
    synchronizer,
    take_profile,
)
from wispprof.profiling.shots import SweepSettings
from wispprof.profiling.sweep import Progress, SweepResult
from wispprof.profiling.windows import Windows

if TYPE_CHECKING:
    from wispprof.lm.loading import LoadedModel

__all__ = [
    "EDGE_GRIDS",
    "QUICK",
    "STANDARD",
    "DrafterShooter",
    "EdgeAxes",
    "EdgePoint",
    "EdgeSettings",
    "edge_shots",
    "plan_edge",
    "profile_edge",
]

BUNDLED_DRAFT = "models/reference-pair/draft"
# A draft step is short beside what frames it (a prefilled context): many samples a visit.
QUICK = SweepSettings(target=0.05, block=10, least=20, most=60, shot_s=1.0, sentinel_every=6)
STANDARD = SweepSettings(block=15, least=30, most=120)


@dataclass(frozen=True)
class EdgeSettings:
    """``draft``: folder, hub id, ``.gguf`` file (llama.cpp), or empty for the bundled draft.
    ``axes`` replaces the named ``grid``, ``sustained_s`` its longer window."""

    draft: str = ""
    dtype: str = "float32"
    device: str = "auto"
    grid: str = "quick"
    axes: EdgeAxes | None = None
    sampling: Sampling = field(default_factory=Sampling)
    sustained_s: float | None = None
    sweep: SweepSettings | None = None
    output: Output = field(default_factory=Output)


def profile_edge(
    settings: EdgeSettings,
    progress: Progress | None = None,
    *,
    loaded: LoadedModel | None = None,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> EdgeProfile:
    """Measure, check, and (with an output path) write an edge profile. Ctrl-C keeps finished visits.
    ``sleep`` is how the device rests before a round."""
    report = progress or (lambda done, total, status: None)
    report(0, 1, "loading the draft, timing a few steps")
    setup = _set_up(settings, loaded, clock, sleep)
    windows = Windows(setup, _axes(settings), clock)
    made = 0

    def sweeping(done: int, total: int, status: str) -> None:
        nonlocal made
        made = total
        report(done, total + windows.count, status)

    def finish(result: SweepResult, journal: RowJournal | None) -> Any:
        rows = windows.run(
            result.rows, journal, lambda done, what: report(made + done, made + windows.count, what)
        )
        report(made + windows.count, made + windows.count, "done")
        check_edge(rows)
        return rows, _summary(rows, windows.sensor)

    profile = take_profile(setup, settings.output, finish=finish, clock=clock, progress=sweeping)
    return cast(EdgeProfile, profile)


def plan_edge(
    settings: EdgeSettings,
    *,
    loaded: LoadedModel | None = None,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Announcement:
    """A dry run: the shots and what they, and the windows after them, are expected to take."""
    return _set_up(settings, loaded, clock, sleep).announce()


@dataclass(frozen=True)
class _Device:
    """A drafter ready to be measured, and what it is."""

    drafter: Drafter
    model: ModelInfo
    engine: dict[str, Any]
    synchronize: Callable[[], None] = lambda: None


def _torch_device(settings: EdgeSettings, loaded: LoadedModel | None) -> _Device:
    import torch

    from wispprof.lm.draft import TorchDrafter
    from wispprof.lm.loading import load_model

    if loaded is None:
        name = settings.draft or str(bundled.path(BUNDLED_DRAFT))
        loaded = load_model(name, settings.dtype, settings.device)
    device = loaded.device
    return _Device(
        TorchDrafter(loaded),
        model_info(loaded),
        {"backend": "torch", "device": str(device), "threads": torch.get_num_threads()},
        synchronizer(device),
    )


def _llamacpp_device(settings: EdgeSettings) -> _Device:
    from wispprof.profiling.llamacpp import LlamaCppDrafter

    gpu_layers = 0 if settings.device == "cpu" else -1
    drafter = LlamaCppDrafter(Path(settings.draft), gpu_layers=gpu_layers)
    device = settings.device if settings.device != "auto" else "cpu"
    engine = {"backend": "llama.cpp", "device": device, "gpu_layers": gpu_layers}
    return _Device(drafter, drafter.info, engine)


def _axes(settings: EdgeSettings) -> EdgeAxes:
    axes = settings.axes or load_edge_axes(settings.grid)
    if settings.sustained_s is not None:
        axes = replace(axes, sustained_s=settings.sustained_s)
    return axes


def _set_up(
    settings: EdgeSettings,
    loaded: LoadedModel | None,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
) -> Setup[EdgePoint]:
    axes = _axes(settings)
    gguf = loaded is None and settings.draft.endswith(".gguf")
    device = _llamacpp_device(settings) if gguf else _torch_device(settings, loaded)
    sweep = settings.sweep or (QUICK if settings.grid == "quick" else STANDARD)
    shooter = DrafterShooter(
        device.drafter,
        device.model.vocab_size,
        settings.sampling,
        seed=sweep.seed,
        clock=clock,
        synchronize=device.synchronize,
        sleep=sleep,
    )
    shots = edge_shots(axes, device.model.max_context)
    steps = [shot for shot in shots if shot.kind == "draft_step"]
    sentinel = replace(steps[len(steps) // 2], key="sentinel", kind="sentinel")
    return Setup(
        "edge",
        shooter,
        shots,
        sentinel,
        pilot(shooter, shots, sentinel, sweep, clock),
        sweep,
        device.model,
        device.engine,
        measure={"grid": settings.grid, "axes": _plain(axes)},
        after_s=axes.burst_s + axes.sustained_s,
    )


def _plain(axes: EdgeAxes) -> dict[str, Any]:
    """As JSON gives it back."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(axes).items()}


def _summary(rows: Sequence[EdgeRow], sensor: str) -> dict[str, Any]:
    """Speeds by their usual names: tokens/s in a burst, sustained, of prefill; J per drafted token; ms that
    a rest adds to the round after it."""
    found: dict[str, Any] = {"energy_sensor": sensor}
    for row in rows:
        if row.kind in ("burst", "sustained"):
            found[f"{row.kind}_tokens_per_s"] = round(1000 / row.median_ms, 2)
        if row.kind == "energy":
            found["energy_j_per_token"] = row.energy_j
    rounds = [row.context for row in rows if row.kind == "round"]
    if rounds:
        added = statistics.median(resume_ms(rows, context) for context in rounds)
        found["resume_ms"] = round(added, 3)
    prefills = [row for row in rows if row.kind == "prefill"]
    if prefills:
        best = max(row.tokens / row.median_ms for row in prefills)
        found["prefill_tokens_per_s"] = round(1000 * best, 1)
    return found
