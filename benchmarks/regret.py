"""Is ``wispprof`` ever the wrong choice? Its regret against the best other system, cell by cell.

    python benchmarks/regret.py                      # 240 cells, hours of CPU time
    python benchmarks/regret.py --cells 24           # an evenly spread part of them

The grid: round trip x fleet size x SLO x device, on an A100-like server with short contexts and an
H200-like one with long contexts. In each cell every system serves the same requests (common random
numbers) and the best of the others, centralized serving included, is chosen in hindsight by goodput:
tokens/s of sessions that kept their promise.
Regret is the share of that goodput which ``wispprof`` does not reach. The ceiling is the better of two
clairvoyants, which draft exactly what will be accepted. Fleet sizes are shares of what centralized serving
carries at the cell's SLO by its linear cost, so loads from light to beyond capacity are all there.

Prints one line a cell, a summary, and one JSON line last.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from dataclasses import replace

from wispprof.core import Slo
from wispprof.simulation import Scenario, ServerModel, system
from wispprof.simulation.acceptance import SyntheticAcceptance
from wispprof.simulation.arrivals import ClosedFleet, Lengths
from wispprof.simulation.capacity import pool, run_all
from wispprof.simulation.costs import LinearCost
from wispprof.simulation.devices import DeviceProfile
from wispprof.simulation.links import LinkProfile

SERVERS = {
    "a100": LinearCost(42.0, row_ms=0.35, kv_ms=0.00017),
    "h200": LinearCost(18.0, row_ms=0.12, kv_ms=0.00006),
}
RTTS = (5.0, 20.0, 50.0, 100.0)
SPEEDS = (15.0, 60.0, 150.0)
SLOS = (4.0, 8.0)
LOADS = (0.3, 0.8, 1.0, 1.2, 1.6)
SETUPS = (("a100", 600), ("h200", 6000))
RIVALS = ("centralized", "sled-fixed", "fcfs", "specedge", "wisp", "wisp-carry")
CEILINGS = ("clairvoyant", "clairvoyant-rounds")
OUTPUT = 100


def fleet_size(cost: LinearCost, context: int, slo: float, load: float) -> int:
    """``load`` times what centralized serving carries: decode and prompt rows of a step within the pace."""
    each = cost.row_ms * (1 + context / OUTPUT) + cost.kv_ms * context
    return max(2, round(load * (1000.0 / slo - cost.fixed_ms) / each))


def main() -> None:
    """Run the grid or a part of it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cells", type=int, default=0, help="how many cells (default: all)")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--jobs", type=int, default=0)
    options = parser.parse_args()
    grid = list(itertools.product(SETUPS, RTTS, LOADS, SLOS, SPEEDS))
    if options.cells:
        # A step prime to the grid's inner sizes visits every axis.
        grid = [grid[(i * 97) % len(grid)] for i in range(min(options.cells, len(grid)))]
    names = [*RIVALS, "wispprof", *CEILINGS]
    rows = []
    with pool(options.jobs or None) or _Here() as executor:
        for (server, context), rtt, load, slo, speed in grid:
            cost = SERVERS[server]
            devices = fleet_size(cost, context, slo, load)
            base = Scenario(
                system("wispprof"),
                ServerModel(cost),
                ClosedFleet(devices, Lengths(context, OUTPUT, 0.0, 0.3)),
                SyntheticAcceptance(0.75),
                devices=((DeviceProfile.from_speed("edge", speed), 1.0),),
                links=((LinkProfile(rtt, jitter_ms=rtt / 20), 1.0),),
                slos=((Slo(slo), 1.0),),
                seconds=options.seconds,
                warmup_s=options.seconds / 4,
            )
            reports = run_all(
                [replace(base, system=system(name)) for name in names],
                None if isinstance(executor, _Here) else executor,
            )
            goodput = {r.system: r.goodput for r in reports}
            rival = max(RIVALS, key=lambda name: goodput[name])
            top = goodput[rival]
            ceiling = max(goodput[name] for name in CEILINGS)
            row = {
                "server": server,
                "context": context,
                "rtt_ms": rtt,
                "devices": devices,
                "slo": slo,
                "draft_tokens_per_s": speed,
                "best_other": rival,
                "regret": 1.0 - goodput["wispprof"] / top if top > 0 else 0.0,
                "to_ceiling": 1.0 - goodput["wispprof"] / ceiling if ceiling > 0 else 0.0,
                "goodput": goodput,
                "attainment": {r.system: r.attainment for r in reports},
            }
            rows.append(row)
            print(
                f"{server} {context:5d} rtt {rtt:3.0f} n {devices:4d} slo {slo:g} draft {speed:3.0f}/s: "
                f"wispprof {goodput['wispprof']:6.0f}, best other {top:6.0f} ({rival}), "
                f"regret {row['regret']:6.1%}, to ceiling {row['to_ceiling']:6.1%}",
                flush=True,
            )
    worst = max(rows, key=lambda row: row["regret"])
    share = sum(row["regret"] <= 0.02 for row in rows) / len(rows)
    over_wisp = [
        row["goodput"]["wispprof"] / row["goodput"]["wisp"]
        for row in rows
        if row["goodput"]["wisp"]
    ]
    mean = math.exp(sum(map(math.log, filter(None, over_wisp))) / max(1, len(over_wisp)))
    print(
        f"{len(rows)} cells: regret <= 2 % in {share:.0%}, worst {worst['regret']:.1%}; "
        f"goodput over wisp's, geometric mean: {mean:.2f}"
    )
    print(json.dumps({"benchmark": "regret", "cells": rows}))


class _Here:
    """Stands in for worker processes when there is one job."""

    def __enter__(self) -> _Here:
        return self

    def __exit__(self, *_: object) -> None:
        pass


if __name__ == "__main__":
    main()
