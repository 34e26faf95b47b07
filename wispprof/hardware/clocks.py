"""Clocks and temperature. A reading without a sensor is ``None``; nothing here raises."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wispprof.hardware import nvml


@dataclass(frozen=True)
class Reading:
    """State of a device. ``throttled``: the driver reports it, or the clock is below
    :class:`CpuSensors`' share of its maximum."""

    clock_mhz: float | None = None
    temperature_c: float | None = None
    throttled: bool | None = None


class Sensors:
    """Reads a device's state between two measurements. This base has no sensor: its readings are empty."""

    name = "no sensor"

    def read(self) -> Reading:
        return Reading()


class CpuSensors(Sensors):
    """Linux sysfs: mean scaling frequency and the hottest CPU, SoC or package zone.

    ``throttle_share``: a clock below this share of the maximum counts as throttled. Read it under load,
    because idle clocks are low too.
    """

    name = "sysfs"

    def __init__(self, root: Path = Path("/"), throttle_share: float = 0.7) -> None:
        self.throttle_share = throttle_share
        cpus = sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq"))
        self._clocks = [c / "scaling_cur_freq" for c in cpus if read_number(c / "scaling_cur_freq")]
        limits = [read_number(c / "cpuinfo_max_freq") for c in cpus]
        self._limit_khz = max((limit for limit in limits if limit), default=0.0)
        self._zones = [
            zone / "temp"
            for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*"))
            if _is_processor(zone) and read_number(zone / "temp") is not None
        ]

    @property
    def present(self) -> bool:
        return bool(self._clocks or self._zones)

    def read(self) -> Reading:
        clocks = [khz for khz in map(read_number, self._clocks) if khz]
        heat = [value for value in map(read_number, self._zones) if value is not None]
        mean = sum(clocks) / len(clocks) if clocks else None
        slow = mean < self.throttle_share * self._limit_khz if mean and self._limit_khz else None
        return Reading(
            clock_mhz=mean / 1000 if mean else None,
            temperature_c=max(heat) / 1000 if heat else None,
            throttled=slow,
        )


class GpuSensors(Sensors):
    """One NVIDIA device, by torch's ordinal, through NVML: SM clock, temperature, and the driver's
    throttle reasons."""

    name = "nvml"
    # Thermal and power slow-downs, software and hardware; not "idle" or "application clocks".
    THROTTLE_BITS = 0x4 | 0x8 | 0x20 | 0x40 | 0x80

    def __init__(self, ordinal: int = 0) -> None:
        self._ordinal = ordinal

    def read(self) -> Reading:
        clock = self._query(lambda lib, dev: float(lib.nvmlDeviceGetClockInfo(dev, 1)))
        heat = self._query(lambda lib, dev: float(lib.nvmlDeviceGetTemperature(dev, 0)))
        reasons = self._query(lambda lib, dev: int(lib.nvmlDeviceGetCurrentClocksThrottleReasons(dev)))
        slow = None if reasons is None else bool(int(reasons) & self.THROTTLE_BITS)
        return Reading(clock, heat, slow)

    def _query(self, question: Any) -> Any:
        return nvml.of_cuda_device(question, self._ordinal)


def sensors(device: str = "cpu") -> Sensors:
    """The sensors of a torch-style device name; without any, :class:`Sensors` that read nothing."""
    kind, _, index = device.partition(":")
    if kind == "cuda" and nvml.device_count() > 0:
        return GpuSensors(int(index or 0))
    if kind == "cpu" and os.name == "posix":
        cpu = CpuSensors()
        if cpu.present:
            return cpu
    return Sensors()


def read_number(path: Path) -> float | None:
    """The number in a sysfs file; ``None`` if it cannot be read."""
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
