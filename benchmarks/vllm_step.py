"""What a step of vLLM costs outside its executor: ``python benchmarks/vllm_step.py``.

A step is scheduling, the executor (inputs, forward pass, sampling) and the commit. The executor is vLLM's
own, with this project's sampler; the rest is this project's engine and vLLM's block manager. Decode steps of
1, 16 and 64 sessions, undrafted and with four drafts each. Prints a table and one JSON line. Needs an
environment with vLLM.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

from wispprof.artifacts import bundled_model
from wispprof.engines import EngineOptions, load_engine
from wispprof.engines.vllm.engine import VllmEngine
from wispprof.types import StepInput

CACHED = 256


class ExecutorTime:
    """Adds up the time that vLLM's executor takes."""

    def __init__(self, executor: Any) -> None:
        self.ms = 0.0
        for name in ("execute_model", "sample_tokens"):
            setattr(executor, name, self._timed(getattr(executor, name)))

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.ms += (time.perf_counter() - begin) * 1000

        return timed


def measure(
    engine: VllmEngine, executor: ExecutorTime, sessions: int, drafts: int, steps: int
) -> dict[str, Any]:
    names = [f"step {number}" for number in range(sessions)]
    tokens = [(31 * i) % 4000 + 2 for i in range(CACHED + 1 + drafts)]
    for name in names:
        engine.open_computed(name, tokens[:CACHED])
    inputs = [StepInput(name, tokens[CACHED:], drafts) for name in names]
    totals, outside = [], []
    for _ in range(steps + 3):
        executor.ms = 0.0
        begin = time.perf_counter()
        engine.step(inputs)
        total = (time.perf_counter() - begin) * 1000
        totals.append(total)
        outside.append(total - executor.ms)
        for name in names:
            engine.rollback(name, CACHED)
    for name in names:
        engine.close(name)
    ordered = sorted(outside[3:])
    return {
        "sessions": sessions,
        "drafts": drafts,
        "step_ms": statistics.median(totals[3:]),
        "outside_ms": statistics.median(ordered),
        "outside_p10_ms": ordered[len(ordered) // 10],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--eager", action="store_true", help="vLLM without compilation.")
    args = parser.parse_args()
    arguments = {"max_model_len": 2048, "enforce_eager": args.eager}
    options = EngineOptions(
        bundled_model("target"),
        "float32",
        kv_tokens=1 << 16,
        max_sessions=80,
        max_drafts=8,
        arguments=arguments,
    )
    engine = load_engine("vllm", options).engine
    assert isinstance(engine, VllmEngine)
    executor = ExecutorTime(engine.core.model_executor)
    rows = [measure(engine, executor, n, k, args.steps) for n in args.sessions for k in (0, 4)]
    for row in rows:
        print(
            f"{row['sessions']:4d} sessions, {row['drafts']} drafts: step {row['step_ms']:7.2f} ms, outside "
            f"the executor {row['outside_ms']:5.2f} ms (fastest tenth {row['outside_p10_ms']:5.2f} ms)"
        )
    print(json.dumps({"benchmark": "vllm_step", "load": os.getloadavg()[0], "rows": rows}))


if __name__ == "__main__":
    main()
