"""A plan by an estimator that keeps tile edges beside one by the linear form: simulated goodput of both.

Physics: a GPU computes rows in tiles. A step costs the same up to an edge, then it jumps. A line through
the staircase charges for rows that cost nothing and misses the jump, so its draft lengths stop short of an
edge or cross it.

Both estimators are fitted to the same shipped profile of an A100. Both plans are simulated on one server,
whose step times come from the operator tables themselves (extra `gpu-tables`): fcfs in round mode, wispprof
in stream mode, each with its plan's estimator. Devices draft 60 tokens/s over 20 ms; acceptance 0.75; nine
tenths of each prompt are held by the server.

    python benchmarks/staircase_plan.py [--quick]
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from context_plan import LAPTOP, SOURCE, cumulative

from wispprof.artifacts import load_server
from wispprof.artifacts.files import bundled_path
from wispprof.artifacts.plan import Plan
from wispprof.fitting import fit_estimator
from wispprof.planning import PlanSettings, make_plan
from wispprof.policies.cost_model import load_level, slowdown
from wispprof.policies.stopping import PlannedRows
from wispprof.profiling.operator_steps import OperatorSteps
from wispprof.profiling.operator_tables import GpuTarget, OperatorTables
from wispprof.settings.shared_settings import LinkModel
from wispprof.simulation import Scenario, ServerModel, system
from wispprof.simulation.arrivals import ClosedFleet, Lengths
from wispprof.simulation.capacity_search import run_all, workers
from wispprof.simulation.server_models import server_of
from wispprof.types import BatchCost, BatchShape, BatchTotals, Slo, StepTimeEstimator, VerifyItem

TARGET = GpuTarget("a100_sxm", "Qwen/Qwen3-32B")
KV_TOKENS = 600_000
CONTEXTS = (512, 4096)
SESSIONS = (8, 16, 24, 32, 40, 48, 64, 80, 96, 128)
SLO, RTT_MS, OUTPUT = 4.0, 20.0, 256
MODES = {"round": system("fcfs"), "stream": system("wispprof")}
SETTINGS = PlanSettings(rtts_ms=(RTT_MS,), slos=(SLO,), contexts=CONTEXTS, kv_tokens=KV_TOKENS, k_max=8)
EDGE = 1.10
"""True over planned step time from which an edge lies between."""


@dataclass(frozen=True)
class TableServer(StepTimeEstimator):
    """Steps take what the tables say; policies ask ``planned``."""

    planned: StepTimeEstimator
    steps: OperatorSteps

    @property
    def coverage(self) -> float:
        return self.planned.coverage

    def start(self) -> BatchCost:
        return self.planned.start()

    def predict(self, shape: BatchShape) -> tuple[float, float]:
        # Contexts to within 3 %, so that a launch has few different items.
        near = (
            VerifyItem(i.new, round(2.0 ** (round(np.log2(i.cached + 1) * 24) / 24)), i.prefill)
            for i in shape.items
        )
        time_ms = self.steps.step_ms(BatchShape(tuple(near)))
        return time_ms, time_ms

    def predict_totals(self, totals: BatchTotals[Any]) -> tuple[np.ndarray, np.ndarray] | None:
        return self.planned.predict_totals(totals)


class Cell(NamedTuple):
    """``ks``: draft lengths by the staircase and by the line; ``step_ms``: true steps with them."""

    mode: str
    context: int
    sessions: int
    ks: tuple[int, int]
    step_ms: tuple[float, float]
    edge: bool


def row(plan: Plan, estimator: StepTimeEstimator, mode: str, context: int, sessions: int) -> Any:
    level = load_level(slowdown(estimator, [context] * sessions))
    return plan.draft_row("laptop", RTT_MS, level, SLO, mode, context)


def scenario(plan: Plan, server: TableServer, cell: Cell, seconds: float) -> Scenario:
    options = {"rows": PlannedRows(plan, "laptop", cell.mode), "stream": cell.mode == "stream"}
    lengths = Lengths(max(1, cell.context - OUTPUT // 2), OUTPUT, reused=0.9)
    return Scenario(
        replace(MODES[cell.mode], controller="wispprof", controller_options=options),
        ServerModel(server, kv_tokens=KV_TOKENS, spread=0.0),
        ClosedFleet(cell.sessions, lengths, ramp_ms=5000.0),
        SOURCE,
        devices=((LAPTOP, 1.0),),
        links=((LinkModel(RTT_MS), 1.0),),
        slos=((Slo(SLO), 1.0),),
        seconds=seconds,
        warmup_s=10.0,
    )


def main() -> None:
    quick = "--quick" in sys.argv
    steps = OperatorSteps(OperatorTables(TARGET))
    steps._tables = None  # type: ignore[assignment]  # worker processes need the prices alone
    stairs = server_of(TARGET.name)[0].estimator
    line = fit_estimator(load_server(bundled_path(f"profiles/{TARGET.name}.jsonl")).rows, "wisp-linear")
    runs = cumulative()
    pairs = [(make_plan(e, [LAPTOP], runs, SETTINGS), e) for e in (stairs, line)]
    cells = []
    for mode in MODES:
        for context in CONTEXTS:
            for sessions in SESSIONS[::3] if quick else SESSIONS:
                rows = [row(plan, estimator, mode, context, sessions) for plan, estimator in pairs]
                if (rows[0].k, rows[0].draft_ahead) == (rows[1].k, rows[1].draft_ahead):
                    continue
                shapes = [BatchShape.uniform(sessions, 1 + r.k, context) for r in rows]
                true = [steps.step_ms(shape) for shape in shapes]
                ratios = [ms / line.predict(shape)[0] for ms, shape in zip(true, shapes, strict=True)]
                edge = max(ratios) / min(ratios) > EDGE
                cells.append(Cell(mode, context, sessions, (rows[0].k, rows[1].k), (true[0], true[1]), edge))
    seconds = 40.0 if quick else 90.0
    jobs = [scenario(plan, TableServer(e, steps), cell, seconds) for cell in cells for plan, e in pairs]
    with workers(os.cpu_count()) as executor:
        reports = run_all(jobs, executor)
    print(f"{len(cells)} cells in which the plans differ; {seconds:g} simulated seconds each")
    print(
        "mode   context sessions  k: stairs line  step ms: stairs  line  edge  goodput: stairs   line  ratio"
    )
    found: dict[bool, list[float]] = {True: [], False: []}
    for cell, ours, theirs in zip(cells, reports[::2], reports[1::2], strict=True):
        ratio = ours.goodput / theirs.goodput if theirs.goodput else (2.0 if ours.goodput else 1.0)
        found[cell.edge].append(ratio)
        print(
            f"{cell.mode:6} {cell.context:7,} {cell.sessions:8} {cell.ks[0]:10} {cell.ks[1]:4} "
            f"{cell.step_ms[0]:15.1f} {cell.step_ms[1]:5.1f}  {'edge' if cell.edge else '':4}"
            f" {ours.goodput:16.1f} {theirs.goodput:6.1f} {ratio:6.3f}"
        )
    summary = {
        name: {"cells": len(r), "least": round(min(r), 4), "mean": round(statistics.fmean(r), 4)}
        for name, r in (("edge", found[True]), ("elsewhere", found[False]))
        if r
    }
    print(json.dumps({"benchmark": "staircase_plan", **summary}))


if __name__ == "__main__":
    main()
