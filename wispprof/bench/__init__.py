"""Load and emulation: replay fleets against a running server, and servers that fit into a process."""

from wispprof.bench.bench_result import BenchResult, RequestResult
from wispprof.bench.fleet import Progress, bench, run_bench
from wispprof.bench.fleet_process import FleetProcess
from wispprof.bench.simulated_bench import Mix, SimulatedBench, simulate_bench
from wispprof.bench.step_watch import HandleWatch, MetricsWatch, StepWatch
from wispprof.settings.bench_settings import BenchSettings
from wispprof.simulation.devices import DEVICES, device_of
from wispprof.testing.cpu_burner import CpuBurner
from wispprof.testing.in_process_server import InProcessServer
from wispprof.testing.virtual_time import VirtualTimeLoop, run_virtual

__all__ = [
    "DEVICES",
    "BenchResult",
    "BenchSettings",
    "CpuBurner",
    "FleetProcess",
    "HandleWatch",
    "InProcessServer",
    "MetricsWatch",
    "Mix",
    "Progress",
    "RequestResult",
    "SimulatedBench",
    "StepWatch",
    "VirtualTimeLoop",
    "bench",
    "device_of",
    "run_bench",
    "run_virtual",
    "simulate_bench",
]
