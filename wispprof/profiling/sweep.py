"""The sweep engine: shots in random order, visited until their medians are known, with drift in view.

It goes through all shots several times, each time in another order and for a few samples only, so that a slow
phase of the machine falls upon all of them alike; from the third time on, only to those whose
median is not yet known well enough. Time comes from an injected clock, so tests run a sweep of hours
in no time.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from wispprof.artifacts.journal import RowJournal
from wispprof.artifacts.rows import Row
from wispprof.errors import EngineError
from wispprof.hardware import NullSensors, Sensors
from wispprof.profiling.measurement_log import MeasurementLog, half_width
from wispprof.profiling.sweep_cost import CostModel
from wispprof.profiling.workload import Runner, SweepSettings, Workload, duration, run_repeatedly

__all__ = ["Progress", "Sweep", "SweepResult"]

Progress = Callable[[int, int, str], None]
"""Called with (visits made, visits expected in all, a few words with the ETA)."""

Subject = TypeVar("Subject")

_PROMISE = 1.15
"""Share of the announced time after which no more samples are taken than each shot's least."""
_TURN = 1_000_003


@dataclass(frozen=True)
class SweepResult:
    """Every row there is now (resumed ones too), flags set, in the order of measurement.

    ``refused``: workloads the backend could not do, with its reason. ``seconds``: this run alone.
    ``expected_s``: what was announced when it began; None without a pilot. ``out_of_time``: shots that
    were not measured at all.
    """

    rows: tuple[Row, ...]
    seconds: float
    expected_s: float | None
    refused: dict[str, str] = field(default_factory=dict)
    out_of_time: int = 0


