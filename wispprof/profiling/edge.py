"""profile-edge: what drafting costs on this device.

Draft steps by context length (features and sampling included) and the bare forward beside them, prefill
speed, the controller's own time, then two windows of steady drafting: a burst, and a sustained one that
shows what is left when the device is warm. Energy is counted over the sustained window, or the burst.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from wispprof.artifacts import EdgeProfile, EdgeRow, ModelInfo, RowJournal, bundled
from wispprof.core import Drafter, Sampling
from wispprof.errors import PhysicsViolation, ProfileError
from wispprof.hardware import EnergyMeter, Sensors, energy_meter, sensors
from wispprof.profiling.drafting import (
    EDGE_GRIDS,
    ROUND,
    DrafterShooter,
    EdgeAxes,
    EdgePoint,
    edge_shots,
)
from wispprof.profiling.expectation import expectation
from wispprof.profiling.session import Announcement, Output, begin_manifest, open_journal, seal
from wispprof.profiling.sweep import (
    Progress,
    Shot,
    Sweep,
    SweepSettings,
    plan_seconds,
    significant,
)

if TYPE_CHECKING:
    from wispprof.lm.loading import LoadedModel

__all__ = [
    "EDGE_GRIDS",
    "DrafterShooter",
    "EdgeAxes",
    "EdgePoint",
    "EdgeSettings",
    "edge_shots",
    "plan_edge",
    "profile_edge",
]

BUNDLED_DRAFT = "models/reference-pair/draft"
QUICK = SweepSettings(target=0.05, most=20, shot_s=1.0, sentinel_every=5)


@dataclass(frozen=True)
class EdgeSettings:
    """``draft``: folder, hub id, ``.gguf`` file (llama.cpp), or empty for the bundled draft.
    ``sustained_s`` replaces the grid's."""

    draft: str = ""
    dtype: str = "float32"
    device: str = "auto"
    grid: str = "quick"
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
) -> EdgeProfile:
    """Measure, check, and (with an output path) write an edge profile. Ctrl-C keeps finished rows."""
    if progress is not None:
        progress(0, 1, "loading the draft, timing a few steps")
    setup = _set_up(settings, loaded, clock)
    measure = {"grid": settings.grid, "sustained_s": setup.axes.sustained_s}
    manifest = begin_manifest(
        "edge", setup.model, setup.sweep, engine=setup.engine, measure=measure
    )
    device = setup.engine["device"]
    with open_journal(settings.output, manifest) as journal:
        windows = _Windows(setup, sensors(device), energy_meter(device), clock, journal)
        count, extra = len(setup.shots), windows.count
        report = progress or (lambda done, total, status: None)
        sweep = Sweep(
            setup.shooter,
            setup.shots,
            setup.sweep,
            sentinel=setup.sentinel,
            journal=journal,
            sensors=sensors(device),
            clock=clock,
            progress=lambda done, total, status: report(done, total + extra, status),
            expect_s=setup.expect_s,
        )
        result = sweep.run()
        rows = windows.run(
            result.rows, lambda done, what: report(count + done, count + extra, what)
        )
        report(count + extra, count + extra, "done")
        _check(rows)
        whole = replace(result, rows=rows)
        profile = seal(manifest, whole, settings.output, journal, _summary(rows, windows.sensor))
    return cast(EdgeProfile, profile)


