"""Losslessness of split decoding at full size, on the bundled pair or any other.

50 held-out prompts × 64 tokens over the real WebSocket: greedy output against transformers' own
``generate`` for k = 0, 1, 4, 8 and batches of 1 to 16 sessions, and sampled output (T = 0.8, top-p 0.9)
against the undrafted run of the same seed, under every batching policy. Then draft trees of 4 and 16 nodes,
in rounds and asynchronously, beside chains and prompts: greedy, T = 0.8 and T = 1. Float32: in bfloat16 the
batch shape itself moves logits near ties.

    python benchmarks/lossless.py                      # everything
    python benchmarks/lossless.py --trees              # only the draft trees
    python benchmarks/lossless.py --trees --sampling T=1
    python benchmarks/lossless.py --prompts 8 --tokens 24

Exit code 1 if one token differs. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main() -> int:
    arguments = _arguments()

    from wispprof.artifacts import bundled_path
    from wispprof.drafters.torch_drafter import TorchDrafter
    from wispprof.engines.loading import load_model
    from wispprof.engines.torch.engine import TorchEngine
    from wispprof.policies import BATCH_POLICIES
    from wispprof.profiling.prompts import held_out_prompts
    from wispprof.testing.lossless import Case, compare, generate_alone, split_outputs
    from wispprof.types import Sampling, ServedModel

    pair = "models/reference-pair/"
    target = load_model(arguments.target or bundled_path(pair + "target"))
    draft = load_model(arguments.draft or bundled_path(pair + "draft"))
    last = arguments.skip + arguments.prompts
    prompts = held_out_prompts(target.tokenizer, last, 48)[arguments.skip :]
    eos = target.tokenizer.eos_token_id
    stop = [] if eos is None else [int(eos)]
    size = arguments.tokens
    engine = TorchEngine(target, kv_tokens=65_536, max_sessions=64)
    info = target.info
    model = ServedModel(info.id, info.tokenizer_hash, info.vocab_size, engine.max_context)

    def split(case: Case) -> list[list[int]]:
        work = split_outputs(engine, model, lambda: TorchDrafter(draft), prompts, size, case, stop)
        return asyncio.run(work)

    samplings = {
        "greedy": Sampling(),
        "T=0.8": Sampling(temperature=0.8, top_p=0.9, seed=1),
        "T=1": Sampling(temperature=1.0, seed=2),
    }

    @functools.cache
    def wanted(name: str) -> list[list[int]]:
        """The texts without drafts."""
        if name == "greedy":
            return generate_alone(target.model, prompts, size, stop)
        return split(Case(0, 16, "fcfs", samplings[name]))

    begun = time.perf_counter()
    columns = f"{'sampling':>9} {'policy':>18} {'k':>2} {'nodes':>5} {'batch':>5} {'tokens':>7} {'wrong':>5}"
    print(f"{columns} first")
    rows = []

    def check(name: str, k: int, sessions: int, policy: str = "wispprof", nodes: int = 0) -> None:
        case = Case(k, sessions, policy, samplings[name], nodes)
        verdict = compare(split(case), wanted(name))
        rows.append(verdict.lossless)
        print(
            f"{name:>9} {case.policy:>18} {case.k:>2} {case.tree_nodes:>5} {case.sessions:>5} "
            f"{verdict.tokens:>7} {verdict.wrong:>5} {verdict.first or ''}",
            flush=True,
        )

    def chains() -> None:
        for k in (0, 1, 4, 8):
            check("greedy", k, 16)
        for sessions in (1, 5):
            check("greedy", 4, sessions, "wisp")
        for policy in BATCH_POLICIES:
            check("T=0.8", 4, 16, policy)
        for k in (1, 8):
            check("T=0.8", k, 16)

    if not arguments.trees:
        chains()
    for name in arguments.sampling:
        for nodes, sessions, policy in ((4, 16, "wisp"), (16, 16, "wisp"), (16, 5, "wispprof")):
            check(name, 8, sessions, policy, nodes)

    right = wanted(arguments.sampling[-1])
    spoiled = [list(tokens) for tokens in right]
    spoiled[-1][-1] += 1
    control = compare(spoiled, right)
    print(f"negative control: one corrupted token of {control.tokens} is seen: {not control.lossless}")
    lossless = all(rows) and not control.lossless
    summary = {
        "benchmark": "lossless",
        "prompts": len(prompts),
        "tokens": size,
        "cases": len(rows),
        "lossless": lossless,
        "seconds": round(time.perf_counter() - begun, 1),
    }
    print(json.dumps(summary))
    return 0 if lossless else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", default="", help="folder or hub id (default: bundled)")
    parser.add_argument("--draft", default="", help="folder or hub id (default: bundled)")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--skip", type=int, default=0, help="leave out the first prompts: a run in pieces")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--trees", action="store_true", help="only the draft trees")
    samplings = ("greedy", "T=0.8", "T=1")
    parser.add_argument("--sampling", nargs="+", choices=samplings, default=samplings, help="of the trees")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
