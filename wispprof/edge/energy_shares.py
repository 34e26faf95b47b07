"""Shares of a device's energy for requests that run at the same time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from wispprof.hardware import EnergyMeter


@dataclass(slots=True, eq=False)
class EnergyShare:
    """One request's share of the energy, in joules; ``None`` without a sensor."""

    energy_j: float | None = 0.0


class EnergyShares:
    """Divides a device's energy equally among the requests that run at the same time.

    The meter measures one window at a time. A window ends whenever a request begins or ends. Energy used
    while no request runs is not counted.
    """

    def __init__(self, meter: EnergyMeter) -> None:
        self.sensor = meter.sensor
        self._meter = meter
        self._running: list[EnergyShare] = []

    @contextmanager
    def share(self) -> Iterator[EnergyShare]:
        """Run a request inside ``with``; its share is complete afterwards."""
        mine = EnergyShare()
        self._divide()
        self._running.append(mine)
        try:
            self._meter.begin()
            yield mine
        finally:
            self._divide()
            self._running.remove(mine)
            if self._running:
                self._meter.begin()

    def _divide(self) -> None:
        """End the window, if one is open, and add its energy to the running requests."""
        if not self._running:
            return
        used = self._meter.end().energy_j
        for one in self._running:
            if used is None or one.energy_j is None:
                one.energy_j = None
            else:
                one.energy_j += used / len(self._running)
