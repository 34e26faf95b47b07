"""profile-server: times of ragged batch shapes on the verifier engine.

One master session is prefilled once to the longest context; the sessions of a shot are forks of it, and
every repeat is rolled back by length. So a shot costs its own steps and a copy of keys and values, and
each repeat meets the very state the first one met.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

from wispprof.artifacts import ModelInfo, ServerProfile, StepRow, bundled
from wispprof.core import BatchShape, Feed, Sampling
from wispprof.errors import ProfileError
from wispprof.hardware import sensors
from wispprof.profiling.expectation import expectation
from wispprof.profiling.grids import (
    Axes,
    Capacity,
    load_axes,
    server_shots,
    within_budget,
)
from wispprof.profiling.physics import check_physics
from wispprof.profiling.session import Announcement, Output, begin_manifest, open_journal, seal
from wispprof.profiling.sweep import Progress, Shot, Sweep, SweepSettings, plan_seconds

if TYPE_CHECKING:
    from wispprof.lm.engine import VerifierEngine
    from wispprof.lm.loading import LoadedModel

__all__ = ["EngineShooter", "ServerSettings", "plan_server", "profile_server"]

BUNDLED_TARGET = "models/reference-pair/target"
QUICK = SweepSettings(target=0.05, most=12, shot_s=1.5)
STANDARD = SweepSettings()
QUICK_MINUTES = 0.6

_MASTER = "profile master"
_PREFILL_CHUNK = 512


@dataclass(frozen=True)
class ServerSettings:
    """``model``: folder, hub id, or empty for the bundled target; ``shape`` names a well-known model
    shape to fill with random weights instead. ``kv_tokens`` None: what the device can hold and the
    grid can use. ``axes`` replaces the named ``grid``. ``budget_minutes`` None: no limit, but for the
    quick grid :data:`QUICK_MINUTES`, so that it stays quick on a machine that is not."""

    model: str = ""
    shape: str = ""
    dtype: str = "float32"
    device: str = "auto"
    backend: str = "auto"
    grid: str = "quick"
    axes: Axes | None = None
    kv_tokens: int | None = None
    max_sessions: int = 0
    budget_minutes: float | None = None
    sweep: SweepSettings | None = None
    output: Output = field(default_factory=Output)

    @property
    def budget_s(self) -> float | None:
        minutes = self.budget_minutes
        if minutes is None and self.grid == "quick" and self.axes is None:
            minutes = QUICK_MINUTES
        return None if minutes is None else minutes * 60


class EngineShooter:
    """Fires batch shapes at an engine. ``synchronize`` waits for the device."""

    def __init__(
        self,
        engine: VerifierEngine,
        longest: int,
        *,
        seed: int = 0,
        clock: Callable[[], float] = time.perf_counter,
        synchronize: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine, self._clock, self._synchronize = engine, clock, synchronize
        self._random = random.Random(seed)
        self._feeds: list[Feed] = []
        self._cached: list[int] = []
        self._padded = 0
        engine.open(_MASTER, Sampling())
        for start in range(0, longest, _PREFILL_CHUNK):
            chunk = self._tokens(min(_PREFILL_CHUNK, longest - start))
            engine.step([Feed(_MASTER, chunk, emit=False)])

    def prepare(self, shot: Shot[BatchShape]) -> None:
        for number, item in enumerate(shot.subject.items):
            name = f"profile {number}"
            self._engine.fork(_MASTER, name, item.cached, private=True)
            self._cached.append(item.cached)
            drafts = 0 if item.prefill else item.new - 1
            self._feeds.append(Feed(name, self._tokens(item.new), drafts, not item.prefill))

    def fire(self) -> float:
        engine = self._engine
        self._synchronize()
        begin = self._clock()
        engine.step(self._feeds)
        self._synchronize()
        elapsed = self._clock() - begin
        self._padded = engine.last_padded_tokens
        for feed, cached in zip(self._feeds, self._cached, strict=True):
            engine.rollback(feed.session, cached)
        return elapsed * 1000

    def finish(self) -> None:
        # By what is open rather than by what was planned: a refused fork leaves a part of its shot.
        for name in self._engine.sessions:
            if name != _MASTER:
                self._engine.close(name)
        self._feeds, self._cached = [], []

    def row(
        self,
        shot: Shot[BatchShape],
        samples: tuple[float, ...],
        flags: tuple[str, ...],
        order: int,
    ) -> StepRow:
        return StepRow(shot.key, shot.kind, shot.subject, samples, flags, self._padded, order)

    def close(self) -> None:
        """Give the engine back as it was."""
        self._engine.close(_MASTER)

    def _tokens(self, count: int) -> list[int]:
        return [self._random.randrange(self._engine.info.vocab_size) for _ in range(count)]


@dataclass(frozen=True)
class _Setup:
    """Everything that is decided before the first shot."""

    engine: VerifierEngine
    shooter: EngineShooter
    shots: list[Shot[BatchShape]]
    sentinel: Shot[BatchShape]
    expect_s: Callable[[Shot[BatchShape]], float]
    sweep: SweepSettings
    axes: Axes
    model: ModelInfo
    engine_settings: dict[str, Any]


def profile_server(
    settings: ServerSettings,
    progress: Progress | None = None,
    *,
    loaded: LoadedModel | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> ServerProfile:
    """Measure, check against physics, and (with an output path) write a server profile.

    ``loaded`` profiles a model that is loaded already. Ctrl-C leaves the journal with every finished
    row. Raises :class:`PhysicsViolation` where the times cannot be right; the journal is kept then.
    """
    if progress is not None:
        progress(0, 1, "loading the model, timing a few shapes")
    setup = _set_up(settings, loaded, clock)
    manifest = begin_manifest(
        "server",
        setup.model,
        setup.sweep,
        engine=setup.engine_settings,
        measure={"grid": settings.grid, "axes": _plain(setup.axes)},
    )
    with open_journal(settings.output, manifest) as journal:
        sweep = Sweep(
            setup.shooter,
            setup.shots,
            setup.sweep,
            sentinel=setup.sentinel,
            journal=journal,
            sensors=sensors(setup.engine_settings["device"]),
            clock=clock,
            progress=progress,
            expect_s=setup.expect_s,
            budget_s=settings.budget_s,
        )
        result = sweep.run()
        rows = cast("tuple[StepRow, ...]", result.rows)
        report = check_physics(rows, setup.model)
        setup.shooter.close()
        profile = seal(manifest, result, settings.output, journal, {"physics": report.as_dict()})
    return cast(ServerProfile, profile)


def plan_server(
    settings: ServerSettings,
    *,
    loaded: LoadedModel | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Announcement:
    """A dry run: load, time a few shapes, list the shots and say how long they will take."""
    setup = _set_up(settings, loaded, clock)
    setup.shooter.close()
    seconds = plan_seconds(setup.shots, setup.sentinel, setup.sweep, setup.expect_s)
    return Announcement(tuple(setup.shots), seconds)


def _set_up(
    settings: ServerSettings, loaded: LoadedModel | None, clock: Callable[[], float]
) -> _Setup:
    import torch

    from wispprof.lm.engine import VerifierEngine

    loaded = loaded or _load(settings)
    info, device = loaded.info, loaded.device
    axes = settings.axes or load_axes(settings.grid)
    sweep = settings.sweep or (QUICK if settings.grid == "quick" else STANDARD)
    context = info.max_context
    wanted = _wanted(axes, context)
    most = settings.kv_tokens or _kv_room(device, info.kv_bytes_per_token)
    longest = min(wanted.context, context)
    kv_tokens = min(most, wanted.kv_tokens + longest)
    if kv_tokens <= longest + 16:
        raise ProfileError(
            f"There is room for {kv_tokens} KV tokens, too few for contexts of {longest}.",
            "Choose shorter --cached, a smaller dtype, or free memory.",
        )
    sessions = settings.max_sessions or wanted.sessions
    engine = VerifierEngine(
        loaded, kv_tokens=kv_tokens, max_sessions=sessions + 1, backend=settings.backend
    )
    synchronize = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    shooter = EngineShooter(engine, longest, seed=sweep.seed, clock=clock, synchronize=synchronize)
    shots = server_shots(axes, Capacity(kv_tokens - longest, sessions, context))
    sentinel = _sentinel(shots)
    expect_s = expectation(shooter, shots, sentinel, sweep, clock)
    if settings.budget_s is not None:
        watch = expect_s(sentinel) / sweep.sentinel_every
        shots = within_budget(shots, settings.budget_s, [expect_s(s) + watch for s in shots])
    engine_settings = {
        "backend": engine.backend,
        "kv_tokens": kv_tokens,
        "max_sessions": sessions,
        "max_context": context,
        "device": str(device),
        "threads": torch.get_num_threads(),
    }
    model = ModelInfo(**cast("dict[str, Any]", _known(info.as_dict())))
    return _Setup(engine, shooter, shots, sentinel, expect_s, sweep, axes, model, engine_settings)


def _load(settings: ServerSettings) -> LoadedModel:
    from wispprof.lm.loading import load_model, random_model

    if settings.shape:
        return random_model(settings.shape, 0, settings.dtype, settings.device)
    model = settings.model or str(bundled.path(BUNDLED_TARGET))
    return load_model(model, settings.dtype, settings.device)


def _known(values: dict[str, object]) -> dict[str, object]:
    """Those that a manifest has a name for."""
    return {k: v for k, v in values.items() if k in ModelInfo.__dataclass_fields__}


def _wanted(axes: Axes, context: int) -> Capacity:
    """The most that the axes can use of a model with this context."""
    new = max(axes.new, default=1)
    cached = [c for c in axes.cached if c + new <= context] or [max(1, context - new)]
    chunk = max((c + k for c in axes.chunk_cached for k in axes.chunk), default=0)
    sessions = max((*axes.items, *axes.skew_items, *(n + 1 for n in axes.mixed_items)), default=1)
    longest = min(context, max(max(cached) + new, chunk))
    return Capacity(sessions * (max(cached) + new) + chunk, sessions, longest)


def _kv_room(device: Any, bytes_per_token: int) -> int:
    """KV tokens that fit into the memory that is free now, with room left for the rest."""
    import psutil
    import torch

    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] * 0.80
    else:
        free = psutil.virtual_memory().available * 0.40
    return int(free // max(1, bytes_per_token))


def _sentinel(shots: list[Shot[BatchShape]]) -> Shot[BatchShape]:
    """A shape in the middle of the grid's work: long enough to time well, short enough to repeat."""
    verify = [s for s in shots if s.kind == "verify"] or shots
    ordered = sorted(verify, key=lambda shot: (sum(shot.work), shot.key))
    middle = ordered[len(ordered) // 3]
    return replace(middle, key=f"sentinel {middle.key}", kind="sentinel")


def _plain(axes: Axes) -> dict[str, list[float]]:
    return {name: list(getattr(axes, name)) for name in Axes.__dataclass_fields__}
