"""The sweep engine: shots in random order, repeated until their median is known, with drift in view.

It knows nothing of models: a *shooter* prepares a shot, fires it once and returns milliseconds. Time
comes from an injected clock, so tests run a sweep of hours in no time.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, TypeVar

from wispprof.artifacts.journal import RowJournal
from wispprof.artifacts.rows import Row
from wispprof.errors import EngineError
from wispprof.hardware import NullSensors, Sensors
from wispprof.profiling.stats import half_width

__all__ = [
    "Progress",
    "Shooter",
    "Shot",
    "Sweep",
    "SweepResult",
    "SweepSettings",
    "drift_summary",
    "duration",
    "flag_drift",
    "plan_seconds",
    "repeat",
    "significant",
]

Progress = Callable[[int, int, str], None]
"""Called with (shots done, shots in all, a few words with the ETA)."""

Subject = TypeVar("Subject")


@dataclass(frozen=True)
class Shot(Generic[Subject]):
    """One thing to measure. ``key`` is unique in a sweep and stable between runs.

    ``work``: numbers that its time grows with, for the expected time and for choosing informative
    shots; the first is 1 (what a shot costs whatever it holds).
    """

    key: str
    kind: str
    subject: Subject
    work: tuple[float, ...] = (1.0,)


class Shooter(Protocol[Subject]):
    """What a sweep measures with. ``prepare`` and ``finish`` frame the repeats of one shot."""

    def prepare(self, shot: Shot[Subject]) -> None: ...

    def fire(self) -> float:
        """Do it once; returns milliseconds. The next call finds the same state again."""

    def finish(self) -> None: ...

    def row(
        self, shot: Shot[Subject], samples: tuple[float, ...], flags: tuple[str, ...], order: int
    ) -> Row: ...


@dataclass(frozen=True)
class SweepSettings:
    """``target``: half-width of the 95 % confidence interval of the median, relative to it.

    A shot is repeated ``least`` to ``most`` times, and no further once it took ``shot_s`` seconds
    (but three times at least). Every ``sentinel_every`` shots the sentinel is measured again; a
    sentinel further than ``drift`` from the others marks the shots beside it.
    """

    seed: int = 0
    target: float = 0.03
    warmup: int = 2
    least: int = 6
    most: int = 30
    shot_s: float = 4.0
    sentinel_every: int = 10
    drift: float = 0.10

    def __post_init__(self) -> None:
        if not (0 < self.target < 1 and 1 <= self.least <= self.most and self.sentinel_every >= 1):
            raise ValueError(f"impossible sweep settings: {self}")


@dataclass(frozen=True)
class SweepResult:
    """Every row there is now (resumed ones too), drift flags set, in the order of measurement.

    ``refused``: shots the backend could not do, with its reason. ``seconds``: this run alone.
    ``expected_s``: what was announced when it began.
    """

    rows: tuple[Row, ...]
    seconds: float
    expected_s: float
    refused: dict[str, str] = field(default_factory=dict)
    out_of_time: int = 0


class Sweep(Generic[Subject]):
    """Measures ``shots`` with ``shooter``; rows go to ``journal`` one by one as they are finished.

    Rows that the journal already holds are not measured again. ``budget_s`` stops the sweep between
    two shots. An exception or Ctrl-C leaves the journal complete up to the last finished row.
    """

    def __init__(
        self,
        shooter: Shooter[Subject],
        shots: Sequence[Shot[Subject]],
        settings: SweepSettings,
        *,
        sentinel: Shot[Subject] | None = None,
        journal: RowJournal | None = None,
        sensors: Sensors | None = None,
        clock: Callable[[], float] = time.perf_counter,
        progress: Progress | None = None,
        expect_s: Callable[[Shot[Subject]], float] | None = None,
        budget_s: float | None = None,
    ) -> None:
        if len({shot.key for shot in shots}) != len(shots):
            raise ValueError("shots need distinct keys")
        self._shooter, self._settings, self._sentinel = shooter, settings, sentinel
        self._journal, self._sensors = journal, sensors or NullSensors()
        self._clock, self._progress = clock, progress or (lambda done, total, status: None)
        self._expect = expect_s or (lambda shot: 1.0)
        self._budget = budget_s
        self._rows: list[Row] = list(journal.rows) if journal else []
        self._order = max((row.order for row in self._rows), default=-1) + 1
        done = {row.key for row in self._rows if row.kind != "sentinel"}
        shuffled = sorted(shots, key=lambda shot: shot.key)
        random.Random(settings.seed).shuffle(shuffled)
        self._todo = [shot for shot in shuffled if shot.key not in done]
        self._total = len(self._todo) + len(done)

    def run(self) -> SweepResult:
        begin, refused, late = self._clock(), dict[str, str](), 0
        announced = plan_seconds(self._todo, self._sentinel, self._settings, self._expect)
        expected = [self._expect(shot) for shot in self._todo]
        whole, done, eta = sum(expected), 0.0, announced
        with _no_garbage_collection():
            for index, shot in enumerate(self._todo):
                if self._budget is not None and self._clock() - begin > self._budget:
                    late = len(self._todo) - index
                    break
                if index % self._settings.sentinel_every == 0:
                    self._look_at_sentinel()
                ready = self._total - len(self._todo) + index
                self._progress(ready, self._total, f"ETA {duration(eta)}  {shot.key}")
                try:
                    self._keep(self._measure(shot))
                except EngineError as fault:
                    refused[shot.key] = str(fault)
                done += expected[index]
                # What was left when announced, at the pace seen so far.
                eta = (self._clock() - begin) * (whole - done) / max(done, 1e-9)
            if self._todo:
                self._look_at_sentinel()
        self._progress(self._total - late, self._total, "done")
        rows = flag_drift(self._rows, self._settings.drift)
        return SweepResult(rows, self._clock() - begin, announced, refused, late)

    def _look_at_sentinel(self) -> None:
        if self._sentinel is not None:
            self._keep(self._measure(self._sentinel))

    def _keep(self, row: Row) -> None:
        if self._journal is not None:
            self._journal.append(row)
        self._rows.append(row)
        self._order += 1

    def _measure(self, shot: Shot[Subject]) -> Row:
        samples, reading = repeat(self._shooter, shot, self._settings, self._clock, self._sensors)
        flags = []
        if half_width(samples) > self._settings.target:
            flags.append("noisy")
        if reading:
            flags.append("throttled")
        return self._shooter.row(shot, samples, tuple(flags), self._order)


def repeat(
    shooter: Shooter[Subject],
    shot: Shot[Subject],
    settings: SweepSettings,
    clock: Callable[[], float],
    sensors: Sensors,
) -> tuple[tuple[float, ...], bool]:
    """Prepare, warm up and fire until the median is known; returns samples and whether it throttled."""
    try:
        shooter.prepare(shot)
        begin = clock()
        for _ in range(settings.warmup):
            shooter.fire()
            if clock() - begin > settings.shot_s / 2:
                break
        samples: list[float] = []
        while len(samples) < settings.most:
            samples.append(significant(shooter.fire()))
            if len(samples) >= settings.least and half_width(samples) <= settings.target:
                break
            if len(samples) >= 3 and clock() - begin > settings.shot_s:
                break
        return tuple(samples), bool(sensors.read().throttled)  # read while it is still hot
    finally:
        shooter.finish()


def significant(ms: float) -> float:
    """Six digits: more than any clock tells, fewer than a float's seventeen on disk."""
    return float(f"{ms:.6g}")


