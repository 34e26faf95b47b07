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
from wispprof.profiling.measurement_log import Ledger, half_width
from wispprof.profiling.sweep_cost import CostModel
from wispprof.profiling.workload import Shooter, Shot, SweepSettings, duration, fire_some

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

    ``refused``: shots the backend could not do, with its reason. ``seconds``: this run alone.
    ``expected_s``: what was announced when it began; None without a pilot. ``out_of_time``: shots that
    were not measured at all.
    """

    rows: tuple[Row, ...]
    seconds: float
    expected_s: float | None
    refused: dict[str, str] = field(default_factory=dict)
    out_of_time: int = 0


class Sweep(Generic[Subject]):
    """Measures ``shots`` with ``shooter``; what each visit gave goes to ``journal`` at once.

    Visits that the journal already holds are not made again. ``cost``: what a pilot has learned; the
    sweep then keeps to the time it announces, by giving up refinement rather than samples that every
    shot must have. ``budget_s`` is never exceeded as long as visits take what they did before. An
    exception or Ctrl-C leaves the journal complete up to the last finished visit.
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
        cost: CostModel[Subject] | None = None,
        budget_s: float | None = None,
    ) -> None:
        if len({shot.key for shot in shots}) != len(shots):
            raise ValueError("shots need distinct keys")
        self._shooter, self._settings, self._sentinel = shooter, settings, sentinel
        self._journal, self._sensors = journal, sensors or NullSensors()
        self._clock, self._progress = clock, progress or (lambda done, total, status: None)
        self._promised = cost is not None
        self._cost: CostModel[Subject] = cost if cost is not None else CostModel(settings)
        self._budget_s = float("inf") if budget_s is None else budget_s
        self._ledger = Ledger(settings.drift, journal.rows if journal else ())
        self._shots = sorted(shots, key=lambda shot: shot.key)
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
                turn = min(self._ledger.count(shot.key) for shot in waiting)
                now = [shot for shot in waiting if self._ledger.count(shot.key) == turn]
                random.Random(self._settings.seed * _TURN + turn).shuffle(now)
                for shot in now:
                    if self._done(shot):
                        continue  # a look has cleared its visits meanwhile
                    if not self._in_time(shot, ends if self._lacks(shot) else refined):
                        self._skipped.add(shot.key)
                        continue
                    self._visit_one(shot)
            if self._made:
                self._look()
        self._progress(self._made, self._made, "done")
        rows = self._ledger.rows(self._settings.least, self._settings.target)
        missing = sum(self._ledger.count(key) == 0 for key in self._skipped)
        return SweepResult(rows, self._clock() - begin, announced, self._refused, missing)

    # --- what is left to do -------------------------------------------------------------------

    def _waiting(self) -> list[Shot[Subject]]:
        gone = self._skipped | self._refused.keys()
        return [shot for shot in self._shots if shot.key not in gone and not self._done(shot)]

    def _done(self, shot: Shot[Subject]) -> bool:
        if self._lacks(shot):
            return False
        taken, clean = self._ledger.samples(shot.key), self._ledger.clean(shot.key)
        settings = self._settings
        spent = len(taken) >= settings.most or sum(taken) / 1000 > settings.shot_s
        return spent or (len(clean) >= settings.least and half_width(clean) <= settings.target)

    def _lacks(self, shot: Shot[Subject]) -> bool:
        """Whether the least that every shot must have is not there yet."""
        taken = self._ledger.samples(shot.key)
        spent = bool(taken) and sum(taken) / 1000 > self._settings.shot_s
        return len(taken) < self._settings.least and not spent

    def _in_time(self, shot: Shot[Subject], ends: float) -> bool:
        """Whether a visit, and the last look at the sentinel, still fit before ``ends``."""
        if ends == float("inf"):
            return True
        need = self._cost.visit_s(shot, self._block(shot) + self._warmup(shot))
        if self._sentinel is not None:
            looks = 2 if self._since_look >= self._settings.sentinel_every else 1
            need += looks * self._cost.look_s(self._sentinel)
        return self._clock() + need <= ends

    def _left(self) -> tuple[int, float]:
        ledger = self._ledger
        have = [
            (shot, ledger.clean(shot.key), len(ledger.samples(shot.key)))
            for shot in self._waiting()
        ]
        return self._cost.plan_s(have, self._sentinel)

    # --- doing it -----------------------------------------------------------------------------

    def _visit_one(self, shot: Shot[Subject]) -> None:
        if self._since_look >= self._settings.sentinel_every:
            self._look()
        self._tell(shot)
        try:
            self._keep(shot, self._warmup(shot), self._block(shot))
        except EngineError as fault:
            self._refused[shot.key] = str(fault)
            return
        self._made += 1
        self._since_look += 1

    def _tell(self, shot: Shot[Subject]) -> None:
        """Progress with an ETA, reckoned anew once a second: it looks at every shot."""
        now = self._clock()
        if self._told is None or now - self._told[0] > 1.0:
            visits, seconds = self._left()
            self._told = now, self._made + visits, seconds
        at, visits, seconds = self._told
        words = f"ETA {duration(seconds - (now - at))}  {shot.key}"
        self._progress(self._made, max(visits, self._made + 1), words)

    def _look(self) -> None:
        if self._sentinel is not None:
            self._keep(self._sentinel, self._settings.look_warmup, self._settings.look)
        self._since_look = 0

    def _block(self, shot: Shot[Subject]) -> int:
        left = self._settings.most - len(self._ledger.samples(shot.key))
        return max(1, min(self._settings.block, left))

    def _warmup(self, shot: Shot[Subject]) -> int:
        warmup = self._settings.warmup
        return min(1, warmup) if self._ledger.count(shot.key) else warmup

    def _keep(self, shot: Shot[Subject], warmup: int, count: int) -> None:
        begin = self._clock()
        fires = fire_some(
            self._shooter, shot, warmup, count, self._settings, self._clock, self._sensors
        )
        flags = ("throttled",) if fires.throttled else ()
        row = self._shooter.row(shot, tuple(fires.samples), flags, self._ledger.next_order)
        if self._journal is not None:
            self._journal.append(row)
        self._ledger.add(row)
        self._cost.observe(shot, self._clock() - begin, fires)


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
