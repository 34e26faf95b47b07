"""What a sweep measures (:class:`Workload`), what runs it (:class:`Runner`), and how one block is measured.

Nothing here depends on a model: a runner prepares a workload, runs it and returns milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

from wispprof.artifacts.rows import Row
from wispprof.hardware import Sensors
from wispprof.settings.profiler_settings import SweepSettings

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
        self, workload: Workload[Subject], samples: tuple[float, ...], flags: tuple[str, ...], order: int
    ) -> Row: ...


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
