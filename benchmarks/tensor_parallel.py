"""Tensor parallel against one process: the same tokens, and what a step costs either way.

20 held-out prompts through a real server and real edges: the target whole in one process (greedy: by
transformers' own ``generate``), then split over ``--ranks`` processes that follow rank 0's engine loop.
Every KV cache is audited on every rank afterwards. Float32: the sums between ranks round in another order,
which only moves an argmax where two logits are equal to the last digit.

Physics: a rank reads its share of the weights and of the KV, so a step of a target larger than a
memory bus wants to read gets shorter; a small one on one machine's cores gets longer, by two sums per
layer. The printed step times of the bundled target on CPU are the second kind.

    python benchmarks/tensor_parallel.py              # starts torchrun with two processes
    python benchmarks/tensor_parallel.py --prompts 4 --tokens 16

Exit code 1 where one token differs. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main() -> int:
    arguments = _arguments()

    from wispprof.engines.tensor_parallel import join, launched

    if not launched():
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        os.execv(sys.executable, [sys.executable, *torchrun, str(arguments.ranks), *sys.argv])

    from wispprof.artifacts import bundled_path
    from wispprof.engines.loading import load_model
    from wispprof.engines.torch.engine import TorchEngine
    from wispprof.engines.torch.multi_rank_engine import MultiRankEngine, follow

    folder = arguments.target or bundled_path("models/reference-pair/target")
    ranks = join(arguments.ranks, arguments.device)
    engine = TorchEngine(load_model(folder, ranks=ranks), kv_tokens=16_384, max_sessions=64)
    engine.warm_up()
    try:
        if ranks.rank:
            follow(engine, ranks)
            return 0
        rank0 = MultiRankEngine(engine, ranks)
        try:
            return _compare(arguments, folder, rank0)
        finally:
            rank0.shutdown()
    finally:
        ranks.leave()


def _compare(arguments: argparse.Namespace, folder: Any, rank0: Any) -> int:
    from wispprof.artifacts import bundled_path
    from wispprof.drafters.torch_drafter import TorchDrafter
    from wispprof.engines.loading import load_model
    from wispprof.engines.torch.engine import TorchEngine
    from wispprof.profiling.prompts import held_out_prompts
    from wispprof.testing.lossless import Case, compare, generate_alone, split_outputs
    from wispprof.types import Sampling, ServedModel

    target = load_model(folder)
    draft = load_model(arguments.draft or bundled_path("models/reference-pair/draft"))
    prompts = held_out_prompts(target.tokenizer, arguments.prompts, 48)
    whole = TorchEngine(target, kv_tokens=16_384, max_sessions=64)
    info, size = target.info, arguments.tokens
    model = ServedModel(info.id, info.tokenizer_hash, info.vocab_size, whole.max_context)

    def split(engine: Any, case: Case) -> list[list[int]]:
        work = split_outputs(engine, model, lambda: TorchDrafter(draft), prompts, size, case)
        return asyncio.run(work)

    hot = Sampling(temperature=0.8, top_p=0.9, seed=1)
    greedy = generate_alone(target.model, prompts, size)
    sampled = split(whole, Case(0, 8, "fcfs", hot))
    cases = [
        ("greedy", Case(0, 8), greedy),
        ("greedy", Case(4, 8), greedy),
        ("greedy", Case(4, 1, "wisp"), greedy),
        ("T=0.8", Case(0, 8, sampling=hot), sampled),
        ("T=0.8", Case(4, 8, sampling=hot), sampled),
    ]
    print(f"{'sampling':>9} {'policy':>9} {'k':>2} {'batch':>5} {'tokens':>7} {'wrong':>5} first")
    wrong = 0
    for name, case, wanted in cases:
        verdict = compare(split(rank0, case), wanted)
        wrong += verdict.wrong
        print(
            f"{name:>9} {case.policy:>9} {case.k:>2} {case.sessions:>5} {verdict.tokens:>7} "
            f"{verdict.wrong:>5} {verdict.first or ''}",
            flush=True,
        )
    spoiled = [list(tokens) for tokens in greedy]
    spoiled[-1][-1] += 1
    seen = compare(spoiled, greedy).wrong == 1
    print(f"negative control: one corrupted token is seen: {seen}")
    summary = {
        "benchmark": "tensor_parallel",
        "ranks": arguments.ranks,
        "prompts": len(prompts),
        "tokens": size,
        "cases": len(cases),
        "wrong": wrong,
        "step_ms_one_process": _step_ms(whole),
        "step_ms_ranks": _step_ms(rank0),
    }
    print(json.dumps(summary))
    return 0 if not wrong and seen else 1


def _step_ms(engine: Any, items: int = 8, drafts: int = 4, cached: int = 128) -> float:
    """Median of 20 verify steps."""
    from wispprof.types import StepInput

    names = [f"timed {i}" for i in range(items)]
    for name in names:
        engine.open(name)
        engine.step([StepInput(name, [5] * cached, 0, False)])
    times = []
    for _ in range(20):
        begun = time.perf_counter()
        engine.step([StepInput(name, [5] * (drafts + 1), drafts) for name in names])
        times.append((time.perf_counter() - begun) * 1000)
        for name in names:
            engine.rollback(name, cached)
    for name in names:
        engine.close(name)
    return round(sorted(times)[10], 2)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", default="", help="folder or hub id (default: bundled)")
    parser.add_argument("--draft", default="", help="folder or hub id (default: bundled)")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=48)
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
