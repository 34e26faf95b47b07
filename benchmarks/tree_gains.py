"""Draft trees and drafting ahead for outcomes, simulated on shipped GPU profiles.

    python benchmarks/tree_gains.py                       # about eight minutes on one core
    python benchmarks/tree_gains.py --known cells.jsonl   # keeps finished cells, and goes on with the others
    python benchmarks/tree_gains.py --part outcomes

*trees*: tokens/s of ``wispprof`` with draft trees over those without. Edges draft asynchronously in both.
Where a step is memory-bound, more rows cost little, and where the device is a GPU, more nodes do. A tree
covers more of what the target may say, so fewer round trips are lost after a rejection. The policy cuts trees
where rows are dear, and a device whose nodes are dear drafts chains. Each cell must be at least 0.99, and the
mean of the cells with at most four sessions 1.2.

*outcomes*: tokens/s of synchronous rounds of trees by what an idle device prepares while a round is out:
nothing, SpecEdge's best guess, chains for several outcomes, or the likeliest outcomes. It must never lose.

Both arms of a cell serve the same outputs: acceptance 0.75 a position, later candidates as measured on the
bundled pair (``wispprof.policies.tree_shapes.LATER_RANKS``), or those of ``--trace``. Server memory is not
limited, and prompts are cached. Prints tables and one JSON line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from wispprof.artifacts.trace import load_trace
from wispprof.policies.controllers import ConfidenceAcceptance
from wispprof.settings.edge_settings import BEST_GUESS, ENUMERATION, LIKELIEST, WAIT
from wispprof.settings.shared_settings import LinkModel
from wispprof.simulation.arrivals import ClosedFleet, Lengths
from wispprof.simulation.devices import DeviceProfile
from wispprof.simulation.event_loop import simulate
from wispprof.simulation.metrics import Report
from wispprof.simulation.scenario import SYSTEMS, Scenario, System
from wispprof.simulation.server_models import server_of
from wispprof.simulation.simulated_output import AcceptanceSource
from wispprof.simulation.synthetic_acceptance import SyntheticAcceptance
from wispprof.simulation.trace_replay import TraceAcceptance
from wispprof.types import Slo

MODELS = ("qwen3-32b-vllm-bf16-tp1", "llama-3.1-70b-vllm-bf16-tp2", "llama-3.1-8b-vllm-bf16-tp1")
SERVERS = [f"{gpu}-sxm-{model}" for model in MODELS for gpu in ("h200", "b200")]
SECONDS = {1: 8.0, 2: 5.0, 4: 3.0, 8: 2.0, 16: 1.2, 32: 6.0}
SMALL_DRAFT = 0.5
"""Draft step for the 8B target over that of the others: it has a smaller draft."""
ROUNDS = SYSTEMS["wispprof-trees"].replace(batching="fcfs", controller_options={"stream": False})
AHEAD = {"nothing": WAIT, "best guess": BEST_GUESS, "chains": ENUMERATION, "likeliest": LIKELIEST}


class Cell(NamedTuple):
    server: str
    sessions: int
    context: int
    rtt_ms: float
    draft_ms: float
    node_ms: float

    def run(self, system: System, acceptance: AcceptanceSource) -> Report:
        seconds = SECONDS[self.sessions]
        return simulate(
            Scenario(
                system,
                replace(server_of(self.server)[0], kv_tokens=None),
                ClosedFleet(self.sessions, Lengths(self.context, 4000, reused=1.0), ramp_ms=300.0),
                acceptance,
                devices=((DeviceProfile("edge", draft_ms=self.draft_ms, node_ms=self.node_ms), 1.0),),
                links=((LinkModel(self.rtt_ms), 1.0),),
                slos=((Slo(1.0), 1.0),),
                seconds=seconds + 0.6,
                warmup_s=0.6,
            )
        )


def tree_cells(args: argparse.Namespace) -> Iterator[tuple[Cell, dict[str, float]]]:
    grid = itertools.product(args.servers, args.sessions, args.contexts, args.rtts)
    for server, sessions, context, rtt_ms in grid:
        draft_ms = args.draft_ms * (SMALL_DRAFT if "8b-" in server else 1.0)
        cell = Cell(server, sessions, context, rtt_ms, draft_ms, args.node_ms)
        known = args.cells.get(key := " ".join(map(str, ("trees", args.trace, *cell))))
        if known is None:
            speeds = [
                cell.run(SYSTEMS[s], args.acceptance).throughput for s in ("wispprof", "wispprof-trees")
            ]
            known = keep(args, key, {"chains": speeds[0], "trees": speeds[1]})
        yield cell, known


def outcome_cells(args: argparse.Namespace) -> Iterator[tuple[Cell, dict[str, float]]]:
    for draft_ms, rtt_ms in itertools.product((2.0, 4.0, 16.0), args.rtts):
        cell = Cell(SERVERS[0], 1, 500, rtt_ms, draft_ms, args.node_ms)
        known = args.cells.get(key := " ".join(map(str, ("outcomes", args.trace, *cell))))
        if known is None:
            found = {}
            for name, ahead in AHEAD.items():
                drafting = replace(ROUNDS.drafting, ahead=ahead)
                report = cell.run(ROUNDS.replace(drafting=drafting), args.acceptance)
                counters = report.counters
                found[name] = report.throughput
                found[f"{name} hits"] = counters.proactive_hits / max(1, counters.proactive)
            known = keep(args, key, found)
        yield cell, known


def keep(args: argparse.Namespace, key: str, found: dict[str, float]) -> dict[str, float]:
    if args.known is not None:
        with args.known.open("a") as file:
            file.write(json.dumps([key, found]) + "\n")
    return found


def trees(args: argparse.Namespace) -> dict[str, object]:
    print(f"{'server':40} {'sessions':>8} {'context':>8}  " + "".join(f"{r:>7g} ms" for r in args.rtts))
    gains: dict[Cell, float] = {}
    for cell, found in tree_cells(args):
        if cell.rtt_ms == args.rtts[0]:
            print(f"{cell.server:40} {cell.sessions:8d} {cell.context:8d}  ", end="")
        gains[cell] = found["trees"] / found["chains"]
        end = "\n" if cell.rtt_ms == args.rtts[-1] else ""
        print(f"{gains[cell]:10.2f}", end=end, flush=True)
    few = [gain for cell, gain in gains.items() if cell.sessions <= 4]
    worst = min(gains, key=lambda cell: gains[cell])
    print(f"\nleast gain {gains[worst]:.3f} ({', '.join(map(str, worst[:4]))})")
    mean = statistics.fmean(few) if few else float("nan")
    print(f"mean gain with at most four sessions {mean:.3f}, of {len(few)} cells")
    return {"least": gains[worst], "mean_few": mean, "cells": len(gains)}


def outcomes(args: argparse.Namespace) -> dict[str, object]:
    names = list(AHEAD)
    print(f"\n{'draft ms':>8} {'RTT ms':>7}  " + "".join(f"{name + ', hits':>18}" for name in names))
    least, hits = float("inf"), []
    for cell, found in outcome_cells(args):
        cells = "".join(f"{found[n]:11.1f} ({found[n + ' hits']:4.2f})" for n in names)
        print(f"{cell.draft_ms:8g} {cell.rtt_ms:7g}  {cells}", flush=True)
        least = min(least, *(found[name] / found["nothing"] for name in names))
        hits.append(found["likeliest hits"])
    print(f"\nleast gain of drafting ahead {least:.3f}; mean hit rate {statistics.fmean(hits):.2f}")
    return {"least": least, "mean_hits": statistics.fmean(hits)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=("trees", "outcomes", "both"), default="both")
    parser.add_argument("--servers", nargs="+", default=SERVERS)
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 4, 32], choices=list(SECONDS))
    parser.add_argument("--contexts", type=int, nargs="+", default=[500, 16000])
    parser.add_argument("--rtts", type=float, nargs="+", default=[5.0, 20.0, 50.0, 100.0])
    parser.add_argument("--draft-ms", type=float, default=4.0)
    parser.add_argument("--node-ms", type=float, default=0.02)
    parser.add_argument("--acceptance", type=float, default=0.75)
    parser.add_argument("--trace", default="", help="acceptance trace with ranks, instead of --acceptance")
    parser.add_argument("--known", type=Path, help="file of finished cells, read and added to")
    args = parser.parse_args()
    args.cells = {}
    if args.known is not None and args.known.exists():
        args.cells = dict(map(json.loads, args.known.read_text().splitlines()))
    args.trace = args.trace or f"{args.acceptance:g}"
    args.acceptance = SyntheticAcceptance(args.acceptance)
    if Path(args.trace).exists():
        args.acceptance = TraceAcceptance(load_trace(Path(args.trace)), ConfidenceAcceptance())
    found: dict[str, object] = {"benchmark": "tree_gains"}
    good = True
    if args.part in ("trees", "both"):
        found["trees"] = result = trees(args)
        good &= float(str(result["least"])) >= 0.99 and not float(str(result["mean_few"])) < 1.2
    if args.part in ("outcomes", "both"):
        found["outcomes"] = result = outcomes(args)
        good &= float(str(result["least"])) >= 0.99
    print(json.dumps(found))
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
