"""vLLM alone beside wispprof on vLLM, one after another on one machine: ``python benchmarks/vllm_peer.py``.

(a) vLLM's API server, undrafted; (b) with its draft model on the server; (c) with n-gram speculation;
(d) wispprof on vLLM, server-only over HTTP; (e) wispprof on vLLM with replayed drafting edges, whose drafts
come from the draft model and from lookup. (f), if named in ``--systems``, is (a) with synchronous
scheduling: like (d) it ends step n before it plans step n + 1; vLLM's CPU build always does. All serve the
same target and prompts to closed fleets of devices with SLO classes. A request counts towards goodput if its
tokens after the first came at its SLO's speed.

All servers run throughout, each as its own defaults run it, and the loads take turns over them, so that a
machine that becomes slower does so for all. vLLM leaves one core to other processes, and so does wispprof;
the fleet is a process that keeps to that core. Rows go to ``--out`` as they are measured: after ``--minutes``
the run ends, and the same command goes on with what is missing.

Physics. Speculation on the server pays with the server's compute; edges pay with their own, and with the
link. A small greedy model repeats itself: n-grams are then right without any model, which `repeats` tells
(share of the target's 4-grams that it has written before). With a temperature it does not. On few cores a
step costs nearly as much per drafted token as per session, so drafts pay while there are few sessions; and
a draft counts only if draft steps and link take less time than the server's steps.

Prints a table of medians over the rounds, and one JSON line. Needs an environment with vLLM.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from _peer.peer_loads import Load, run_load
from _peer.peer_servers import SYSTEMS, PeerServer, ServerChoice, serving

from wispprof.artifacts import AcceptanceTrace, load_trace, save_trace
from wispprof.profiling.acceptance_trace import trace_pair
from wispprof.settings.profiler_settings import TraceSettings
from wispprof.types import Sampling

Row = dict[str, Any]
Cell = tuple[int, float, int, str]
"""Round, temperature, devices, system."""


def take_traces(args: argparse.Namespace) -> dict[float, Path]:
    """An acceptance trace of the pair for each temperature; taken if it is not there."""
    files = {}
    for temperature in args.temperature:
        file = files[temperature] = args.out / f"trace-{temperature:g}-{args.prompt}-{args.tokens}.jsonl"
        if not file.exists():
            settings = TraceSettings(
                count=args.paths,
                prompt_tokens=args.prompt,
                path_tokens=args.tokens,
                drafter="both",
                sampling=Sampling(temperature, seed=1),
            )
            save_trace(trace_pair(settings), file)
    return files


def repeats(trace: AcceptanceTrace) -> float:
    """Share of the 4-grams of the target's texts that were in the same text before."""
    seen = total = 0
    for path in trace.paths:
        grams = list(zip(*(path.path[i:] for i in range(4)), strict=False))
        seen, total = seen + len(grams) - len(set(grams)), total + len(grams)
    return seen / max(1, total)


def cells_of(args: argparse.Namespace) -> list[Cell]:
    """All cells in the order in which they are measured: systems take turns, each first in some round."""
    cells = []
    for number in range(args.rounds):
        first = number % len(args.systems)
        systems = args.systems[first:] + args.systems[:first]
        cells += [
            (number, temperature, devices, system)
            for temperature, devices, system in itertools.product(args.temperature, args.devices, systems)
        ]
    return cells


IDLE_S = 1.5
"""vLLM's processes wait actively for a second after their last work. The next server has the cores then."""


def measure(server: PeerServer, load: Load, pool: ProcessPoolExecutor) -> Row:
    time.sleep(IDLE_S)
    before = server.cpu_s()
    found = pool.submit(run_load, server.system, server.address, load).result()
    used = server.cpu_s() - before
    return {
        **found,
        "server_cores": used / found["seconds"],
        "cpu_ms_per_token": 1000 * used / (found["seconds"] * found["tokens_per_s"]),
        "load": os.getloadavg()[0],
    }


def keep_to_last_core() -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-1:])


