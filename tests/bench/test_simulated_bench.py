"""Simulator against runtime: real edges, frames and session state in virtual time, under the same load.

Both use the same random draws, so figures differ only by what the simulator leaves out.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from fake_pair import hash_trace, in_process, linear_cost

from wispprof.bench import LoadMix, run_bench, simulate_bench
from wispprof.bench.bench_result import BenchResult
from wispprof.bench.simulated_bench import SimulatedBench
from wispprof.policies.controllers import ConfidenceAcceptance
from wispprof.settings.fleet_settings import BenchSettings
from wispprof.settings.shared_settings import LinkModel
from wispprof.simulation import ServerModel, system
from wispprof.simulation.devices import device_of
from wispprof.testing.virtual_time import run_virtual

TRACE = hash_trace(paths=7, length=40, depth=6)
COST = linear_cost()
MIX = LoadMix((device_of("2.5"), device_of("7"), device_of("18")), (8.0, 16.0, 24.0))
FIGURES = ("attainment", "goodput_tokens_per_s", "tokens_per_s")


def both(label: str, devices: int, slowdown: float = 1.0) -> tuple[BenchResult, SimulatedBench]:
    """``slowdown``: duration of the real steps relative to the simulated ones."""
    scenario_system = system(label)
    load = BenchSettings(
        system=label,
        devices=devices,
        device=MIX.device(devices),
        tokens_per_s=MIX.tokens_per_s(devices),
        ttft_ms=400.0,
        requests=3,
        hold=True,
        max_new=32,
        link=LinkModel(6.0),
    )

    async def main() -> BenchResult:
        cost = replace(COST, fixed_ms=COST.fixed_ms * slowdown, row_ms=COST.row_ms * slowdown)
        async with in_process(scenario_system.batching, cost) as server:
            return await run_bench(load, server.connect, TRACE)

    server = ServerModel(COST, None, 64, 2048, 512, overhead_ms=0.05, spread=1e-9)
    return run_virtual(main()), simulate_bench(
        load, MIX, scenario_system, server, TRACE, ConfidenceAcceptance(), (0,)
    )


@pytest.mark.parametrize("label", ["server-only", "fcfs", "sled", "specedge", "wisp", "wispprof"])
@pytest.mark.parametrize("devices", [3, 9])
def test_simulator_and_runtime_agree(label: str, devices: int) -> None:
    real, simulated = both(label, devices)
    for name in FIGURES:
        assert getattr(simulated, name) == pytest.approx(real.figures[name], rel=0.06), name
    # In stream mode the first drafts depend on the edge's initial RTT estimate: a few of 300 tokens.
    accepted = real.figures["accepted_per_round"]
    assert simulated.accepted_per_round == pytest.approx(accepted, rel=0.06, abs=0.04)


def test_a_slower_server_gives_other_figures() -> None:
    """Negative control: the figures differ if real steps are 20 % slower than simulated."""
    real, simulated = both("fcfs", 9, slowdown=1.2)
    assert simulated.tokens_per_s > 1.06 * real.figures["tokens_per_s"]