def plan_seconds(
    shots: Iterable[Shot[Subject]],
    sentinel: Shot[Subject] | None,
    settings: SweepSettings,
    expect_s: Callable[[Shot[Subject]], float],
) -> float:
    """What a sweep of these shots is expected to take, sentinels included."""
    listed = list(shots)
    total = sum(expect_s(shot) for shot in listed)
    if sentinel is not None and listed:
        total += expect_s(sentinel) * (-(-len(listed) // settings.sentinel_every) + 1)
    return total


def flag_drift(rows: Iterable[Row], tolerance: float) -> tuple[Row, ...]:
    """Mark rows between two sentinels of which at least one is off by more than ``tolerance``.

    What the machine does undisturbed is the reference: the lower quartile of the sentinels' medians,
    since disturbance only adds time. Existing drift flags are replaced.
    """
    ordered = sorted(rows, key=lambda row: row.order)
    medians = {row.order: row.median_ms for row in ordered if row.kind == "sentinel"}
    if len(medians) < 2:
        return tuple(ordered)
    reference = statistics.quantiles(medians.values(), n=4, method="inclusive")[0]
    off = [order for order, ms in medians.items() if abs(ms / reference - 1) > tolerance]
    marks = sorted(medians)
    flagged = []
    for row in ordered:
        before = max((m for m in marks if m <= row.order), default=None)
        after = min((m for m in marks if m >= row.order), default=None)
        flags = tuple(flag for flag in row.flags if flag != "drift")
        if before in off or after in off:
            flags = (*flags, "drift")
        flagged.append(replace(row, flags=flags))
    return tuple(flagged)


def drift_summary(rows: Iterable[Row], tolerance: float) -> dict[str, float | int | bool]:
    """What the sentinels say, for the manifest: how many, their spread, how many shots are marked."""
    listed = list(rows)
    medians = [row.median_ms for row in listed if row.kind == "sentinel"]
    marked = sum("drift" in row.flags for row in listed if row.kind != "sentinel")
    worst = max(medians) / min(medians) - 1 if medians and min(medians) > 0 else 0.0
    return {
        "sentinels": len(medians),
        "tolerance": tolerance,
        "spread": round(worst, 4),
        "drifted_rows": marked,
        "drifted": marked > 0,
    }


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A collection in the middle of a step would be timed as if it belonged there."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def duration(seconds: float) -> str:
    """``1:05``, or ``2:01:05`` from an hour on."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
