"""The built-in engine beside vLLM's on the same steps: ``python benchmarks/engine_peer.py``.

Steps of 1, 4, 16 and 64 sessions over 256 cached tokens, undrafted and with four drafts each, float32, the
bundled target. Both engines hold the same sessions in one process, with its threads and its OpenMP library.
They take turns step by step, so that whatever else the machine does hits both. vLLM is compiled; --eager
without. `outside`: the part of vLLM's step outside its executor, which is this project's engine and vLLM's
block manager. Prints medians and the fastest tenth, and one JSON line. Needs an environment with vLLM.
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
from wispprof.backends import Engine
from wispprof.engines import EngineOptions, load_engine
from wispprof.engines.loading import load_model
from wispprof.engines.torch.engine import TorchEngine
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
    vllm: VllmEngine, own: TorchEngine, executor: ExecutorTime, sessions: int, drafts: int, steps: int
) -> dict[str, Any]:
    names = [f"step {number}" for number in range(sessions)]
    tokens = [(31 * i) % 4000 + 2 for i in range(CACHED + 1 + drafts)]
    for name in names:
        vllm.open_computed(name, tokens[:CACHED])
        own.open(name)
        own.step([StepInput(name, tokens[:CACHED], needs_logits=False)])
    inputs = [StepInput(name, tokens[CACHED:], drafts) for name in names]
    totals, outside, owns = [], [], []
    for _ in range(steps + 3):
        executor.ms = 0.0
        totals.append(step_ms(vllm, inputs))
        outside.append(totals[-1] - executor.ms)
        owns.append(step_ms(own, inputs))
    for name in names:
        vllm.close(name)
        own.close(name)
    kept = [sorted(times[3:]) for times in (totals, outside, owns)]
    medians = dict(zip(("step_ms", "outside_ms", "own_ms"), map(statistics.median, kept), strict=True))
    tenths = {f"{name}_p10": times[steps // 10] for name, times in zip(medians, kept, strict=True)}
    return {"sessions": sessions, "drafts": drafts, **medians, **tenths}


def step_ms(engine: Engine, inputs: list[StepInput]) -> float:
    begin = time.perf_counter()
    engine.step(inputs)
    taken = (time.perf_counter() - begin) * 1000
    for one in inputs:
        engine.rollback(one.session, CACHED)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 4, 16, 64])
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
    own = TorchEngine(load_model(options.target, options.dtype, "cpu"), kv_tokens=1 << 16, max_sessions=80)
    executor = ExecutorTime(engine.core.model_executor)
    rows = [measure(engine, own, executor, n, k, args.steps) for k in (0, 4) for n in args.sessions]
    print("sessions drafts  vLLM ms  outside   own ms own / vLLM   (fastest tenth of the steps: the same)")
    for row in rows:
        print(f"{row['sessions']:8d} {row['drafts']:6d}", end="")
        for tail in ("", "_p10"):
            vllm, outside, mine = (row[name + tail] for name in ("step_ms", "outside_ms", "own_ms"))
            print(f" {vllm:8.2f} {outside:8.2f} {mine:8.2f} {mine / vllm:10.2f}", end="  ")
        print()
    print(json.dumps({"benchmark": "engine_peer", "load": os.getloadavg()[0], "rows": rows}))


if __name__ == "__main__":
    main()