class Sweep(Generic[Subject]):
    """Measures ``workloads`` with ``runner``; what each visit gave goes to ``journal`` at once.

    Visits that the journal already holds are not made again. ``cost``: what a pilot has learned; the
    sweep then keeps to the time it announces, by giving up refinement rather than samples that every
    shot must have. ``budget_s`` is never exceeded as long as visits take what they did before. An
    exception or Ctrl-C leaves the journal complete up to the last finished visit.
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
    ) -> None:
        if len({workload.key for workload in workloads}) != len(workloads):
            raise ValueError("shots need distinct keys")
        self._shooter, self._settings, self._sentinel = runner, settings, sentinel
        self._journal, self._sensors = journal, sensors or NullSensors()
        self._clock, self._progress = clock, progress or (lambda done, total, status: None)
        self._promised = cost is not None
        self._cost: CostModel[Subject] = cost if cost is not None else CostModel(settings)
        self._budget_s = float("inf") if budget_s is None else budget_s
        self._ledger = MeasurementLog(settings.drift, journal.rows if journal else ())
        self._shots = sorted(workloads, key=lambda workload: workload.key)
        self._refused: dict[str, str] = {}
        self._skipped: set[str] = set()
        self._since_look = settings.sentinel_every
        self._made = 0
        self._told: tuple[float, int, float] | None = None

    def run(self) -> SweepResult:
        begin = self._clock()
        announced = self._left()[1] if self._promised else None
        ends = begin + self._budget_s
        refined = min(ends, begin + _PROMISE * announced) if announced is not None else ends
        with _no_garbage_collection():
            while waiting := self._waiting():
                turn = min(self._ledger.count(workload.key) for workload in waiting)
                now = [workload for workload in waiting if self._ledger.count(workload.key) == turn]
                random.Random(self._settings.seed * _TURN + turn).shuffle(now)
                for workload in now:
                    if self._done(workload):
                        continue  # a look has cleared its visits meanwhile
                    if not self._in_time(workload, ends if self._lacks(workload) else refined):
                        self._skipped.add(workload.key)
                        continue
                    self._visit_one(workload)
            if self._made:
                self._look()
        self._progress(self._made, self._made, "done")
        rows = self._ledger.rows(self._settings.least, self._settings.target)
        missing = sum(self._ledger.count(key) == 0 for key in self._skipped)
        return SweepResult(rows, self._clock() - begin, announced, self._refused, missing)

    # --- what is left to do -------------------------------------------------------------------

    def _waiting(self) -> list[Workload[Subject]]:
        gone = self._skipped | self._refused.keys()
        return [
            workload
            for workload in self._shots
            if workload.key not in gone and not self._done(workload)
        ]

    def _done(self, workload: Workload[Subject]) -> bool:
        if self._lacks(workload):
            return False
        taken, clean = self._ledger.samples(workload.key), self._ledger.clean(workload.key)
        settings = self._settings
        spent = len(taken) >= settings.most or sum(taken) / 1000 > settings.shot_s
        return spent or (len(clean) >= settings.least and half_width(clean) <= settings.target)

    def _lacks(self, workload: Workload[Subject]) -> bool:
        """Whether the least that every shot must have is not there yet."""
        taken = self._ledger.samples(workload.key)
        spent = bool(taken) and sum(taken) / 1000 > self._settings.shot_s
        return len(taken) < self._settings.least and not spent

    def _in_time(self, workload: Workload[Subject], ends: float) -> bool:
        """Whether a visit, and the last look at the sentinel, still fit before ``ends``."""
        if ends == float("inf"):
            return True
        need = self._cost.visit_s(workload, self._block(workload) + self._warmup(workload))
        if self._sentinel is not None:
            reference_samples = 2 if self._since_look >= self._settings.sentinel_every else 1
            need += reference_samples * self._cost.look_s(self._sentinel)
        return self._clock() + need <= ends

    def _left(self) -> tuple[int, float]:
        ledger = self._ledger
        have = [
            (workload, ledger.clean(workload.key), len(ledger.samples(workload.key)))
            for workload in self._waiting()
        ]
        return self._cost.plan_s(have, self._sentinel)

    # --- doing it -----------------------------------------------------------------------------

    def _visit_one(self, workload: Workload[Subject]) -> None:
        if self._since_look >= self._settings.sentinel_every:
            self._look()
        self._tell(workload)
        try:
            self._keep(workload, self._warmup(workload), self._block(workload))
        except EngineError as err:
            self._refused[workload.key] = str(err)
            return
        self._made += 1
        self._since_look += 1

    def _tell(self, workload: Workload[Subject]) -> None:
        """Progress with an ETA, reckoned anew once a second: it looks at every shot."""
        now = self._clock()
        if self._told is None or now - self._told[0] > 1.0:
            blocks, seconds = self._left()
            self._told = now, self._made + blocks, seconds
        at, blocks, seconds = self._told
        words = f"ETA {duration(seconds - (now - at))}  {workload.key}"
        self._progress(self._made, max(blocks, self._made + 1), words)

    def _look(self) -> None:
        if self._sentinel is not None:
            self._keep(
                self._sentinel, self._settings.reference_warmup, self._settings.reference_sample
            )
        self._since_look = 0

    def _block(self, workload: Workload[Subject]) -> int:
        left = self._settings.most - len(self._ledger.samples(workload.key))
        return max(1, min(self._settings.block, left))

    def _warmup(self, workload: Workload[Subject]) -> int:
        warmup = self._settings.warmup
        return min(1, warmup) if self._ledger.count(workload.key) else warmup

    def _keep(self, workload: Workload[Subject], warmup: int, count: int) -> None:
        begin = self._clock()
        fires = run_repeatedly(
            self._shooter, workload, warmup, count, self._settings, self._clock, self._sensors
        )
        flags = ("throttled",) if fires.throttled else ()
        row = self._shooter.row(workload, tuple(fires.samples), flags, self._ledger.next_order)
        if self._journal is not None:
            self._journal.append(row)
        self._ledger.add(row)
        self._cost.observe(workload, self._clock() - begin, fires)


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
