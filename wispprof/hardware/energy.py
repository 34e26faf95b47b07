"""Energy of a window: begin, do the work, end. Counters where the hardware counts, integrated power
where it only tells the present watts, and a Null meter that says "no sensor"."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from wispprof.hardware import nvml

__all__ = [
    "EnergyMeter",
    "EnergyReading",
    "HwmonMeter",
    "NullMeter",
    "NvmlMeter",
    "RaplMeter",
    "energy_meter",
]


@dataclass(frozen=True)
class EnergyReading:
    """``energy_j`` joules within ``window_ms``; None where there is no sensor. ``sensor`` names it."""

    energy_j: float | None
    window_ms: float
    sensor: str

    @property
    def power_w(self) -> float | None:
        """Mean power of the window."""
        if self.energy_j is None or self.window_ms <= 0:
            return None
        return self.energy_j / (self.window_ms / 1000)


class EnergyMeter(Protocol):
    """One window at a time."""

    sensor: str

    def begin(self) -> None: ...

    def end(self) -> EnergyReading: ...


class NullMeter:
    """No sensor: a window has a duration and no energy."""

    sensor = "no sensor"

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._start = clock()

    def begin(self) -> None:
        self._start = self._clock()

    def end(self) -> EnergyReading:
        return EnergyReading(None, (self._clock() - self._start) * 1000, self.sensor)


class RaplMeter:
    """Intel and AMD packages through Linux powercap. Counters wrap; a window may span one wrap."""

    sensor = "rapl"

    def __init__(
        self, root: Path = Path("/"), clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._clock = clock
        zones = sorted((root / "sys/class/powercap").glob("intel-rapl:[0-9]*"))
        self._zones = [  # packages only: sub-zones (intel-rapl:0:0) are part of them
            zone
            for zone in zones
            if zone.name.count(":") == 1 and _number(zone / "energy_uj") is not None
        ]
        self._wrap = [_number(zone / "max_energy_range_uj") or 0.0 for zone in self._zones]
        self._begun: list[float | None] = []
        self._start = 0.0

    @property
    def present(self) -> bool:
        """Whether a counter can be read (often only by root)."""
        return bool(self._zones)

    def begin(self) -> None:
        self._begun = self._read()
        self._start = self._clock()

    def end(self) -> EnergyReading:
        now, window = self._read(), (self._clock() - self._start) * 1000
        total = 0.0
        for before, after, wrap in zip(self._begun, now, self._wrap, strict=True):
            if before is None or after is None:
                return EnergyReading(None, window, self.sensor)
            total += after - before if after >= before else after - before + wrap
        return EnergyReading(total / 1e6, window, self.sensor)

    def _read(self) -> list[float | None]:
        return [_number(zone / "energy_uj") for zone in self._zones]


class NvmlMeter:
    """An NVIDIA device's own counter (millijoules since the driver was loaded; Volta and later)."""

    sensor = "nvml"

    def __init__(self, index: int = 0, clock: Callable[[], float] = time.perf_counter) -> None:
        self._index, self._clock = index, clock
        self._begun: float | None = None
        self._start = 0.0

    @property
    def present(self) -> bool:
        return self._read() is not None

    def begin(self) -> None:
        self._begun, self._start = self._read(), self._clock()

    def end(self) -> EnergyReading:
        now, window = self._read(), (self._clock() - self._start) * 1000
        joules = None if now is None or self._begun is None else (now - self._begun) / 1000
        return EnergyReading(joules, window, self.sensor)

    def _read(self) -> float | None:
        return nvml.read(
            lambda lib: float(
                lib.nvmlDeviceGetTotalEnergyConsumption(lib.nvmlDeviceGetHandleByIndex(self._index))
            )
        )


class HwmonMeter:
    """Board sensors that tell watts (INA3221 on Jetson and others): sampled and integrated.

    The largest rail is taken, which is the board's input. A sampling thread runs within the window.
    """

    sensor = "hwmon"

    def __init__(
        self,
        root: Path = Path("/"),
        clock: Callable[[], float] = time.perf_counter,
        period_s: float = 0.1,
    ) -> None:
        self._clock, self._period = clock, period_s
        self._rails = _rails(root)
        self._joules = self._last_w = self._last = self._start = 0.0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def present(self) -> bool:
        return self.power_w() is not None

    def power_w(self) -> float | None:
        """The largest rail's power now."""
        known = [watts for watts in (rail() for rail in self._rails) if watts is not None]
        return max(known, default=None)

    def begin(self) -> None:
        self._stop.clear()
        self._joules, self._last_w = 0.0, self.power_w() or 0.0
        self._start = self._last = self._clock()
        self._thread = threading.Thread(target=self._sample, name="wispprof-power", daemon=True)
        self._thread.start()

    def end(self) -> EnergyReading:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._add()
        return EnergyReading(self._joules, (self._last - self._start) * 1000, self.sensor)

    def _sample(self) -> None:
        while not self._stop.wait(self._period):
            self._add()

    def _add(self) -> None:
        watts, now = self.power_w(), self._clock()
        watts = self._last_w if watts is None else watts
        self._joules += (watts + self._last_w) / 2 * (now - self._last)
        self._last_w, self._last = watts, now


def energy_meter(device: str = "cpu", root: Path = Path("/")) -> EnergyMeter:
    """The best meter for a torch-style device name; :class:`NullMeter` where there is none."""
    kind, _, index = device.partition(":")
    if kind == "cuda":
        gpu = NvmlMeter(int(index or 0))
        if gpu.present:
            return gpu
    else:
        rapl = RaplMeter(root)
        if rapl.present:
            return rapl
    board = HwmonMeter(root)
    return board if board.present else NullMeter()


def _rails(root: Path) -> list[Callable[[], float | None]]:
    rails: list[Callable[[], float | None]] = []
    for chip in sorted((root / "sys/class/hwmon").glob("hwmon*")):
        for file in sorted(chip.glob("power[0-9]*_input")):  # microwatts
            rails.append(lambda file=file: _scaled(_number(file), 1e-6))  # type: ignore[misc]
        for current in sorted(chip.glob("curr[0-9]*_input")):  # milliamperes beside millivolts
            volts = chip / current.name.replace("curr", "in")
            rails.append(lambda a=volts, b=current: _product(_number(a), _number(b)))  # type: ignore[misc]
    return rails


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _product(volts: float | None, amperes: float | None) -> float | None:
    return None if volts is None or amperes is None else volts * amperes * 1e-6


def _number(path: Path) -> float | None:
    try:
        return float(path.read_text())
    except (OSError, ValueError):
        return None
