"""Clocks and temperature. Where a sensor is missing the reading is ``None``; nothing here raises."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from wispprof.hardware import nvml

__all__ = ["CpuSensors", "GpuSensors", "NullSensors", "Reading", "Sensors", "sensors"]


@dataclass(frozen=True)
class Reading:
    """One look at the machine. ``throttled`` only where the device itself says so, or its clock stands
    under the share of its own maximum that :class:`CpuSensors` was told to expect."""

    clock_mhz: float | None = None
    temperature_c: float | None = None
    throttled: bool | None = None


class Sensors(Protocol):
    """Something that can be looked at between two measurements."""

    name: str

    def read(self) -> Reading: ...


class NullSensors:
    """No sensor: every reading is empty."""

    name = "no sensor"

    def read(self) -> Reading:
        return Reading()


class CpuSensors:
    """Linux sysfs: mean scaling frequency and the hottest CPU, SoC or package zone.

    ``throttle_share``: a clock under this share of the maximum counts as throttled, read while the
    machine works (idle clocks are low for good reasons).
    """

    name = "sysfs"

    def __init__(self, root: Path = Path("/"), throttle_share: float = 0.7) -> None:
        self.throttle_share = throttle_share
        cpus = sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq"))
        self._clocks = [c / "scaling_cur_freq" for c in cpus if _number(c / "scaling_cur_freq")]
        limits = [_number(c / "cpuinfo_max_freq") for c in cpus]
        self._limit_khz = max((limit for limit in limits if limit), default=0.0)
        self._zones = [
            zone / "temp"
            for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*"))
            if _is_processor(zone) and _number(zone / "temp") is not None
        ]

    @property
    def present(self) -> bool:
        return bool(self._clocks or self._zones)

    def read(self) -> Reading:
        clocks = [khz for khz in map(_number, self._clocks) if khz]
        heat = [value for value in map(_number, self._zones) if value is not None]
        mean = sum(clocks) / len(clocks) if clocks else None
        slow = mean < self.throttle_share * self._limit_khz if mean and self._limit_khz else None
        return Reading(
            clock_mhz=mean / 1000 if mean else None,
            temperature_c=max(heat) / 1000 if heat else None,
            throttled=slow,
        )


class GpuSensors:
    """One NVIDIA device through NVML: SM clock, temperature, and the driver's throttle reasons."""

    name = "nvml"
    # Thermal and power slow-downs, software and hardware; not "idle" or "application clocks".
    THROTTLE_BITS = 0x4 | 0x8 | 0x20 | 0x40 | 0x80

    def __init__(self, index: int = 0) -> None:
        self._index = index

    def read(self) -> Reading:
        clock = self._ask(lambda lib, dev: float(lib.nvmlDeviceGetClockInfo(dev, 1)))
        heat = self._ask(lambda lib, dev: float(lib.nvmlDeviceGetTemperature(dev, 0)))
        reasons = self._ask(
            lambda lib, dev: int(lib.nvmlDeviceGetCurrentClocksThrottleReasons(dev))
        )
        slow = None if reasons is None else bool(int(reasons) & self.THROTTLE_BITS)
        return Reading(clock, heat, slow)

    def _ask(self, ask: Any) -> Any:
        return nvml.read(lambda lib: ask(lib, lib.nvmlDeviceGetHandleByIndex(self._index)))


def sensors(device: str = "cpu") -> Sensors:
    """The sensors of a torch-style device name; a Null object where there are none."""
    kind, _, index = device.partition(":")
    if kind == "cuda" and nvml.device_count() > 0:
        return GpuSensors(int(index or 0))
    if kind == "cpu" and os.name == "posix":
        cpu = CpuSensors()
        if cpu.present:
            return cpu
    return NullSensors()


def _number(path: Path) -> float | None:
    try:
        return float(path.read_text())
    except (OSError, ValueError):
        return None


def _is_processor(zone: Path) -> bool:
    try:
        kind = (zone / "type").read_text().strip().lower()
    except OSError:
        return False
    return any(word in kind for word in ("cpu", "x86_pkg", "soc", "coretemp", "tctl", "acpitz"))
