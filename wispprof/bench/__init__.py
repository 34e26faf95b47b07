"""Load and emulation: replay fleets against a running server, and servers that fit into a process."""

from wispprof.bench.bench_result import BenchResult, Outcome
from wispprof.bench.fleet import Progress, bench, run_bench
from wispprof.bench.fleet_process import FleetProcess
from wispprof.bench.simulated_bench import Mix, Twin, twin
from wispprof.bench.step_watch import HandleWatch, MetricsWatch, StepWatch
from wispprof.settings.bench_settings import DEVICES, BenchSettings, device_of
from wispprof.testing.cpu_burner import Ballast
from wispprof.testing.in_process_server import PocketServer
from wispprof.testing.virtual_time import VirtualTimeLoop, run_virtual

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
