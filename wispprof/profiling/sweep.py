"""Measure many workloads: plan, measure a block, log it, refine, stop at the announced time.

The sweep passes over all workloads several times, in a new random order each time, and takes a few samples
of each. So a slow phase of the machine affects all workloads alike. Later passes skip workloads whose
median is known well enough. The clock is injected, so tests run hours of a sweep in no time.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from wispprof.artifacts.journal import RowJournal
from wispprof.artifacts.median_interval import half_width
from wispprof.artifacts.rows import Row
from wispprof.errors import EngineError
from wispprof.hardware import Sensors
from wispprof.profiling.measurement_log import MeasurementLog
from wispprof.profiling.sweep_cost import CostModel
from wispprof.profiling.workload import Runner, Workload, format_duration, run_repeatedly
from wispprof.settings.profiler_settings import SweepSettings
from wispprof.types import Progress

Subject = TypeVar("Subject")

_REFINE_SHARE = 1.15
"""Share of the announced time after which workloads get no more than ``min_samples``."""
_PASS_SEED = 1_000_003


@dataclass(frozen=True)
class SweepResult:
    """All rows (resumed ones too) with their flags, in the order of measurement.

    ``refused``: key of each workload that the backend could not run, with the reason. ``seconds``: duration
    of this run. ``expected_s``: time announced at its start; ``None`` without a pilot. ``out_of_time``:
    number of workloads without any measurement.
    """

    rows: tuple[Row, ...]
    seconds: float
    expected_s: float | None
    refused: dict[str, str] = field(default_factory=dict)
    out_of_time: int = 0


class Sweep(Generic[Subject]):
    """Measures ``workloads`` with ``runner`` and appends each block to ``journal`` at once.

    Blocks that are in the journal already are not repeated. ``cost``: cost model of a pilot. With it, the
    sweep keeps to the time that it announces: it skips refinement, but no workload's ``min_samples``. It
    never exceeds ``budget_s`` as long as blocks cost what they did before. If time is left at the end, it
    measures the workloads of ``spare``, too, in their order, as far as they fit. An exception or Ctrl-C
    leaves every finished block in the journal.
    """

    def __init__(
        self,
        runner: Runner[Subject],
        workloads: Sequence[Workload[Subject]],
        settings: SweepSettings,
        *,
        sentinel: Workload[Subject] | None = None,
        journal: RowJournal | None = None,
        sensors: Sensors | None = None,
        clock: Callable[[], float] = time.perf_counter,
        progress: Progress | None = None,
        cost: CostModel[Subject] | None = None,
        budget_s: float | None = None,
        spare: Sequence[Workload[Subject]] = (),
    ) -> None:
        if len({workload.key for workload in workloads}) != len(workloads):
            raise ValueError("workload keys must be distinct")
        self._runner, self._settings, self._sentinel = runner, settings, sentinel
        self._workloads = sorted(workloads, key=lambda workload: workload.key)
        self._journal, self._sensors = journal, sensors or Sensors()
        self._log = MeasurementLog(settings.drift, journal.rows if journal else ())
        self._clock, self._progress = clock, progress or (lambda done, total, status: None)
        self._has_pilot = cost is not None
        self._cost: CostModel[Subject] = cost if cost is not None else CostModel(settings)
        self._budget_s = math.inf if budget_s is None else budget_s
        self._spare = list(spare)
        self._refused: dict[str, str] = {}
        self._out_of_time: set[str] = set()
        self._blocks_since_reference = settings.sentinel_every
        self._blocks_done = 0
        self._last_estimate: tuple[float, int, float] | None = None
        self._begin = 0.0
        self._announced_s: float | None = None

    def run(self) -> SweepResult:
        self._begin = begin = self._clock()
        announced_s = min(self._remaining()[1], self._budget_s) if self._has_pilot else None
        self._announced_s = announced_s
        deadline = begin + self._budget_s
        refine_until = deadline
        if announced_s is not None:
            refine_until = min(deadline, begin + _REFINE_SHARE * announced_s)
        with _no_garbage_collection():
            while unfinished := self._unfinished():
                self._measure_pass(unfinished, deadline, refine_until)
            while self._add_spare(deadline):
                while unfinished := self._unfinished():
                    self._measure_pass(unfinished, deadline, deadline)
            if self._blocks_done:
                self._measure_sentinel()
        return self._result()

    def measure_again(self, keys: Collection[str]) -> SweepResult | None:
        """After :meth:`run`: one more block of each of these workloads. ``None`` if none fits the budget."""
        deadline, done = self._begin + self._budget_s, self._blocks_done
        samples = self._settings.block + self._settings.warmup
        with _no_garbage_collection():
            for workload in (workload for workload in self._workloads if workload.key in keys):
                if not self._fits(workload, deadline, samples):
                    continue
                self._measure_sentinel()
                status = f"measuring again  {workload.key}"
                self._progress(self._blocks_done, self._blocks_done + 1, status)
                self._measure_block(workload, self._settings.warmup, self._settings.block)
                self._blocks_done += 1
            if self._blocks_done == done:
                return None
            self._measure_sentinel()
        return self._result()

    def _result(self) -> SweepResult:
        self._progress(self._blocks_done, self._blocks_done, "done")
        rows = self._log.rows(self._settings.min_samples, self._settings.target)
        missing = sum(self._log.block_count(key) == 0 for key in self._out_of_time)
        seconds = self._clock() - self._begin
        return SweepResult(rows, seconds, self._announced_s, self._refused, missing)

    def _measure_pass(
        self, unfinished: list[Workload[Subject]], deadline: float, refine_until: float
    ) -> None:
        """Measure a block of each workload that has the fewest, in random order."""
        fewest = min(self._log.block_count(workload.key) for workload in unfinished)
        chosen = [w for w in unfinished if self._log.block_count(w.key) == fewest]
        random.Random(self._settings.seed * _PASS_SEED + fewest).shuffle(chosen)
        for workload in chosen:
            if self._is_finished(workload):
                continue  # a newer reference measurement cleared its blocks
            until = deadline if self._below_min(workload) else refine_until
            if not self._fits(workload, until, self._block(workload) + self._warmup(workload)):
                self._out_of_time.add(workload.key)
                continue
            if self._blocks_since_reference >= self._settings.sentinel_every:
                self._measure_sentinel()
            self._report_progress(workload)
            try:
                self._measure_block(workload, self._warmup(workload), self._block(workload))
            except EngineError as err:
                self._refused[workload.key] = str(err)
                continue
            self._blocks_done += 1
            self._blocks_since_reference += 1

    # --- what is left to do -------------------------------------------------------------------

    def _unfinished(self) -> list[Workload[Subject]]:
        skipped = self._out_of_time | self._refused.keys()
        return [w for w in self._workloads if w.key not in skipped and not self._is_finished(w)]

    def _add_spare(self, deadline: float) -> bool:
        """Add the first spare workload that is expected to be finished in time."""
        reference_s = self._cost.reference_s(self._sentinel) if self._sentinel is not None else 0.0
        while self._spare:
            workload = self._spare.pop(0)
            blocks, seconds = self._cost.remaining(workload)
            references = blocks // self._settings.sentinel_every + 2
            if self._clock() + seconds + references * reference_s <= deadline:
                self._workloads.append(workload)
                return True
        return False

    def _is_finished(self, workload: Workload[Subject]) -> bool:
        if self._below_min(workload):
            return False
        settings = self._settings
        taken, clean = self._log.samples(workload.key), self._log.clean_samples(workload.key)
        if len(taken) >= settings.max_samples or self._is_spent(taken):
            return True
        return len(clean) >= settings.min_samples and half_width(clean) <= settings.target

    def _below_min(self, workload: Workload[Subject]) -> bool:
        taken = self._log.samples(workload.key)
        return len(taken) < self._settings.min_samples and not self._is_spent(taken)

    def _is_spent(self, samples: Sequence[float]) -> bool:
        return sum(samples) / 1000 > self._settings.max_workload_s

    def _fits(self, workload: Workload[Subject], until: float, samples: int) -> bool:
        """Whether a block of ``samples`` and the last reference measurement end before ``until``."""
        if until == math.inf:
            return True
        need_s = self._cost.block_s(workload, samples)
        if self._sentinel is not None:
            references = 2 if self._blocks_since_reference >= self._settings.sentinel_every else 1
            need_s += references * self._cost.reference_s(self._sentinel)
        return self._clock() + need_s <= until

    def _remaining(self) -> tuple[int, float]:
        """Blocks and seconds until all workloads are finished."""
        log = self._log
        states = [
            (workload, log.clean_samples(workload.key), len(log.samples(workload.key)))
            for workload in self._unfinished()
        ]
        return self._cost.total(states, self._sentinel)

    def _report_progress(self, workload: Workload[Subject]) -> None:
        """Report the ETA. Estimates it once a second at most, because that scans all workloads."""
        now = self._clock()
        if self._last_estimate is None or now - self._last_estimate[0] > 1.0:
            blocks, seconds = self._remaining()
            self._last_estimate = now, self._blocks_done + blocks, seconds
        estimated_at, blocks, seconds = self._last_estimate
        status = f"ETA {format_duration(seconds - (now - estimated_at))}  {workload.key}"
        self._progress(self._blocks_done, max(blocks, self._blocks_done + 1), status)

    # --- doing it -----------------------------------------------------------------------------

    def _measure_sentinel(self) -> None:
        if self._sentinel is not None:
            settings = self._settings
            self._measure_block(self._sentinel, settings.reference_warmup, settings.reference_samples)
        self._blocks_since_reference = 0

    def _block(self, workload: Workload[Subject]) -> int:
        left = self._settings.max_samples - len(self._log.samples(workload.key))
        return max(1, min(self._settings.block, left))

    def _warmup(self, workload: Workload[Subject]) -> int:
        warmup = self._settings.warmup
        return min(1, warmup) if self._log.block_count(workload.key) else warmup

    def _measure_block(self, workload: Workload[Subject], warmup: int, count: int) -> None:
        begin = self._clock()
        runs = run_repeatedly(
            self._runner, workload, warmup, count, self._settings, self._clock, self._sensors
        )
        flags = ("throttled",) if runs.throttled else ()
        row = self._runner.row(workload, tuple(runs.samples), flags, self._log.next_order)
        if self._journal is not None:
            self._journal.append(row)
        self._log.add(row)
        self._cost.observe(workload, self._clock() - begin, runs)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Disable garbage collection: within a step it would be timed as part of the step."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
