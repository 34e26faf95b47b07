"""Simulator against runtime: real edges, frames and session state in virtual time, under the same load.

Both use the same random draws, so figures differ only by what the simulator leaves out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from fake_pair import hash_trace, in_process, linear_cost

from wispprof.artifacts.rows import AcceptanceTrace
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
RANKED = hash_trace(paths=7, length=40, depth=6, accuracy=0.6, ranks=True)
COST = linear_cost()
MIX = LoadMix((device_of("2.5"), device_of("7"), device_of("18")), (8.0, 16.0, 24.0))
TREE_MIX = LoadMix(tuple(replace(device, node_ms=0.05) for device in MIX.profiles), MIX.speeds)
FIGURES = ("attainment", "goodput_tokens_per_s", "tokens_per_s")


def both(
    label: str,
    devices: int,
    slowdown: float = 1.0,
    trace: AcceptanceTrace = TRACE,
    mix: LoadMix = MIX,
    **more: Any,
) -> tuple[BenchResult, SimulatedBench]:
    """``slowdown``: duration of the real steps relative to the simulated ones."""
    scenario_system = system(label)
    load = BenchSettings(
        system=label,
        devices=devices,
        device=mix.device(devices),
        tokens_per_s=mix.tokens_per_s(devices),
        ttft_ms=400.0,
        requests=3,
        hold=True,
        max_new=32,
        link=LinkModel(6.0),
    )
    load = replace(load, **more)

    async def main() -> BenchResult:
        cost = replace(COST, fixed_ms=COST.fixed_ms * slowdown, row_ms=COST.row_ms * slowdown)
        async with in_process(scenario_system.batching, cost) as server:
            return await run_bench(load, server.connect, trace)

    server = ServerModel(COST, None, 64, 2048, 512, overhead_ms=0.05, spread=1e-9)
    return run_virtual(main()), simulate_bench(
        load, mix, scenario_system, server, trace, ConfidenceAcceptance(), (0,)
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


@pytest.mark.parametrize("label", ["specedge-trees", "wispprof-trees"])
@pytest.mark.parametrize("devices", [3, 9])
def test_simulator_and_runtime_agree_on_trees(label: str, devices: int) -> None:
    """The edge rates candidates by the draft, the simulator by their ranks."""
    # Every device goes through every path, so that both accept the same drafts.
    more = {"requests": len(RANKED.paths), "hold": False}
    real, simulated = both(label, devices, trace=RANKED, mix=TREE_MIX, **more)
    assert real.figures["mismatches"] == 0
    for name in FIGURES:
        assert getattr(simulated, name) == pytest.approx(real.figures[name], rel=0.06), name
    accepted = real.figures["accepted_per_round"]
    assert simulated.accepted_per_round == pytest.approx(accepted, rel=0.06, abs=0.04)


def test_a_slower_server_gives_other_figures() -> None:
    """Negative control: the figures differ if real steps are 20 % slower than simulated."""
    real, simulated = both("fcfs", 9, slowdown=1.2)
    assert simulated.tokens_per_s > 1.06 * real.figures["tokens_per_s"]
