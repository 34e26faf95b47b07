"""Energy of a window: begin, do the work, end.

RAPL and NVML count energy; hwmon reports power, which is integrated. Without a sensor the energy is
``None``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from wispprof.hardware import nvml
from wispprof.hardware.clocks import read_number


@dataclass(frozen=True)
class EnergyReading:
    """``energy_j`` joules within ``window_ms``; ``None`` without a sensor. ``sensor``: its name."""

    energy_j: float | None
    window_ms: float
    sensor: str

    @property
    def power_w(self) -> float | None:
        """Mean power of the window."""
        if self.energy_j is None or self.window_ms <= 0:
            return None
        return self.energy_j / (self.window_ms / 1000)


class EnergyMeter:
    """Measures one window at a time: differences of counters that only rise, except for one wrap at most
    within a window. This base has no counter: its windows have a duration and no energy.

    ``wraps``: per counter, the value after which it starts again at 0. ``joules_per_count``: its unit.
    """

    sensor = "no sensor"
    joules_per_count = 1.0

    def __init__(self, wraps: Sequence[float] = (), clock: Callable[[], float] = time.perf_counter) -> None:
        self._wraps, self._clock = wraps, clock
        self._begin_counts: list[float | None] = []
        self._begin_s = clock()

    @property
    def present(self) -> bool:
        """Whether there is a counter that can be read."""
        counts = self._read()
        return bool(counts) and None not in counts

    def begin(self) -> None:
        self._begin_counts, self._begin_s = self._read(), self._clock()

    def end(self) -> EnergyReading:
        counts, window_ms = self._read(), (self._clock() - self._begin_s) * 1000
        total = 0.0
        for before, after, wrap in zip(self._begin_counts, counts, self._wraps, strict=True):
            if before is None or after is None:
                return EnergyReading(None, window_ms, self.sensor)
            total += after - before if after >= before else after - before + wrap
        energy_j = total * self.joules_per_count if self._wraps else None
        return EnergyReading(energy_j, window_ms, self.sensor)

    def _read(self) -> list[float | None]:
        return []


class RaplMeter(EnergyMeter):
    """Intel and AMD packages through Linux powercap. Often only root can read the counters."""

    sensor = "rapl"
    joules_per_count = 1e-6

    def __init__(self, root: Path = Path("/"), clock: Callable[[], float] = time.perf_counter) -> None:
        zones = sorted((root / "sys/class/powercap").glob("intel-rapl:[0-9]*"))
        self._zones = [  # packages only: sub-zones (intel-rapl:0:0) are part of them
            zone
            for zone in zones
            if zone.name.count(":") == 1 and read_number(zone / "energy_uj") is not None
        ]
        wraps = [read_number(zone / "max_energy_range_uj") or 0.0 for zone in self._zones]
        super().__init__(wraps, clock)

    def _read(self) -> list[float | None]:
        return [read_number(zone / "energy_uj") for zone in self._zones]


class NvmlMeter(EnergyMeter):
    """An NVIDIA GPU's own counter (Volta and later), in millijoules since the driver was loaded."""

    sensor = "nvml"
    joules_per_count = 1e-3

    def __init__(self, ordinal: int = 0, clock: Callable[[], float] = time.perf_counter) -> None:
        self._ordinal = ordinal
        super().__init__([0.0], clock)

    def _read(self) -> list[float | None]:
        return [
            nvml.of_cuda_device(
                lambda lib, dev: float(lib.nvmlDeviceGetTotalEnergyConsumption(dev)), self._ordinal
            )
        ]


class HwmonMeter(EnergyMeter):
    """Board power sensors (INA3221 on Jetson and others), sampled by a thread and integrated.

    Takes the rail with the most power, which is the board's input.
    """

    sensor = "hwmon"

    def __init__(
        self, root: Path = Path("/"), clock: Callable[[], float] = time.perf_counter, period_s: float = 0.1
    ) -> None:
        super().__init__(clock=clock)
        self._period_s = period_s
        self._rails = _power_rails(root)
        self._joules = self._last_w = self._last_s = 0.0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def present(self) -> bool:
        return self.power_w() is not None

    def power_w(self) -> float | None:
        """Present power of the largest rail."""
        return max((watts for rail in self._rails if (watts := rail()) is not None), default=None)

    def begin(self) -> None:
        self._stop.clear()
        self._joules, self._last_w = 0.0, self.power_w() or 0.0
        self._begin_s = self._last_s = self._clock()
        self._thread = threading.Thread(target=self._sample, name="wispprof-power", daemon=True)
        self._thread.start()

    def end(self) -> EnergyReading:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._integrate()
        return EnergyReading(self._joules, (self._last_s - self._begin_s) * 1000, self.sensor)

    def _sample(self) -> None:
        while not self._stop.wait(self._period_s):
            self._integrate()

    def _integrate(self) -> None:
        watts, now = self.power_w(), self._clock()
        watts = self._last_w if watts is None else watts
        self._joules += (watts + self._last_w) / 2 * (now - self._last_s)
        self._last_w, self._last_s = watts, now


def energy_meter(device: str = "cpu", root: Path = Path("/")) -> EnergyMeter:
    """The best meter for a torch-style device name; the base :class:`EnergyMeter` without a sensor."""
    kind, _, index = device.partition(":")
    counter = NvmlMeter(int(index or 0)) if kind == "cuda" else RaplMeter(root)
    if counter.present:
        return counter
    board = HwmonMeter(root)
    return board if board.present else EnergyMeter()


def _power_rails(root: Path) -> list[Callable[[], float | None]]:
    """Functions that read the power of a rail in watts."""

    def power(microwatts: Path) -> float | None:
        value = read_number(microwatts)
        return None if value is None else value * 1e-6

    def product(millivolts: Path, milliamperes: Path) -> float | None:
        volts, amperes = read_number(millivolts), read_number(milliamperes)
        return None if volts is None or amperes is None else volts * amperes * 1e-6

    rails: list[Callable[[], float | None]] = []
    for chip in sorted((root / "sys/class/hwmon").glob("hwmon*")):
        rails += [partial(power, file) for file in sorted(chip.glob("power[0-9]*_input"))]
        for current in sorted(chip.glob("curr[0-9]*_input")):
            rails.append(partial(product, chip / current.name.replace("curr", "in"), current))
    return rails
