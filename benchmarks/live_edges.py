"""What two hundred live edges cost the accelerator: the cycle between steps over the engine's own time.

    python benchmarks/live_edges.py                       # 5, 20, 50 ms a step; 10 to 400 edges
    python benchmarks/live_edges.py --against OLD_CHECKOUT # another checkout's server, in turns

Physics. The engine sleeps for a fixed time and looks its answers up, so it costs no processor time. What a
cycle takes beyond that, an accelerator would idle: handing over results, committing, planning, feeding, and
whatever keeps the interpreter busy at that moment. Edges live in another process, hold real draft buffers,
send real frames, and check every token. Each drafts at 100 tokens/s, of which 80 % are right.

``cycle``: start of a step to the start of the next, over the engine's time. ``gap``: end of a step to the
start of the next, both in its thread. ``latency``: end of a step to its commit's arrival at the edge.
``cpu``: share of one core, by process. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
WARM_S = 1.0


def cpu_seconds(pid: int) -> float:
    """Processor time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(one for child in children for one in family(int(child)))]


def run(code: Path, step_ms: float, edges: int, seconds: float) -> dict[str, Any]:
    """One server of ``code`` under so many edges."""
    paths = os.pathsep.join((str(HERE), str(code)))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        seen, got = Path(folder, "engine.json"), Path(folder, "edges.json")
        arguments = (str(step_ms), str(max(64, edges)), str(seen))
        server = subprocess.Popen(
            [sys.executable, "-m", "_live.scripted_server", *arguments],
            env=environment,
            cwd=folder,  # Python looks there first.
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert server.stdout is not None
            port = server.stdout.readline().strip()
            fleet_args = (port, str(edges), str(WARM_S + seconds + 0.5), str(got))
            fleet = subprocess.Popen(
                [sys.executable, "-m", "_live.edges", *fleet_args],
                env=environment | {"PYTHONPATH": os.pathsep.join((str(HERE), str(HERE.parent)))},
                cwd=folder,
                stdout=subprocess.PIPE,
            )
            assert fleet.stdout is not None
            fleet.stdout.readline()  # every edge has its first commit
            time.sleep(WARM_S)
            begin, processes = time.monotonic(), [*family(server.pid), fleet.pid]
            before = [cpu_seconds(pid) for pid in processes]
            time.sleep(seconds)
            end = time.monotonic()
            spent = [cpu_seconds(pid) - start for pid, start in zip(processes, before, strict=True)]
            if fleet.wait():
                raise SystemExit("the edges failed")
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait()
        return summary(json.loads(seen.read_text()), json.loads(got.read_text()), step_ms, begin, end) | {
            "cpu": [round(one / (end - begin), 2) for one in spent]
        }


def summary(
    seen: dict[str, Any], got: dict[str, Any], step_ms: float, begin: float, end: float
) -> dict[str, Any]:
    """Figures of the steps and commits between two times."""
    steps = [one for one in seen["steps"] if begin <= one[0] <= end]
    cycles = sorted((b[0] - a[0]) * 1000.0 / step_ms for a, b in pairwise(steps))
    gaps = sorted((b[0] - a[1]) * 1000.0 for a, b in pairwise(steps))
    ended = {(edge, length): at for edge, length, at in seen["commits"]}
    arrived = [(edge, length, at) for edge, length, at in got["commits"] if begin <= at <= end]
    latency = sorted((at - ended[edge, length]) * 1000.0 for edge, length, at in arrived)
    return {
        "cycle": round(statistics.median(cycles), 3),
        "cycle_p99": round(cycles[int(0.99 * len(cycles))], 3),
        "gap_ms": round(statistics.median(gaps), 2),
        "gap_p99_ms": round(gaps[int(0.99 * len(gaps))], 2),
        "items": round(statistics.mean(items for _, _, items in steps), 1),
        "commits_per_s": round(len(arrived) / (end - begin)),
        "latency_ms": round(statistics.median(latency), 2),
        "latency_p99_ms": round(latency[int(0.99 * len(latency))], 2),
        "frames_per_s": round(got["frames"] / got["seconds"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--against", type=Path, help="a checkout whose server is measured in turns")
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--cells", help="comma-separated STEP_MS:EDGES", default="")
    options = parser.parse_args()
    cells = [(step, edges) for step in (5.0, 20.0, 50.0) for edges in (10, 50, 200, 400)]
    if options.cells:
        pairs = (cell.split(":") for cell in options.cells.split(","))
        cells = [(float(step), int(edges)) for step, edges in pairs]
    codes = {"this": HERE.parent} | ({"other": options.against.resolve()} if options.against else {})
    print(
        f"{'step ms':>7} {'edges':>5} {'code':>6} {'cycle':>6} {'p99':>6} {'gap ms':>6} {'p99':>6} "
        f"{'items':>6} {'commits/s':>9} {'frames/s':>8} {'latency ms':>10} {'p99':>7}  cpu (server …, edges)"
    )
    rows = []
    for step_ms, edges in cells:
        for name, code in codes.items():
            row = run(code, step_ms, edges, options.seconds)
            rows.append({"step_ms": step_ms, "edges": edges, "code": name} | row)
            print(
                f"{step_ms:>7.0f} {edges:>5} {name:>6} {row['cycle']:>6.3f} {row['cycle_p99']:>6.2f} "
                f"{row['gap_ms']:>6.2f} {row['gap_p99_ms']:>6.2f} "
                f"{row['items']:>6} {row['commits_per_s']:>9} {row['frames_per_s']:>8} "
                f"{row['latency_ms']:>10.2f} {row['latency_p99_ms']:>7.2f}  {row['cpu']}",
                flush=True,
            )
    print(json.dumps({"benchmark": "live_edges", "cores": os.cpu_count(), "rows": rows}))


if __name__ == "__main__":
    main()
