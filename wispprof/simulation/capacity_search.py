"""Capacity: the most devices of a closed fleet whose SLOs a server meets, up to a share of violations.

Bracketing by doubling, then section search. All probes use one seed, and a larger fleet contains the
smaller one (common random numbers). Several processes probe several sizes at once.
"""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context

from wispprof.simulation.event_loop import simulate
from wispprof.simulation.metrics import Report
from wispprof.simulation.scenario import Scenario

Progress = Callable[[int, str], None]
"""Called with the number of finished runs and a description of the last one."""


@dataclass(frozen=True)
class CapacityResult:
    """Result of a search. ``devices``: the most with at most ``violations``, 0 if one device has more.

    ``report``: the run at ``devices`` (``None`` at 0). ``probes``: (devices, attainment) in order of size.
    ``bounded``: false if the search ended at ``most`` devices, so that the capacity may be higher.
    """

    devices: int
    violations: float
    report: Report | None
    probes: tuple[tuple[int, float], ...]
    bounded: bool


def pool(jobs: int | None = None) -> ProcessPoolExecutor | None:
    """Worker processes for :func:`capacity` and :func:`run_all`; ``None`` (run here) for one job.

    ``jobs`` ``None``: one per core. The caller shuts it down; :func:`workers` does so by itself.
    """
    jobs = jobs or os.cpu_count() or 1
    if jobs < 2:
        return None
    return ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_ignore_interrupt)


def _ignore_interrupt() -> None:
    """Ctrl-C reaches every process of a terminal; the main process ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def workers(jobs: int | None = None) -> Iterator[Executor | None]:
    """A :func:`pool` for a ``with`` block. An exception in the block, Ctrl-C included, terminates the
    workers."""
    executor = pool(jobs)
    try:
        yield executor
    except BaseException:
        if executor is not None:
            running = list((executor._processes or {}).values())
            executor.shutdown(wait=False, cancel_futures=True)
            for process in running:
                process.terminate()
        raise
    if executor is not None:
        executor.shutdown()


def run_all(
    scenarios: Sequence[Scenario], executor: Executor | None = None, progress: Progress | None = None
) -> list[Report]:
    """Reports of scenarios in their order, simulated in the executor's processes (``None``: in this one)."""
    results: Iterable[Report] = (
        map(simulate, scenarios) if executor is None else executor.map(simulate, scenarios)
    )
    reports: list[Report] = []
    for report in results:
        reports.append(report)
        if progress is not None:
            progress(len(reports), f"{report.system}: {report.attainment:.1%}")
    return reports


def capacity(
    scenario: Scenario,
    *,
    violations: float = 0.05,
    start: int = 16,
    most: int = 4096,
    tolerance: float = 0.02,
    wide: int = 1,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> CapacityResult:
    """Search the capacity of ``scenario``; its own fleet size is ignored.

    ``tolerance``: relative precision of the result (at least one device). ``wide``: sizes probed at
    once, usually the number of processes. Attainment is not strictly monotone in fleet size. The search
    returns a size that meets the limit whose next probed size does not.
    """
    if not 0 <= violations < 1 or start < 1 or most < start:
        raise ValueError("capacity needs 0 <= violations < 1 and 1 <= start <= most.")
    reports: dict[int, Report] = {}

    def probe(sizes: Sequence[int]) -> None:
        fresh = [size for size in dict.fromkeys(sizes) if size not in reports]
        found = run_all([scenario.with_devices(size) for size in fresh], executor)
        for size, report in zip(fresh, found, strict=True):
            reports[size] = report
            if progress is not None:
                progress(len(reports), f"{size} devices: {report.attainment:.1%}")

    def probe_until_missed(sizes: Sequence[int]) -> tuple[int, int]:
        """(the last size before the first that misses its SLOs, that size), 0 for either without one."""
        probe(sizes)
        met = 0
        for size in sizes:
            # Not at most: the attainment of a run too short to judge any session is NaN.
            if not reports[size].violations <= violations + 1e-12:
                return met, size
            met = size
        return met, 0

    low = high = 0
    size = start
    while not high and low < most:
        met, high = probe_until_missed([min(most, size << step) for step in range(wide)])
        low, size = met or low, size * 2
    while high - low > max(1, math.floor(tolerance * low)):
        step = (high - low) / (wide + 1)
        sizes = sorted({low + max(1, round(step * (i + 1))) for i in range(wide)} - {low, high})
        met, missed = probe_until_missed(sizes)
        low, high = met or low, missed or high
    probes = tuple((size, reports[size].attainment) for size in sorted(reports))
    return CapacityResult(low, violations, reports.get(low), probes, bounded=bool(high))
