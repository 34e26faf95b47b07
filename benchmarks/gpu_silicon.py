"""Predicted beside measured: real servers under closed loads, replayed on profiles made from operator tables.

    pip install 'wispprof[gpu-tables]'        # and, for its own column, aiconfigurator==0.12.0
    python benchmarks/gpu_silicon.py

The tables' package holds end-to-end measurements: lengths, concurrency, GPUs → TTFT and TPOT. Each load
runs in ``wispprof.simulation.closed_load``: clients, one request after another, chunked prefill. One
overhead per (framework, version), milliseconds per session of a step, is fitted on half of the rows. The
other half judges. Besides that the replay assumes, for all rows alike: a budget of 2,048 tokens for each
step, ten requests of each client, and 5 ms between an answer and the client's next request. The budget
was chosen among 2,048, 4,096 and 8,192 on the half that is fitted.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import statistics
from dataclasses import dataclass
from pathlib import Path

from wispprof.fitting import FittedEstimator
from wispprof.fitting.pipeline import fit_estimator
from wispprof.profiling.gpu_import import import_profile
from wispprof.profiling.operator_tables import GpuTarget
from wispprof.settings.profiler_settings import Output
from wispprof.simulation.closed_load import ClosedLoad, Scheduler, replay

MODEL, SYSTEM = "Qwen/Qwen3-32B", "h100_sxm"
STEP_TOKENS = 2048
OVERHEADS = [0.01 * n for n in range(16)]
KINDS = {("vllm", "0.12.0", ""): "bf16", ("trtllm", "1.0.0rc3", "fp8"): "fp8"}


@dataclass(frozen=True)
class Row:
    """One measurement. ``judged``: whether it belongs to the half that the overhead was not fitted on."""

    framework: str
    tp: int
    isl: int
    osl: int
    concurrency: int
    ttft_ms: float
    tpot_ms: float
    judged: bool


def read_rows() -> list[Row]:
    import aiconfigurator_core

    path = Path(aiconfigurator_core.__file__).parent / "systems" / "silicon_sample.csv"
    rows = []
    with path.open(newline="") as file:
        for r in csv.DictReader(file):
            key = (r["backend"], r["backend_version"], r["precision"])
            if (r["model_path"], r["system"], r["mode"]) == (MODEL, SYSTEM, "agg") and key in KINDS:
                load = (int(float(r["tp_size"])), int(r["isl"]), int(r["osl"]), int(float(r["batch_size"])))
                times = float(r["silicon_ttft_ms"]), float(r["silicon_tpot_ms"])
                # Every other row, in the file's order.
                rows.append(Row(r["backend"], *load, *times, len(rows) % 2 == 1))
    return rows


@functools.cache
def server(framework: str, tp: int, dtype: str) -> tuple[FittedEstimator, int]:
    """Estimator of steps without drafts, and KV tokens."""
    profile = import_profile(GpuTarget(SYSTEM, MODEL, tp, framework, dtype), Output())
    plain = [r for r in profile.rows if all(i.prefill or i.new == 1 for i in r.shape.items)]
    return fit_estimator(plain, "wispprof"), int(profile.manifest.engine["kv_tokens"])


def predict(row: Row, dtype: str, overhead_ms: float) -> tuple[float, float]:
    """(TTFT, TPOT) of the replayed load."""
    estimator, kv_tokens = server(row.framework, row.tp, dtype)
    # TensorRT-LLM admits a request once its whole answer fits; vLLM preempts.
    scheduler = Scheduler(step_tokens=STEP_TOKENS, reserve=row.framework == "trtllm", overhead_ms=overhead_ms)
    load = ClosedLoad(row.concurrency, row.isl, row.osl)
    found = replay(load, estimator.p50_of, kv_tokens, scheduler)
    return found.ttft_ms, found.tpot_ms


def generator(row: Row, dtype: str) -> tuple[float, float] | None:
    """What the tables' own estimator says; ``None`` without it or where it refuses."""
    try:
        from aiconfigurator.cli.api import cli_estimate
    except ImportError:
        return None
    modes = {"gemm_quant_mode": "bfloat16", "kvcache_quant_mode": "bfloat16", "fmha_quant_mode": "bfloat16"}
    if dtype == "fp8":
        modes = dict.fromkeys(modes, "fp8")
    try:
        found = cli_estimate(
            MODEL,
            SYSTEM,
            backend_name=row.framework,
            isl=row.isl,
            osl=row.osl,
            batch_size=row.concurrency,
            tp_size=row.tp,
            **modes,
        )
        return float(found.ttft), float(found.tpot)
    except (ValueError, RuntimeError, KeyError, AttributeError, TypeError):
        return None


def error(predicted: float, measured: float) -> float:
    return abs(predicted / measured - 1.0)


def percent(errors: list[float]) -> float | None:
    return round(100 * statistics.median(errors), 1) if errors else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--framework", choices=("vllm", "trtllm"), help="Only this one.")
    only = parser.parse_args().framework
    rows, records = read_rows(), []
    for (framework, version, _), dtype in KINDS.items():
        if only not in (None, framework):
            continue
        own = [r for r in rows if r.framework == framework]
        learn = [r for r in own if not r.judged]

        def loss(overhead_ms: float, learn: list[Row] = learn, dtype: str = dtype) -> float:
            return statistics.median(error(predict(r, dtype, overhead_ms)[1], r.tpot_ms) for r in learn)

        overhead_ms = min(OVERHEADS, key=loss)
        judged = [r for r in own if r.judged]
        ours = {r: predict(r, dtype, overhead_ms) for r in judged}
        theirs = {r: found for r in judged if (found := generator(r, dtype)) is not None}
        for tp in (0, *sorted({r.tp for r in own})):
            part = [r for r in judged if tp in (0, r.tp)]
            seen = [r for r in part if r in theirs]
            records.append(
                {
                    "framework": f"{framework} {version} {dtype}",
                    "tp": tp or "all",
                    "overhead_ms": round(overhead_ms, 3),
                    "rows": len(part),
                    "tpot_error": percent([error(ours[r][1], r.tpot_ms) for r in part]),
                    "ttft_error": percent([error(ours[r][0], r.ttft_ms) for r in part]),
                    "tpot_bias": round(100 * statistics.median(ours[r][1] / r.tpot_ms - 1 for r in part), 1),
                    "ttft_bias": round(100 * statistics.median(ours[r][0] / r.ttft_ms - 1 for r in part), 1),
                    "generator_rows": len(seen),
                    "generator_tpot_error": percent([error(theirs[r][1], r.tpot_ms) for r in seen]),
                    "generator_ttft_error": percent([error(theirs[r][0], r.ttft_ms) for r in seen]),
                }
            )
            print(" | ".join(f"{k} {v}" for k, v in records[-1].items()), flush=True)
    print(json.dumps(records))


if __name__ == "__main__":
    main()
