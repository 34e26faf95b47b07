"""The machine: fingerprint, clocks, temperature, energy.

A missing sensor never raises: the base :class:`Sensors` or :class:`NullMeter` stands in for it.
"""

from wispprof.hardware.clocks import Reading, Sensors, sensors
from wispprof.hardware.energy import EnergyMeter, EnergyReading, NullMeter, energy_meter
from wispprof.hardware.machine_info import (
    Fingerprint,
    Gpu,
    compute_device_name,
    fingerprint,
    machine_mismatch,
)

__all__ = [
    "EnergyMeter",
    "EnergyReading",
    "Fingerprint",
    "Gpu",
    "NullMeter",
    "Reading",
    "Sensors",
    "compute_device_name",
    "energy_meter",
    "fingerprint",
    "machine_mismatch",
    "sensors",
]