def plan_edge(
    settings: EdgeSettings,
    *,
    loaded: LoadedModel | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Announcement:
    """A dry run: the shots and what they, and the windows after them, are expected to take."""
    setup = _set_up(settings, loaded, clock)
    seconds = plan_seconds(setup.shots, setup.sentinel, setup.sweep, setup.expect_s)
    windows = setup.axes.burst_s + setup.axes.sustained_s
    return Announcement(tuple(setup.shots), seconds + windows)


@dataclass(frozen=True)
class _Setup:
    shooter: DrafterShooter
    shots: list[Shot[EdgePoint]]
    sentinel: Shot[EdgePoint]
    expect_s: Callable[[Shot[EdgePoint]], float]
    sweep: SweepSettings
    axes: EdgeAxes
    model: ModelInfo
    engine: dict[str, Any]


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
    names = ModelInfo.__dataclass_fields__
    known = {k: v for k, v in loaded.info.as_dict().items() if k in names}
    return _Device(
        TorchDrafter(loaded),
        ModelInfo(**cast("dict[str, Any]", known)),
        {"backend": "torch", "device": str(device), "threads": torch.get_num_threads()},
        torch.cuda.synchronize if device.type == "cuda" else (lambda: None),
    )


def _llamacpp_device(settings: EdgeSettings) -> _Device:
    from wispprof.profiling.llamacpp import LlamaCppDrafter

    gpu_layers = 0 if settings.device == "cpu" else -1
    drafter = LlamaCppDrafter(Path(settings.draft), gpu_layers=gpu_layers)
    device = settings.device if settings.device != "auto" else "cpu"
    engine = {"backend": "llama.cpp", "device": device, "gpu_layers": gpu_layers}
    return _Device(drafter, drafter.info, engine)


def _set_up(
    settings: EdgeSettings, loaded: LoadedModel | None, clock: Callable[[], float]
) -> _Setup:
    if settings.grid not in EDGE_GRIDS:
        raise ProfileError(
            f"There is no edge grid {settings.grid!r}.", f"Use {', '.join(EDGE_GRIDS)}."
        )
    gguf = loaded is None and settings.draft.endswith(".gguf")
    device = _llamacpp_device(settings) if gguf else _torch_device(settings, loaded)
    axes = EDGE_GRIDS[settings.grid]
    if settings.sustained_s is not None:
        axes = replace(axes, sustained_s=settings.sustained_s)
    sweep = settings.sweep or (QUICK if settings.grid == "quick" else SweepSettings())
    shooter = DrafterShooter(
        device.drafter,
        device.model.vocab_size,
        settings.sampling,
        seed=sweep.seed,
        clock=clock,
        synchronize=device.synchronize,
    )
    shots = edge_shots(axes, device.model.max_context)
    steps = [shot for shot in shots if shot.kind == "draft_step"]
    sentinel = replace(steps[len(steps) // 2], key="sentinel", kind="sentinel")
    expect_s = expectation(shooter, shots, sentinel, sweep, clock)
    return _Setup(shooter, shots, sentinel, expect_s, sweep, axes, device.model, device.engine)


class _Windows:
    """Steady drafting for a while, after the sweep: burst, sustained, and the energy of the longer."""

    def __init__(
        self,
        setup: _Setup,
        look: Sensors,
        meter: EnergyMeter,
        clock: Callable[[], float],
        journal: RowJournal | None,
    ) -> None:
        self._setup, self._look, self._meter = setup, look, meter
        self._clock, self._journal = clock, journal
        axes = setup.axes
        spans = {"burst": axes.burst_s, "sustained": axes.sustained_s}
        self._spans = {kind: span for kind, span in spans.items() if span > 0}
        self._context = setup.sentinel.subject.context

    @property
    def count(self) -> int:
        return len(self._spans)

    @property
    def sensor(self) -> str:
        return self._meter.sensor

    def run(self, rows: Sequence[Any], report: Callable[[int, str], None]) -> tuple[EdgeRow, ...]:
        done = list(cast("Sequence[EdgeRow]", rows))
        have = {row.kind for row in done}
        longest = max(self._spans.values(), default=0.0)
        for number, (kind, span) in enumerate(self._spans.items()):
            if kind in have:
                continue  # of the run that is being resumed
            report(number, f"{kind} drafting, {span:.0f} s")
            order = max((row.order for row in done), default=-1) + 1
            window, energy = self._window(kind, span, order)
            made = [energy, window] if span == longest else [window]
            for row in made:
                if self._journal is not None:
                    self._journal.append(row)
                done.append(row)
        return tuple(sorted(done, key=lambda row: row.order))

    def _window(self, kind: str, span: float, order: int) -> tuple[EdgeRow, EdgeRow]:
        shooter, context = self._setup.shooter, self._context
        shooter.hold(context)
        samples: list[float] = []
        self._meter.begin()
        begin = now = self._clock()
        while now - begin < span or not samples:
            shooter.round(context)
            before, now = now, self._clock()
            samples.append(significant((now - before) * 1000 / ROUND))
        used, state = self._meter.end(), self._look.read()
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
        energy = EdgeRow(
            f"energy {span:g} s", "energy", context, mean, energy_j=joules, order=order
        )
        return window, energy


def _check(rows: Sequence[EdgeRow]) -> None:
    """A draft step contains its forward; more prompt takes longer. What contradicts it is refused.

    Fastest samples are compared: a busy machine only adds time.
    """
    steps = {row.context: row for row in rows if row.kind == "draft_step"}
    bare = {row.context: row for row in rows if row.kind == "forward"}
    pairs = [(steps[c], bare[c]) for c in steps if c in bare]
    cheaper = [(s, f) for s, f in pairs if min(s.samples_ms) < 0.5 * min(f.samples_ms)]
    if pairs and len(cheaper) == len(pairs):
        step, forward = cheaper[0]
        raise PhysicsViolation(
            f"A draft step over {step.context} tokens takes {min(step.samples_ms):.3f} ms, its bare "
            f"forward {min(forward.samples_ms):.3f} ms.",
            "The draft step is probably timed without doing its work.",
        )
    prefills = sorted((r for r in rows if r.kind == "prefill" and not r.context), key=_tokens)
    if len(prefills) >= 2 and prefills[-1].tokens >= 4 * prefills[0].tokens:
        short, long = prefills[0], prefills[-1]
        if min(long.samples_ms) < 1.05 * min(short.samples_ms) and long.tokens >= 256:
            raise PhysicsViolation(
                f"Prefilling {long.tokens} tokens takes {min(long.samples_ms):.3f} ms, {short.tokens} take "
                f"{min(short.samples_ms):.3f} ms.",
                "The backend seems to ignore its prompt: do not trust these times.",
            )


def _tokens(row: EdgeRow) -> int:
    return row.tokens


def _summary(rows: Sequence[EdgeRow], sensor: str) -> dict[str, Any]:
    """Speeds by their usual names: tokens/s in a burst, sustained, of prefill; J per drafted token."""
    found: dict[str, Any] = {"energy_sensor": sensor}
    for row in rows:
        if row.kind in ("burst", "sustained"):
            found[f"{row.kind}_tokens_per_s"] = round(1000 / row.median_ms, 2)
        if row.kind == "energy":
            found["energy_j_per_token"] = row.energy_j
    prefills = [row for row in rows if row.kind == "prefill"]
    if prefills:
        best = max(row.tokens / row.median_ms for row in prefills)
        found["prefill_tokens_per_s"] = round(1000 * best, 1)
    return found
