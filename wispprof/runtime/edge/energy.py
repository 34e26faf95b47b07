"""Energy of requests that run side by side on one device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from wispprof.hardware import EnergyMeter

__all__ = ["EnergyShare", "EnergyShares"]


@dataclass(slots=True, eq=False)
class EnergyShare:
    """One request's part, in joules; ``None`` where no sensor answers."""

    energy_j: float | None = 0.0


class EnergyShares:
    """Deals what a device uses to the requests that run meanwhile, in equal parts.

    A meter knows one window at a time, and nobody can tell which request a joule was for. So a window
    ends whenever a request comes or goes, and all that shared it pay the same. Idle power within a request
    is part of what the request costs; what is used while none runs is nobody's.
    """

    def __init__(self, meter: EnergyMeter) -> None:
        self.sensor = meter.sensor
        self._meter = meter
        self._running: list[EnergyShare] = []

    @contextmanager
    def share(self) -> Iterator[EnergyShare]:
        """A request runs within; what its share says is complete after it."""
        mine = EnergyShare()
        self._deal()
        self._running.append(mine)
        try:
            self._meter.begin()
            yield mine
        finally:
            self._deal()
            self._running.remove(mine)
            if self._running:
                self._meter.begin()

    def _deal(self) -> None:
        """End the window, if one is open."""
        if not self._running:
            return
        used = self._meter.end().energy_j
        for one in self._running:
            if used is None or one.energy_j is None:
                one.energy_j = None
            else:
                one.energy_j += used / len(self._running)
