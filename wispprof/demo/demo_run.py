"""The demo: measure, answer a prompt, compare systems, write the report."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wispprof.demo.compare_policies import answer, compare, make_engine
from wispprof.demo.measure_machine import DemoSettings, Stage, measure
from wispprof.reporting import Answer, Bench, load_run, verdict, write_report


@dataclass(frozen=True)
class DemoResult:
    """Results of the demo; ``report``: path of the HTML page. ``flagged``: share of the server profile's
    rows that were measured under drift, noise or throttling."""

    answer: Answer
    benches: tuple[Bench, ...]
    report: Path
    seconds: float
    estimator_mape: float
    cum_acceptance: tuple[float, ...]
    flagged: float

    @property
    def verdict(self) -> str:
        return verdict(self.benches)

    @property
    def lossless(self) -> bool:
        """Whether every output of every system equals the target's own."""
        return all(bench.figure("mismatches") == 0 for bench in self.benches)

    def record(self) -> dict[str, Any]:
        """Scalar results, the last line of the demo's output."""
        names = ("goodput_tokens_per_s", "attainment", "tokens_per_s", "accepted_per_round")
        return {
            "verdict": self.verdict,
            "lossless": self.lossless,
            "systems": {b.policy: {name: b.figure(name) for name in names} for b in self.benches},
            "answer_tokens_per_s": self.answer.stats.get("tokens_per_s"),
            "acceptance_by_position": [round(float(s), 3) for s in self.cum_acceptance],
            "estimator_mape_percent": round(self.estimator_mape, 2),
            "flagged_rows_share": round(self.flagged, 3),
            "report": str(self.report),
            "seconds": round(self.seconds, 1),
        }


def run_demo(settings: DemoSettings, stage: Stage) -> DemoResult:
    """Run every stage and write the report. Artifacts of an earlier demo in ``out`` are replaced."""
    from wispprof.server import run_coalescing

    began = time.monotonic()
    settings.out.mkdir(parents=True, exist_ok=True)
    for old in settings.out.glob("bench-*.json"):
        old.unlink()  # of systems that this run may not include
    with _one_core_for_the_fleet():
        measured = measure(settings, stage)
        engine = make_engine(settings, measured)
        shown = run_coalescing(answer(settings, measured, engine, stage))
        benches = run_coalescing(compare(settings, measured, engine, stage))
    page = write_report(load_run(settings.out), settings.out / "report.html")
    kind = measured.estimator.kind
    return DemoResult(
        answer=shown,
        benches=tuple(benches),
        report=page,
        seconds=time.monotonic() - began,
        estimator_mape=float(measured.estimator.report["held_out"][kind]["mape"]),
        cum_acceptance=tuple(float(s) for s in measured.trace.cum_acceptance_by_position()),
        flagged=sum(bool(row.flags) for row in measured.server.rows) / len(measured.server.rows),
    )


@contextmanager
def _one_core_for_the_fleet() -> Iterator[None]:
    """Leave one core to the replayed edges: the server is measured and serves with one thread less."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(max(1, min(before, (os.cpu_count() or 1) - 1)))
    try:
        yield
    finally:
        torch.set_num_threads(before)
