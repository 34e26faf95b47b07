"""What a step of vLLM costs, and what of it outside its executor: ``python benchmarks/vllm_step.py``.

A step is scheduling, the executor (inputs, forward pass, sampling) and the commit. The executor is vLLM's
own, with this project's sampler; the rest is this project's engine and vLLM's block manager. Decode steps of
1, 16 and 64 sessions, undrafted and with four drafts each.

`pays from`: so many drafts must be accepted per step and session before drafts pay at all, because undrafted
steps would have decided as many tokens in the same time. Prints a table and one JSON line. Needs an
environment with vLLM.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from wispprof.artifacts import bundled_model
from wispprof.engines import EngineOptions, load_engine
from wispprof.engines.vllm.engine import VllmEngine
from wispprof.types import StepInput


class ExecutorTime:
    """Adds up the time that vLLM's executor takes: sending work to the workers, and waiting for it."""

    def __init__(self, executor: Any) -> None:
        self.ms = 0.0
        for name in ("execute_model", "sample_tokens"):
            setattr(executor, name, self._timed(getattr(executor, name)))

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                found = call(*args, **kwargs)
            finally:
                self.ms += (time.perf_counter() - begin) * 1000
            if isinstance(found, Future) and not found.done():
                found.result = self._timed(found.result)  # type: ignore[method-assign]
            return found

        return timed


def measure(
    engine: VllmEngine, executor: ExecutorTime, sessions: int, drafts: int, cached: int, steps: int
) -> dict[str, Any]:
    names = [f"step {number}" for number in range(sessions)]
    tokens = [(31 * i) % 4000 + 2 for i in range(cached + 1 + drafts)]
    for name in names:
        engine.open_computed(name, tokens[:cached])
    inputs = [StepInput(name, tokens[cached:], drafts) for name in names]
    totals, outside = [], []
    for _ in range(steps + 3):
        executor.ms = 0.0
        begin = time.perf_counter()
        engine.step(inputs)
        total = (time.perf_counter() - begin) * 1000
        totals.append(total)
        outside.append(total - executor.ms)
        for name in names:
            engine.rollback(name, cached)
    for name in names:
        engine.close(name)
    ordered = sorted(outside[3:])
    return {
        "sessions": sessions,
        "drafts": drafts,
        "cached": cached,
        "step_ms": statistics.median(totals[3:]),
        "outside_ms": statistics.median(ordered),
        "outside_p10_ms": ordered[len(ordered) // 10],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--drafts", type=int, nargs="+", default=[0, 4])
    parser.add_argument(
        "--cached", type=int, nargs="+", default=[256], help="Tokens that each session caches."
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--eager", action="store_true", help="vLLM without compilation.")
    args = parser.parse_args()
    arguments = {"max_model_len": 2048, "enforce_eager": args.eager}
    options = EngineOptions(
        bundled_model("target"),
        "float32",
        kv_tokens=max(args.sessions) * (max(args.cached) + 256),
        max_sessions=80,
        max_drafts=8,
        arguments=arguments,
    )
    engine = load_engine("vllm", options).engine
    assert isinstance(engine, VllmEngine)
    executor = ExecutorTime(engine.core.model_executor)
    rows = []
    for cached, sessions in itertools.product(args.cached, args.sessions):
        for drafts in args.drafts:
            row = measure(engine, executor, sessions, drafts, cached, args.steps)
            undrafted_ms = rows[-1]["undrafted_ms"] if drafts and rows else row["step_ms"]
            rows.append({**row, "undrafted_ms": undrafted_ms, "pays_from": row["step_ms"] / undrafted_ms - 1})
            print(
                f"{sessions:4d} sessions, {cached} cached, {drafts} drafts: step {row['step_ms']:7.2f} ms, "
                f"outside the executor {row['outside_ms']:5.2f} ms (fastest tenth "
                f"{row['outside_p10_ms']:5.2f} ms), pays from {rows[-1]['pays_from']:.2f} accepted",
                flush=True,
            )
    print(json.dumps({"benchmark": "vllm_step", "load": os.getloadavg()[0], "rows": rows}))


if __name__ == "__main__":
    main()
