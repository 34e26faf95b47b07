"""Benchmarks: a replayed fleet against a running server, and the same load in the simulator."""

from wispprof.bench.bench_result import BenchResult, RequestResult
from wispprof.bench.fleet import FleetProcess, bench, run_bench
from wispprof.bench.simulated_bench import LoadMix, SimulatedBench, simulate_bench

__all__ = [
    "BenchResult",
    "FleetProcess",
    "LoadMix",
    "RequestResult",
    "SimulatedBench",
    "bench",
    "run_bench",
    "simulate_bench",
]
