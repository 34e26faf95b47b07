"""How fast the simulator runs: CPU time for a simulated hour, on one core.

    python benchmarks/simulator.py                   # 200 devices, 60 simulated seconds a system
    python benchmarks/simulator.py --devices 50 --systems wisp,wispprof

The physics. A simulated token costs what its events cost: a draft step, its share of a frame each way, a
merge, a row in a plan, and a commit on both sides. Round systems work out a whole round in one event;
streams need one per draft step and one per frame, so they cost more per token, and the more the further
their edges draft ahead. CPU time is taken, not wall time, so that a shared machine does not blur it; the
hour is an extrapolation from the simulated part after the fleet has started. Two loads: a fleet that asks
again at once (every device as fast as the server lets it), and one that thinks between requests.

Prints one table and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import time

from wispprof.policies.linear_cost import LinearCost
from wispprof.simulation import SYSTEMS, Scenario, ServerModel, simulate, system
from wispprof.simulation.arrivals import ClosedFleet, Lengths
from wispprof.simulation.synthetic_acceptance import SyntheticAcceptance
from wispprof.types import Slo


def measure(name: str, devices: int, seconds: float, think_ms: float) -> dict[str, float | str]:
    """One system under one load."""
    scenario = Scenario(
        system(name),
        ServerModel(LinearCost(42.0, row_ms=0.35, kv_ms=0.00017)),
        ClosedFleet(devices, Lengths(256, 128, 0.3, 0.3), think_ms, ramp_ms=5_000.0),
        SyntheticAcceptance(0.75),
        slos=((Slo(2.0), 1.0),),
        seconds=seconds,
        warmup_s=min(10.0, seconds / 4),
    )
    begun = time.process_time()
    report = simulate(scenario)
    spent = time.process_time() - begun
    tokens = report.throughput * report.seconds
    return {
        "system": name,
        "load": "thinking" if think_ms else "saturated",
        "cpu_s_per_hour": spent * 3600.0 / seconds,
        "us_per_token": spent * 1e6 * (report.seconds / seconds) / max(1.0, tokens),
        "tokens_per_s": report.throughput,
        "events_per_s": report.events / spent,
        "drafted_per_token": report.drafted_per_token,
    }


def main() -> None:
    """Measure, print the table and the line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--devices", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--think-s", type=float, default=30.0)
    parser.add_argument("--systems", default="server-only,fcfs,wisp,wispprof")
    options = parser.parse_args()
    rows = []
    head = f"{'system':14} {'load':10} {'CPU s / hour':>12} {'us / token':>11} {'tokens/s':>9}"
    print(head + f" {'events/s':>10} {'drafted/token':>14}")
    for name in options.systems.split(","):
        if name not in SYSTEMS:
            parser.error(f"no system named {name!r}")
        for think_ms in (0.0, options.think_s * 1000.0):
            row = measure(name, options.devices, options.seconds, think_ms)
            rows.append(row)
            print(
                f"{row['system']:14} {row['load']:10} {row['cpu_s_per_hour']:12.0f} "
                f"{row['us_per_token']:11.1f} {row['tokens_per_s']:9.0f} "
                f"{row['events_per_s']:10.0f} {row['drafted_per_token']:14.2f}",
                flush=True,
            )
    print(json.dumps({"benchmark": "simulator", "devices": options.devices, "rows": rows}))


if __name__ == "__main__":
    main()
