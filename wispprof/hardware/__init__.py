"""What the machine is and how it feels: fingerprint, clocks, temperature, energy windows.

Never raises for a sensor that is missing: a Null object answers in its place.
"""

from wispprof.hardware.clocks import NullSensors, Reading, Sensors, sensors
from wispprof.hardware.energy import EnergyMeter, EnergyReading, NullMeter, energy_meter
from wispprof.hardware.machine import Fingerprint, Gpu, fingerprint

__all__ = [
    "EnergyMeter",
    "EnergyReading",
    "Fingerprint",
    "Gpu",
    "NullMeter",
    "NullSensors",
    "Reading",
    "Sensors",
    "energy_meter",
    "fingerprint",
    "sensors",
]
