"""One small valid file of every artifact kind, and its reader."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wispprof.artifacts import (
    AcceptanceTrace,
    EdgeRow,
    LinkRow,
    Manifest,
    Provenance,
    RowJournal,
    StepRow,
    load_profile,
    load_trace,
    make_profile,
    read_document,
    save_profile,
    save_trace,
    write_document,
)
from wispprof.artifacts.plan import (
    BatchRow,
    BreakEvenRow,
    CapacityRow,
    DraftRow,
    Plan,
    load_plan,
    save_plan,
)
from wispprof.fitting import load_estimator
from wispprof.fitting.estimator import ESTIMATOR_KINDS, model_class
from wispprof.fitting.evaluation import assemble
from wispprof.fitting.observations import Observations, read_step_log
from wispprof.fitting.rejection_predictor import PREDICTOR_KINDS, fit_scorer, load_predictor
from wispprof.simulation.request_traces import read_clients, read_requests
from wispprof.types import BatchShape, ModelInfo

sys.path.append(str(Path(__file__).parents[1] / "fitting"))

from synthetic_steps import synthetic_rows
from synthetic_traces import synthetic_trace

Reader = Callable[[Path], Any]

PROVENANCE = Provenance("wispprof …", "2026-01-01T00:00:00+00:00", {"python": "3"})


def write_samples(folder: Path) -> dict[str, tuple[Path, Reader]]:
    """Name → (file, reader)."""
    samples: dict[str, tuple[Path, Reader]] = {}
    steps = synthetic_rows(60, samples=3)
    rows: dict[str, Any] = {
        "server": [StepRow("a", "verify", BatchShape.of([(5, 9), (5, 9)]), (1.5, 2.0), ("noisy",))],
        "edge": [EdgeRow("a", "draft_step", 64, (1.0, 1.5), energy_j=0.5)],
        "link": [LinkRow("a", "rtt", 32, (5.0,), source="published", citation="somebody")],
    }
    for kind, made in rows.items():
        manifest = Manifest(kind, ModelInfo("m"), engine={"backend": "dense"})
        save_profile(make_profile(manifest, made), folder / kind)
        samples[f"{kind} rows"] = (folder / f"{kind}.jsonl", load_profile)
        samples[f"{kind} manifest"] = (folder / f"{kind}.manifest.json", load_profile)

    trace = synthetic_trace(prompts=8, length=24, depth=3)
    short = AcceptanceTrace(trace.target, trace.draft, trace.tokenizer_hash, trace.sampling, trace.paths[:2])
    save_trace(short, folder / "trace.jsonl")
    samples["trace"] = (folder / "trace.jsonl", load_trace)

    data = Observations.of(steps)
    for kind in ESTIMATOR_KINDS:
        file = folder / f"{kind}.estimator.json"
        step_model = model_class(kind)().fit(data)
        assemble(step_model, data.median_ms, data).save(file, {"profile": "x"}, PROVENANCE)
        samples[f"estimator {kind}"] = (file, load_estimator)
    for kind in PREDICTOR_KINDS:
        file = folder / f"{kind}.predictor.json"
        fit_scorer(kind, trace.paths[:5], trace.paths[5:]).save(file, provenance=PROVENANCE)
        samples[f"predictor {kind}"] = (file, load_predictor)

    save_plan(plan(), folder / "plan.json", PROVENANCE)
    samples["plan"] = (folder / "plan.json", load_plan)
    write_document(folder / "bench.json", "bench", {"rows": [1, None]}, None, PROVENANCE)
    samples["bench"] = (folder / "bench.json", lambda path: read_document(path, "bench"))

    with RowJournal(folder / "journal", "server", {"seed": 1}) as journal:
        for row in rows["server"]:
            journal.append(row)
    samples["journal"] = (folder / "journal", _resume)
    lines = ['{"shape": [[5, 128, false], [64, 0, true]], "ms": 12.5}\n'] * 2
    (folder / "steps.jsonl").write_text("".join(lines))
    samples["step log"] = (folder / "steps.jsonl", read_step_log)
    request = (
        '{"arrival_s": 5.5, "prompt": 600, "output": 9, "prefix": [7], "drafted": [2], "accepted": [1]}\n'
    )
    (folder / "requests.jsonl").write_text(request * 2)
    samples["request log"] = (folder / "requests.jsonl", _request_log)
    return samples


def _request_log(path: Path) -> Any:
    return read_requests(path), read_clients(path)


def _resume(path: Path) -> Any:
    with RowJournal(path, "server", {"seed": 1}, resume=True) as journal:
        return journal.rows


def plan() -> Plan:
    draft = DraftRow(
        *("laptop", 20.0, 0, 4.0, "stream", 3, 0.2, 8, 40.0, 30.0, 60.0, 20.0, 2.0, 5.0, 0.1),
        feasible=True,
        nearest_tokens_per_s=8.0,
        by_k=(1.0, 2.0),
    )
    return Plan(
        draft=(draft,),
        batch=(BatchRow(4.0, 0, 1, 64, 8, 32, 20.0, 25.0),),
        capacity=(CapacityRow("laptop", 20.0, 4.0, "stream", 4, 6, 3, "time"),),
        break_even=(BreakEvenRow("laptop", 20.0, 0, "stream", 0.6, 0.3, 1.5, "split"),),
        load_bounds=(1.15, 1.5, 2.25, 4.0),
        context=512,
        cum_acceptance=(0.7, 0.5),
        settings={"seed": 1},
        inputs={"estimator": "blake2b:0"},
        notes=("a note",),
    )
