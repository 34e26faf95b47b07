"""The machine: fingerprint, clocks, temperature, energy.

A missing sensor never raises: the bases :class:`Sensors` and :class:`EnergyMeter` read nothing.
"""

from wispprof.hardware.clocks import Reading, Sensors, sensors
from wispprof.hardware.energy import EnergyMeter, EnergyReading, energy_meter
from wispprof.hardware.machine_info import (
    compute_device_name,
    fingerprint,
    machine_mismatch,
)

__all__ = [
    "EnergyMeter",
    "EnergyReading",
    "Reading",
    "Sensors",
    "compute_device_name",
    "energy_meter",
    "fingerprint",
    "machine_mismatch",
    "sensors",
]
