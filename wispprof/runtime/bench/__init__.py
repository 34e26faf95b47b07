"""Load and emulation: replay fleets against a running server, and servers that fit into a process."""

from wispprof.runtime.bench.apart import FleetProcess
from wispprof.runtime.bench.ballast import Ballast
from wispprof.runtime.bench.fleet import Progress, bench, run_bench
from wispprof.runtime.bench.pocket import PocketServer
from wispprof.runtime.bench.result import BenchResult, Outcome
from wispprof.runtime.bench.settings import DEVICES, BenchSettings, device_of
from wispprof.runtime.bench.twin import Mix, Twin, twin
from wispprof.runtime.bench.virtual import VirtualTimeLoop, run_virtual
from wispprof.runtime.bench.watch import HandleWatch, MetricsWatch, StepWatch

__all__ = [
    "DEVICES",
    "Ballast",
    "BenchResult",
    "BenchSettings",
    "FleetProcess",
    "HandleWatch",
    "MetricsWatch",
    "Mix",
    "Outcome",
    "PocketServer",
    "Progress",
    "StepWatch",
    "Twin",
    "VirtualTimeLoop",
    "bench",
    "device_of",
    "run_bench",
    "run_virtual",
    "twin",
]
