"""Measure this machine, fit, and plan, from Python.

    python examples/measure_and_plan.py [FOLDER]

Uses the bundled pair on both sides, as if this machine were server and device. Takes about a minute.
"""

from __future__ import annotations

import sys
from pathlib import Path

import wispprof
from wispprof.artifacts import save_trace
from wispprof.settings.profiler_settings import Output, SweepSettings

RTTS_MS = (5.0, 50.0)
SLOS = (10.0, 40.0)


def measure(folder: Path, sweep: SweepSettings | None = None) -> None:
    """Write a server profile, an edge profile and an acceptance trace to ``folder``."""
    wispprof.profile_server(
        wispprof.ServerProfilerSettings(sweep=sweep, output=Output(folder / "server.jsonl", overwrite=True))
    )
    wispprof.profile_edge(
        wispprof.EdgeProfilerSettings(
            sweep=sweep, sustained_s=0.0, output=Output(folder / "edge.jsonl", overwrite=True)
        )
    )
    taken = wispprof.trace(wispprof.TraceSettings(count=12, prompt_tokens=64, path_tokens=48))
    save_trace(taken, folder / "trace.jsonl")


def plan(folder: Path) -> list[str]:
    """Fit an estimator, make a plan, and return what it says, one line per round trip and SLO."""
    wispprof.fit(folder, server=[folder / "server.jsonl"], trace=[folder / "trace.jsonl"])
    made = wispprof.plan(
        folder / "estimator.json",
        edges=[f"laptop={folder / 'edge.jsonl'}"],
        traces=[str(folder / "trace.jsonl")],
        settings=wispprof.PlanSettings(rtts_ms=RTTS_MS, slos=SLOS),
    )
    wispprof.save_plan(made, folder / "plan.json")
    lines = []
    for rtt_ms in RTTS_MS:
        for slo in SLOS:
            row = made.draft_row("laptop", rtt_ms, 0, slo, "round")
            meets = "meets" if row.feasible else "misses"
            lines.append(
                f"RTT {rtt_ms:3.0f} ms, SLO {slo:3.0f} tokens/s: draft {row.k}, "
                f"{row.expected_tokens_per_s:5.1f} tokens/s expected, {meets} the SLO"
            )
    return lines


def main(folder: Path, sweep: SweepSettings | None = None) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    measure(folder, sweep)
    lines = plan(folder)
    print("\n".join(lines))
    return lines


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out/example"))
