"""What the machine is and how it feels: fingerprint, clocks, temperature, energy windows.

Never raises for a sensor that is missing: a Null object answers in its place.
"""

from wispprof.hardware.clocks import NullSensors, Reading, Sensors, sensors
from wispprof.hardware.energy import EnergyMeter, EnergyReading, NullMeter, energy_meter
from wispprof.hardware.machine_info import (
    Fingerprint,
    Gpu,
    computing_on,
    fingerprint,
    made_elsewhere,
)

__all__ = [
    "EnergyMeter",
    "EnergyReading",
    "Fingerprint",
    "Gpu",
    "NullMeter",
    "NullSensors",
    "Reading",
    "Sensors",
    "computing_on",
    "energy_meter",
    "fingerprint",
    "made_elsewhere",
    "sensors",
]