def run(args: argparse.Namespace, traces: dict[float, Path], file: Path) -> list[Row]:
    """Measure the cells that ``file`` lacks, until the time is up; all rows."""
    began = time.monotonic()
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    seen = {tuple(row["cell"]) for row in rows}
    missing = [cell for cell in cells_of(args) if cell not in seen]
    if not missing:
        return rows
    choice = ServerChoice(max(args.devices), args.drafts, args.eager, args.estimator)
    spawn = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack, file.open("a") as out:
        pool = stack.enter_context(ProcessPoolExecutor(1, spawn, keep_to_last_core))
        servers = stack.enter_context(serving(sorted({cell[3] for cell in missing}), choice, args.out))
        print(f"{len(servers)} servers started after {time.monotonic() - began:.0f} s", flush=True)
        # Once without counting: the first steps of a shape compile, and a policy learns.
        for server, path in itertools.product(servers.values(), traces.values()):
            warm = Load(path, max(args.devices), 1, args.tokens, tuple(args.slo), args.rtt, args.device)
            measure(server, warm, pool)
        print(f"{len(servers)} servers ready after {time.monotonic() - began:.0f} s", flush=True)
        for cell in missing:
            if time.monotonic() - began > 60 * args.minutes:
                print("time is up; the same command goes on")
                break
            _, temperature, devices, system = cell
            if system not in servers:
                continue
            load = Load(
                *(traces[temperature], devices, args.requests, args.tokens),
                *(tuple(args.slo), args.rtt, args.device),
            )
            rows.append({"cell": cell, **measure(servers[system], load, pool)})
            print(json.dumps(rows[-1]), file=out, flush=True)
            show(cell, rows[-1])
    return rows


def medians(rows: list[Row]) -> dict[tuple[float, int, str], Row]:
    """Each figure's median over the rounds, by temperature, devices and system."""
    groups: dict[tuple[float, int, str], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row["cell"][1:]), []).append(row)
    return {
        key: {
            name: statistics.median(row[name] for row in found)
            for name in found[0]
            if name != "cell" and all(row.get(name) is not None for row in found)
        }
        | {"rounds": len(found)}
        for key, found in sorted(groups.items())
    }


def show(cell: tuple[Any, ...], row: Row) -> None:
    *_, temperature, devices, system = cell
    exact = "" if temperature and system != "e" else f"  exact {row['exact']:.0%}"
    more = ""
    if "accepted" in row:
        more = f"  {row['accepted']:.2f} accepted a round"
    if "step_ms" in row:
        more += f"  step {row['step_ms']:.1f} ms"
    print(
        f"T {temperature:3g} ({system}) {devices:3d} devices  attainment {row['attainment']:5.0%}  goodput "
        f"{row['goodput']:7.1f} of {row['tokens_per_s']:7.1f} tokens/s  TTFT {row['ttft_ms']:5.0f} ms  TPOT "
        f"{row['tpot_ms']:6.2f} ms  server {row['cpu_ms_per_token']:5.2f} ms/token, "
        f"{row['server_cores']:.2f} cores, clients {row['client_cores']:.2f}{more}{exact}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--systems", default="abcde", help="Letters of the systems to run.")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 4, 8, 16], help="Loads, in devices.")
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.8, 0.0])
    parser.add_argument("--requests", type=int, default=2, help="Requests per device.")
    parser.add_argument("--prompt", type=int, default=96, help="Tokens per prompt.")
    parser.add_argument("--tokens", type=int, default=64, help="Tokens per request.")
    parser.add_argument("--paths", type=int, default=24, help="Different prompts.")
    parser.add_argument("--slo", type=float, nargs="+", default=[30.0, 60.0], help="Classes, tokens/s.")
    parser.add_argument("--drafts", type=int, default=4, help="Draft length of vLLM's own speculation.")
    parser.add_argument("--device", default="fast", help="Kind of a drafting device.")
    parser.add_argument("--rtt", type=float, default=20.0, help="Round trip of the edges, ms.")
    parser.add_argument("--estimator", type=Path, help="Of (d) and (e); default: learned while serving.")
    parser.add_argument("--eager", action="store_true", help="vLLM without compilation.")
    parser.add_argument("--rounds", type=int, default=3, help="How often each load is measured.")
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="Measure for so long; then go on by hand."
    )
    parser.add_argument("--out", type=Path, default=Path("out/vllm-peer"), help="Folder of rows and logs.")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    keyed = {k: str(v) for k, v in vars(args).items() if k not in ("minutes", "rounds", "out", "systems")}
    digest = hashlib.sha256(json.dumps(keyed, sort_keys=True).encode()).hexdigest()[:8]
    traces = take_traces(args)
    for letter in args.systems:
        print(f"({letter}) {SYSTEMS[letter]}")
    for temperature, file in traces.items():
        print(f"temperature {temperature:g}: repeats {repeats(load_trace(file)):.0%} of the target's 4-grams")
    rows = run(args, traces, args.out / f"rows-{digest}.jsonl")
    found = medians([row for row in rows if row["cell"][3] in args.systems])
    print(f"medians of {args.rounds} rounds")
    for key, row in found.items():
        show(key, row)
    lines = [{"temperature": t, "devices": n, "system": s, **row} for (t, n, s), row in found.items()]
    print(json.dumps({"benchmark": "vllm_peer", "load": os.getloadavg()[0], "rows": lines}))


if __name__ == "__main__":
    main()
