"""Shots, who fires them, and one visit to one of them: the nouns of a sweep.

Nothing here knows of models: a *shooter* prepares a shot, fires it and returns milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

from wispprof.artifacts.rows import Row
from wispprof.hardware import Sensors

__all__ = [
    "RunSamples",
    "Runner",
    "SweepSettings",
    "Workload",
    "duration",
    "run_repeatedly",
    "significant",
]

Subject = TypeVar("Subject")

_FEW = 3


@dataclass(frozen=True)
class Workload(Generic[Subject]):
    """One thing to measure. ``key`` is unique in a sweep and stable between runs.

    ``work``: numbers that its time grows with, for the expected time and for choosing informative
    shots; the first is 1 (what a shot costs whatever it holds). ``rest_s``: how long the device does
    nothing before each fire; the expected time counts it, the samples do not.
    """

    key: str
    kind: str
    subject: Subject
    work: tuple[float, ...] = (1.0,)
    rest_s: float = 0.0


class Runner(Protocol[Subject]):
    """What a sweep measures with. ``prepare`` and ``finish`` frame the fires of one visit."""

    def prepare(self, workload: Workload[Subject]) -> None: ...

    def run_once(self) -> float:
        """Do it once; returns milliseconds. The next call finds the same state again."""

    def finish(self) -> None: ...

    def row(
        self,
        workload: Workload[Subject],
        samples: tuple[float, ...],
        flags: tuple[str, ...],
        order: int,
    ) -> Row: ...


@dataclass(frozen=True)
class SweepSettings:
    """``target``: half-width of the 95 % confidence interval of the median, relative to it.

    A shot is visited again and again, ``block`` samples at a time, until its median is that well known;
    it gives ``least`` to ``most`` samples, and no more once it took ``shot_s`` seconds (but one
    visit's at least). The first visit fires ``warmup`` times before it counts, later ones once. Every
    ``sentinel_every`` blocks comes a reference_sample at the sentinel, of ``reference_sample`` samples; one further than ``drift``
    from the others marks the visits beside it.
    """

    seed: int = 0
    target: float = 0.03
    warmup: int = 2
    block: int = 3
    least: int = 6
    most: int = 30
    shot_s: float = 4.0
    sentinel_every: int = 10
    reference_sample: int = 6
    drift: float = 0.10

    def __post_init__(self) -> None:
        counts = (self.block, self.least, self.sentinel_every, self.reference_sample)
        if not (0 < self.target < 1 and min(counts) >= 1 and self.least <= self.most):
            raise ValueError(f"impossible sweep settings: {self}")

    @property
    def reference_warmup(self) -> int:
        """Fires before a look counts; short looks are frequent ones, which keep the sentinel warm."""
        return min(1 if self.reference_sample < self.least else self.warmup, self.warmup)


class RunSamples(NamedTuple):
    """What one visit gave, ms: fires that warmed up, fires that count; whether the device throttled."""

    warming: list[float]
    samples: list[float]
    throttled: bool


def run_repeatedly(
    runner: Runner[Subject],
    workload: Workload[Subject],
    warmup: int,
    count: int,
    settings: SweepSettings,
    clock: Callable[[], float],
    sensors: Sensors,
) -> RunSamples:
    """Prepare, warm up, fire ``count`` times; a slow shot only until its time is up, but three times."""
    try:
        runner.prepare(workload)
        begin = clock()
        warming: list[float] = []
        while len(warming) < warmup and clock() - begin <= settings.shot_s / 2:
            warming.append(significant(runner.run_once()))
        samples: list[float] = []
        while len(samples) < count and (len(samples) < _FEW or clock() - begin <= settings.shot_s):
            samples.append(significant(runner.run_once()))
        # Read while it is still hot.
        return RunSamples(warming, samples, bool(sensors.read().throttled))
    finally:
        runner.finish()


def significant(ms: float) -> float:
    """Six significant digits: finer than any clock here, and rows stay short."""
    return float(f"{ms:.6g}")


def duration(seconds: float) -> str:
    """``1:05``, or ``2:01:05`` from an hour on."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
