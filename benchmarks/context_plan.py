"""A plan of several contexts beside one of 512 tokens: simulated goodput where the two differ.

Physics: a step reads the cache of each of its sessions once, however many drafts it verifies. With short
caches the time of a step is that of weights and rows, so drafts cost; with long ones it is that of caches,
so drafts are nearly free. A plan made at 512 cached tokens says k = 0 for loads at which a session of 32,000
should draft.

Server: weights of 16 GB and caches of 131 KB a token read at 4.8 TB/s, 2 ms of fixed work, 0.03 ms a row:
8 B parameters in bf16 on an H200, from data sheets. Devices draft 60 tokens/s; acceptance 0.75. Of each
prompt 90 % is held by the server already (earlier turns). Policies: fcfs in round mode, wispprof in stream
mode.

    python benchmarks/context_plan.py [--quick]
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from dataclasses import replace

from wispprof.artifacts.plan import Plan
from wispprof.planning import PlanSettings, make_plan
from wispprof.planning.batch_table import sessions_of_levels
from wispprof.planning.session_speed import LoadedStepTimes, Runs
from wispprof.policies.linear_cost import LinearCost
from wispprof.policies.stopping import PlannedRows
from wispprof.settings.shared_settings import LinkModel
from wispprof.simulation import Scenario, ServerModel, system
from wispprof.simulation.arrivals import ClosedFleet, Lengths
from wispprof.simulation.capacity_search import run_all, workers
from wispprof.simulation.devices import DeviceProfile
from wispprof.simulation.synthetic_acceptance import SyntheticAcceptance
from wispprof.types import Slo

SERVER = LinearCost(5.4, row_ms=0.03, kv_ms=2.7e-5)
KV_TOKENS = 900_000
CONTEXTS = (500, 2000, 8000, 32_000)
SLOS = (8.0, 16.0)
RTTS_MS = (20.0, 60.0)
OUTPUT = 256
LAPTOP = DeviceProfile.from_speed("laptop", 60.0)
SOURCE = SyntheticAcceptance(0.75, persistence=0.5)
MODES = {"round": system("fcfs"), "stream": system("wispprof")}
SETTINGS = PlanSettings(rtts_ms=RTTS_MS, slos=SLOS, contexts=CONTEXTS, kv_tokens=KV_TOKENS, k_max=8)


def cumulative() -> Runs:
    """Runs of the acceptance source, counted over its own outputs."""
    outputs = [SOURCE.output((seed,), 1, 400) for seed in range(60)]
    runs = []
    for output in outputs:
        for place in range(300):
            output.length = place + 1
            output._wrong_from = -1
            runs.append(output.ahead(16))
    return Runs.of([sum(r > j for r in runs) / len(runs) for j in range(16)])


def scenario(plan: Plan, mode: str, context: int, sessions: int, slo: float, rtt_ms: float, seconds: float):
    made = MODES[mode]
    rows = PlannedRows(plan, "laptop", mode)
    options = {"rows": rows, "stream": mode == "stream"}
    return Scenario(
        replace(made, controller="wispprof", controller_options=options),
        ServerModel(SERVER, kv_tokens=KV_TOKENS),
        ClosedFleet(sessions, Lengths(max(1, context - OUTPUT // 2), OUTPUT, reused=0.9), ramp_ms=5000.0),
        SOURCE,
        devices=((LAPTOP, 1.0),),
        links=((LinkModel(rtt_ms), 1.0),),
        slos=((Slo(slo), 1.0),),
        seconds=seconds,
        warmup_s=10.0,
    )


def main() -> None:
    seconds = 30.0 if "--quick" in sys.argv else 120.0
    runs = cumulative()
    many = make_plan(SERVER, [LAPTOP], runs, SETTINGS)
    one = make_plan(SERVER, [LAPTOP], runs, replace(SETTINGS, contexts=(512,)))
    cells = []
    for context in CONTEXTS:
        limits = replace(SETTINGS, contexts=(context,))
        levels = sessions_of_levels(LoadedStepTimes(SERVER, context), limits.kv_sessions)
        for level, sessions in levels.items():
            for slo in SLOS:
                for rtt_ms in RTTS_MS:
                    for mode in MODES:
                        rows = [p.draft_row("laptop", rtt_ms, level, slo, mode, context) for p in (one, many)]
                        if (rows[0].k, rows[0].draft_ahead) != (rows[1].k, rows[1].draft_ahead):
                            cells.append((mode, context, level, sessions, slo, rtt_ms, rows[0].k, rows[1].k))
    pairs = [scenario(p, c[0], c[1], c[3], c[4], c[5], seconds) for c in cells for p in (one, many)]
    with workers(os.cpu_count()) as executor:
        reports = run_all(pairs, executor)
    print(f"{len(cells)} cells in which the plans differ; {seconds:g} simulated seconds each")
    print("mode    context load sessions  SLO  RTT   k: 512 own   goodput: 512     own   ratio")
    ratios = []
    for cell, before, after in zip(cells, reports[::2], reports[1::2], strict=True):
        ratio = after.goodput / before.goodput if before.goodput else (2.0 if after.goodput else 1.0)
        ratios.append(ratio)
        mode, context, level, sessions, slo, rtt_ms, k_one, k_many = cell
        print(
            f"{mode:7} {context:7,} {level:4} {sessions:8} {slo:4g} {rtt_ms:4g} {k_one:8} {k_many:3}"
            f" {before.goodput:14.1f} {after.goodput:7.1f} {ratio:7.3f}"
        )
    summary = {
        "cells": len(ratios),
        "least": round(min(ratios), 4),
        "mean": round(statistics.fmean(ratios), 4),
        "lower": sum(r < 0.999 for r in ratios),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
