"""profile-edge: what drafting costs on this device.

Draft steps by context length (features and sampling included) and the bare forward beside them, prefill
speed, the controller's own time, then two windows of steady drafting: a burst, and a sustained one that
shows what is left when the device is warm. Energy is counted over the sustained window, or the burst.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from wispprof.artifacts import EdgeProfile, EdgeRow, ModelInfo, RowJournal, bundled
from wispprof.core import Drafter, DraftFeatures, Sampling
from wispprof.errors import PhysicsViolation, ProfileError
from wispprof.hardware import EnergyMeter, Sensors, energy_meter, sensors
from wispprof.policies.api import RoundContext
from wispprof.policies.controllers import WispController
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
    "EdgePoint",
    "EdgeSettings",
    "plan_edge",
    "profile_edge",
]

BUNDLED_DRAFT = "models/reference-pair/draft"
_ROUND = 8
"""Tokens drafted before a roll back in the windows, as a round does."""
_DECISIONS = 200


@dataclass(frozen=True)
class EdgePoint:
    """What one shot measures: see :class:`~wispprof.artifacts.records.EdgeRow` for the kinds."""

    context: int
    tokens: int = 1


@dataclass(frozen=True)
class EdgeAxes:
    """``contexts`` of draft steps, ``chunks`` of prefill over nothing and over ``chunk_context``;
    windows in seconds (0: none)."""

    contexts: tuple[int, ...]
    chunks: tuple[int, ...]
    chunk_context: int
    burst_s: float
    sustained_s: float


EDGE_GRIDS: dict[str, EdgeAxes] = {
    "quick": EdgeAxes((64, 256, 1024), (64, 256), 256, 2.0, 0.0),
    "standard": EdgeAxes((16, 64, 128, 256, 512, 1024, 2048), (16, 64, 256, 512), 512, 5.0, 60.0),
    "full": EdgeAxes(
        (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384),
        (16, 32, 64, 128, 256, 512, 1024),
        1024,
        10.0,
        300.0,
    ),
}
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


class DrafterShooter:
    """Fires points at a drafter. The drafter must offer ``prefill`` and ``forward`` beside
    :class:`~wispprof.core.Drafter`, as :class:`~wispprof.lm.draft.TorchDrafter` does."""

    def __init__(
        self,
        drafter: Drafter,
        vocabulary: int,
        sampling: Sampling,
        *,
        seed: int = 0,
        clock: Callable[[], float] = time.perf_counter,
        synchronize: Callable[[], None] = lambda: None,
    ) -> None:
        self._drafter, self._vocabulary, self._sampling = drafter, vocabulary, sampling
        self._clock, self._synchronize = clock, synchronize
        self._random = random.Random(seed)
        self._fire: Callable[[], None] = lambda: None
        self._restore: Callable[[], None] = lambda: None
        self._per_fire = 1

    def prepare(self, shot: Shot[EdgePoint]) -> None:
        point, drafter = shot.subject, cast(Any, self._drafter)
        context = max(1, point.context)
        if shot.kind == "controller":
            self._prepare_controller()
            return
        self.hold(context)
        self._per_fire = 1
        if shot.kind == "prefill":
            chunk = self.tokens(point.tokens + 1)  # the last one waits for the next draft
            drafter.extend(chunk)
            self._fire = drafter.prefill

            def restore() -> None:
                drafter.rollback(context)
                drafter.extend(chunk)

            self._restore = restore
        else:
            self._fire = drafter.forward if shot.kind == "forward" else drafter.draft
            self._restore = lambda: drafter.rollback(context)

    def hold(self, context: int) -> None:
        """A sequence of ``context`` tokens, all of them in the draft's cache."""
        drafter = cast(Any, self._drafter)
        drafter.open(self.tokens(context), self._sampling)
        drafter.prefill()
        drafter.draft()
        drafter.rollback(context)

    def fire(self) -> float:
        self._synchronize()
        begin = self._clock()
        self._fire()
        self._synchronize()
        elapsed = self._clock() - begin
        self._restore()
        return elapsed * 1000 / self._per_fire

    def finish(self) -> None:
        self._fire = self._restore = lambda: None

    def row(
        self, shot: Shot[EdgePoint], samples: tuple[float, ...], flags: tuple[str, ...], order: int
    ) -> EdgeRow:
        point = shot.subject
        return EdgeRow(
            shot.key, shot.kind, point.context, samples, point.tokens, flags=flags, order=order
        )

    def round(self, context: int) -> None:
        """One round of steady drafting from ``context``."""
        for _ in range(_ROUND):
            self._drafter.draft()
        self._synchronize()
        self._drafter.rollback(context)

    def tokens(self, count: int) -> list[int]:
        return [self._random.randrange(self._vocabulary) for _ in range(count)]

    def _prepare_controller(self) -> None:
        """The wisp controller with the predictor that stands in until one is fitted."""
        controller = WispController(k_max=_DECISIONS + 1, threshold=0.0)
        context = RoundContext(draft_ms=10.0, rtt_ms=20.0, server_ms=20.0)
        seen = DraftFeatures(0.7, 1.2, 1.5, 2.0)

        def decide() -> None:
            controller.begin(context)
            for depth in range(_DECISIONS):
                controller.go_on(depth, seen)

        self._fire, self._restore, self._per_fire = decide, lambda: None, _DECISIONS


def edge_shots(axes: EdgeAxes, most_context: int) -> list[Shot[EdgePoint]]:
    """Every point that the draft's context has room for."""
    shots = [_shot("controller", EdgePoint(0))]
    for context in axes.contexts:
        if context + _ROUND < most_context:
            shots += [_shot(kind, EdgePoint(context)) for kind in ("draft_step", "forward")]
    for chunk in axes.chunks:
        for context in (0, axes.chunk_context):
            if context + chunk + 2 < most_context:
                shots.append(_shot("prefill", EdgePoint(context, chunk)))
    if len(shots) < 3:
        raise ProfileError(
            f"The draft's context of {most_context} tokens is too short for this grid.",
            "Choose another draft model.",
        )
    return shots


def _shot(kind: str, point: EdgePoint) -> Shot[EdgePoint]:
    work = (1.0, float(point.tokens), float(point.context * point.tokens))
    name = f"{kind} {point.tokens}@{point.context}"
    return Shot(name, kind, point, (1e-3, 0.0, 0.0) if kind == "controller" else work)


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
            samples.append(significant((now - before) * 1000 / _ROUND))
        used, state = self._meter.end(), self._look.read()
        drafted = len(samples) * _ROUND
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
