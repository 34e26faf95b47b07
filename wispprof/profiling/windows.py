"""Steady drafting after an edge sweep: a burst, what is left when the device is warm, and energy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from wispprof.artifacts import EdgeRow, RowJournal
from wispprof.hardware import energy_meter, sensors
from wispprof.profiling.drafting import ROUND, DrafterShooter, EdgeAxes, EdgePoint
from wispprof.profiling.session import Setup
from wispprof.profiling.shots import significant

__all__ = ["Windows"]


class Windows:
    """Burst and sustained drafting over the sentinel's context, and the energy of the longer window."""

    def __init__(self, setup: Setup[EdgePoint], axes: EdgeAxes, clock: Callable[[], float]) -> None:
        device = setup.engine["device"]
        self._shooter = cast(DrafterShooter, setup.shooter)
        self._context = setup.sentinel.subject.context
        self._look, self._meter, self._clock = sensors(device), energy_meter(device), clock
        spans = {"burst": axes.burst_s, "sustained": axes.sustained_s}
        self._spans = {kind: span for kind, span in spans.items() if span > 0}

    @property
    def count(self) -> int:
        """Windows there will be."""
        return len(self._spans)

    @property
    def sensor(self) -> str:
        """Name of what measures energy."""
        return self._meter.sensor

    def run(
        self,
        rows: Sequence[Any],
        journal: RowJournal | None,
        report: Callable[[int, str], None],
    ) -> tuple[EdgeRow, ...]:
        """The rows of the sweep with those of the windows added; windows that are there stay."""
        done = list(cast("Sequence[EdgeRow]", rows))
        have = {row.kind for row in done}
        longest = max(self._spans.values(), default=0.0)
        for number, (kind, span) in enumerate(self._spans.items()):
            if kind in have:
                continue  # of the run that is being resumed
            report(number, f"{kind} drafting, {span:.0f} s")
            order = max(row.order for row in (*done, *(journal.rows if journal else ()))) + 1
            window, energy = self._window(kind, span, order)
            made = [energy, window] if span == longest else [window]
            for row in made:
                if journal is not None:
                    journal.append(row)
                done.append(row)
        return tuple(sorted(done, key=lambda row: row.order))

    def _window(self, kind: str, span: float, order: int) -> tuple[EdgeRow, EdgeRow]:
        shooter, context = self._shooter, self._context
        shooter.hold(context)
        samples: list[float] = []
        self._meter.begin()
        begin = now = self._clock()
        while now - begin < span or not samples:
            shooter.round(context)
            before, now = now, self._clock()
            samples.append(significant((now - before) * 1000 / ROUND))
        used, state = self._meter.end(), self._look.read()
        drafted = len(samples) * ROUND
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
