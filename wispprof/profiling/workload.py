"""What a sweep measures (:class:`Workload`), what runs it (:class:`Runner`), and how one block is measured.

Nothing here depends on a model: a runner prepares a workload, runs it and returns milliseconds.
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
    "format_duration",
    "round_ms",
    "run_repeatedly",
]

Subject = TypeVar("Subject")

MIN_BLOCK_SAMPLES = 3
"""Samples that a block yields even if they take longer than ``max_workload_s``."""


@dataclass(frozen=True)
class Workload(Generic[Subject]):
    """One thing to measure. ``key`` is unique within a sweep and stable between runs.

    ``work``: quantities that the time grows with. They predict the time and pick informative workloads; the
    first is 1, for the constant cost. ``rest_s``: idle time before each run. It counts towards
    the expected time, but not in the samples.
    """

    key: str
    kind: str
    subject: Subject
    work: tuple[float, ...] = (1.0,)
    rest_s: float = 0.0


class Runner(Protocol[Subject]):
    """Runs workloads. ``prepare`` and ``finish`` enclose the runs of one block."""

    def prepare(self, workload: Workload[Subject]) -> None: ...

    def run_once(self) -> float:
        """Run the prepared workload; returns milliseconds. Leaves the state as it was before."""

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
    """``target``: half-width of the 95 % confidence interval of the median, relative to the median.

    A workload is measured in blocks of ``block`` samples until it reaches ``target``. It gets
    ``min_samples`` to ``max_samples``, and no further block once its samples took ``max_workload_s``
    seconds. The first block starts with ``warmup`` uncounted runs, later ones with one. After every
    ``sentinel_every`` blocks the sentinel workload is measured with ``reference_samples``; if its median is
    more than ``drift`` away from the others, the neighbouring blocks count as disturbed.
    """

    seed: int = 0
    target: float = 0.03
    warmup: int = 2
    block: int = 3
    min_samples: int = 6
    max_samples: int = 30
    max_workload_s: float = 4.0
    sentinel_every: int = 10
    reference_samples: int = 6
    drift: float = 0.10

    def __post_init__(self) -> None:
        counts = (self.block, self.min_samples, self.sentinel_every, self.reference_samples)
        if not (0 < self.target < 1 and min(counts) >= 1 and self.min_samples <= self.max_samples):
            raise ValueError(f"invalid sweep settings: {self}")

    @property
    def reference_warmup(self) -> int:
        """Uncounted runs of the sentinel. Short measurements are frequent, so they need only one."""
        return min(1 if self.reference_samples < self.min_samples else self.warmup, self.warmup)


class RunSamples(NamedTuple):
    """One block, in ms: runs that warmed up, runs that count; whether the device throttled."""

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
    """Measure one block: prepare, warm up, run ``count`` times.

    Stops early after ``max_workload_s``, but not before :data:`MIN_BLOCK_SAMPLES`.
    """
    try:
        runner.prepare(workload)
        begin = clock()
        warming: list[float] = []
        while len(warming) < warmup and clock() - begin <= settings.max_workload_s / 2:
            warming.append(round_ms(runner.run_once()))
        samples: list[float] = []
        while len(samples) < count and (
            len(samples) < MIN_BLOCK_SAMPLES or clock() - begin <= settings.max_workload_s
        ):
            samples.append(round_ms(runner.run_once()))
        # Read the sensors while the device is still hot.
        return RunSamples(warming, samples, bool(sensors.read().throttled))
    finally:
        runner.finish()


def round_ms(ms: float) -> float:
    """Six significant digits: finer than any clock used here, and rows stay short."""
    return float(f"{ms:.6g}")


def format_duration(seconds: float) -> str:
    """``1:05``, or ``2:01:05`` from one hour."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
