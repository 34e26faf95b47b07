"""The verifier engine's step against what it replaces, in one run.

    python benchmarks/engine.py                       # CPU: the bundled target
    python benchmarks/engine.py --model qwen3-8b --dtype bfloat16 --device cuda

What is compared. A verify step of 16 sessions, 5 new tokens each, over contexts from 128 to 1,024:

- engine       one ragged forward on the KV store (the subject)
- trees        the same with the drafts of each session as a binary tree
- loop         a python loop of single-session forwards, each with transformers' own cache: reads all
               weights 16 times, and multiplies 5 rows at a time
- dense        one batched forward of 16 x 5 tokens at one equal context (the same sum of cached tokens),
               with transformers' own cache: what a server could do if all sessions were always equally
               long. Its cache is copied to append, and its KV heads are repeated for every query head
- engine@N, dense@N   both at an equal context of N tokens, where that copying weighs most

The physics. A step costs the weights once (2 flops per parameter and token, and reading them), plus
attention: 4 * heads * head_dim flops per query-key pair and layer, and reading each session's keys and values
once. On few cores a step of 80 tokens is bound by arithmetic; the loop's 5-row products run at a fraction of
that rate. The arms take turns, so that whatever else the machine does hits all of them; `median` is over all
turns, `quiet` the 10th percentile. The engine's steps are also divided by their roofline: on CUDA bytes over
the measured bandwidth, or flops over the measured matrix rate, whichever is longer, with graphs and without;
on a CPU flops over the rate of a layer's widest product at this many rows. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from wispprof.engines.loading import LoadedModel, load_model, random_model
from wispprof.engines.model_shapes import PRESETS
from wispprof.engines.torch.engine import TorchEngine
from wispprof.engines.torch.packed_linear import PackedLinear
from wispprof.types import BatchShape, StepInput

Arm = Callable[[], None]


def main() -> None:
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    loaded = load(args)
    device = loaded.device
    items, new = args.items, args.new
    contexts = np.linspace(args.shortest, args.longest, items).astype(int).tolist()
    equal = round(sum(contexts) / items)
    arms: dict[str, Arm] = {}
    rng = np.random.default_rng(0)
    kv_tokens = 2 * items * (2 * args.longest + args.equal + 3 * new)

    limits = {"kv_tokens": kv_tokens, "max_sessions": 4 * items}
    engine = TorchEngine(loaded, **limits, attention=args.attention)
    arms["engine"] = engine_arm(engine, "ragged", contexts, new, rng)
    arms["trees"] = engine_arm(engine, "trees", contexts, new, rng, trees=True)
    arms[f"engine@{args.equal}"] = engine_arm(engine, "equal", [args.equal] * items, new, rng)
    if device.type == "cuda":
        plain = TorchEngine(loaded, **limits, attention=args.attention, graphs=False)
        arms["engine, no graphs"] = engine_arm(plain, "ragged", contexts, new, rng)
        arms[f"engine@{args.equal}, no graphs"] = engine_arm(plain, "equal", [args.equal] * items, new, rng)
    if not args.engine_only:
        arms["loop"] = loop_arm(loaded, contexts, new, rng)
        arms["dense"] = dense_arm(loaded, items, equal, new, rng)
        arms[f"dense@{args.equal}"] = dense_arm(loaded, items, args.equal, new, rng)

    rate = 0.0 if device.type == "cuda" else cpu_rate(loaded, items * new)
    times = interleave(arms, args.repeats, device)
    medians = {name: statistics.median(t) for name, t in times.items()}
    quiet = {name: float(np.quantile(t, 0.1)) for name, t in times.items()}
    roof = {}
    bandwidth = math.inf
    if device.type == "cuda":
        bandwidth, rate = device_rates(loaded.dtype)
    print(f"measured: {bandwidth / 1e9:.0f} GB/s, {rate / 1e9:.0f} GFLOP/s", file=sys.stderr)
    for name in arms:
        if name.startswith(("engine", "trees")):
            shape = [args.equal] * items if "@" in name else contexts
            roof[name] = roofline_ms(loaded, BatchShape.of([(new, c) for c in shape]), bandwidth, rate)
    print_table(loaded, args, medians, quiet, roof)
    print(json.dumps(summary(loaded, args, medians, quiet, roof)))


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="", help="folder, hub id or preset shape (default: bundled target)")
    p.add_argument("--dtype", default="float32")
    p.add_argument("--device", default="auto")
    p.add_argument("--items", type=int, default=16)
    p.add_argument("--new", type=int, default=5)
    p.add_argument("--shortest", type=int, default=128)
    p.add_argument("--longest", type=int, default=1024)
    p.add_argument("--equal", type=int, default=1024, help="context of the equal-length comparison")
    p.add_argument("--repeats", type=int, default=20)
    p.add_argument("--threads", type=int, default=0, help="torch threads (default: torch's own choice)")
    p.add_argument("--attention", default="auto", help="of the paged backend: triton, varlen or gather")
    p.add_argument("--engine-only", action="store_true", help="leave the transformers arms out")
    return p.parse_args()


def load(args: argparse.Namespace) -> LoadedModel:
    if args.model in PRESETS:
        return random_model(args.model, dtype=args.dtype, device=args.device)
    if not args.model:
        from wispprof.artifacts import bundled_path

        args.model = str(bundled_path("models/reference-pair/target"))
    return load_model(args.model, dtype=args.dtype, device=args.device)


def engine_arm(
    engine: TorchEngine,
    name: str,
    contexts: list[int],
    new: int,
    rng: np.random.Generator,
    trees: bool = False,
) -> Arm:
    vocab = engine.info.vocab_size
    names = [f"{name} {i}" for i in range(len(contexts))]
    for session, cached in zip(names, contexts, strict=True):
        engine.open(session)
        for start in range(0, cached, 512):
            size = min(512, cached - start)
            engine.step([StepInput(session, rng.integers(0, vocab, size).tolist(), needs_logits=False)])
    parents = [node // 2 - 1 for node in range(new - 1)] if trees else []
    inputs = [StepInput(s, rng.integers(0, vocab, new).tolist(), new - 1, True, parents) for s in names]

    def run() -> None:
        engine.step(inputs)
        for session, cached in zip(names, contexts, strict=True):
            engine.rollback(session, cached)

    return run


@torch.inference_mode()
def prefilled(loaded: LoadedModel, rows: int, cached: int, rng: np.random.Generator) -> Any:
    """transformers' own cache, filled with ``cached`` tokens."""
    from transformers import DynamicCache

    cache = DynamicCache(config=loaded.model.config)
    ids = torch.from_numpy(rng.integers(0, loaded.info.vocab_size, (rows, cached))).to(loaded.device)
    for chunk in ids.split(256, 1):
        loaded.model.model(chunk, past_key_values=cache, use_cache=True)
    return cache


def dense_arm(loaded: LoadedModel, items: int, cached: int, new: int, rng: np.random.Generator) -> Arm:
    cache = prefilled(loaded, items, cached, rng)
    ids = torch.from_numpy(rng.integers(0, loaded.info.vocab_size, (items, new))).to(loaded.device)

    @torch.inference_mode()
    def run() -> None:
        loaded.model(ids, past_key_values=cache, use_cache=True).logits.argmax(-1).cpu()
        cache.crop(-new)  # a view: costs microseconds

    return run


def loop_arm(loaded: LoadedModel, contexts: list[int], new: int, rng: np.random.Generator) -> Arm:
    singles = [dense_arm(loaded, 1, cached, new, rng) for cached in contexts]

    def run() -> None:
        for single in singles:
            single()

    return run


def interleave(arms: dict[str, Arm], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of every arm, taking turns in an order that changes."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    order = list(arms)
    shuffle = np.random.default_rng(1)
    for turn in range(repeats + 2):
        shuffle.shuffle(order)
        for name in order:
            if device.type == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            arms[name]()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn >= 2:
                times[name].append((time.perf_counter() - began) * 1e3)
    return times


@torch.inference_mode()
def cpu_rate(loaded: LoadedModel, rows: int) -> float:
    """Measured flops/s of the product of ``rows`` rows with the gate and up weights of a layer."""
    config = loaded.model.config
    weight = torch.randn(2 * config.intermediate_size, config.hidden_size, dtype=loaded.dtype)
    product, x = PackedLinear(weight, fewest=1), torch.randn(rows, config.hidden_size, dtype=loaded.dtype)
    taken = []
    for _ in range(100):
        began = time.perf_counter()
        product(x)
        taken.append(time.perf_counter() - began)
    return 2 * rows * weight.numel() / statistics.median(taken)


def device_rates(dtype: torch.dtype) -> tuple[float, float]:
    """Measured bytes/s of a large read and flops/s of a large product."""

    def best(work: Callable[[], object]) -> float:
        taken = []
        for _ in range(12):
            a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            a.record()
            work()
            b.record()
            torch.cuda.synchronize()
            taken.append(a.elapsed_time(b) / 1e3)
        return min(taken[2:])

    big = torch.ones(1 << 30, dtype=torch.float32, device="cuda")
    bandwidth = big.numel() * 4 / best(lambda: big.sum())
    n = 8192
    left = torch.randn(n, n, device="cuda").to(dtype)
    rate = 2 * n**3 / best(lambda: left @ left)
    return bandwidth, rate


def roofline_ms(loaded: LoadedModel, shape: BatchShape, bandwidth: float, rate: float) -> float:
    """The least a step can take: every weight and every cached key and value read once, or all the flops."""
    info, config = loaded.info, loaded.model.config
    embed = info.vocab_size * config.hidden_size
    tied = bool(getattr(config, "tie_word_embeddings", False))
    # Of the input embedding only the fed rows are read; the output head is read whole.
    weights = info.parameters - (0 if tied else embed)
    read = weights * loaded.dtype.itemsize
    read += (shape.cached_tokens + 2 * shape.new_tokens) * info.kv_bytes_per_token
    flops = 2 * weights * shape.new_tokens
    flops += 4 * config.num_attention_heads * info.head_dim * info.layers * shape.attention_pairs
    return max(read / bandwidth, flops / rate) * 1e3


def print_table(
    loaded: LoadedModel,
    args: argparse.Namespace,
    medians: dict[str, float],
    quiet: dict[str, float],
    roof: dict[str, float],
) -> None:
    i = loaded.info
    print(
        f"{i.id}, {i.parameters / 1e6:.1f} M parameters, {i.dtype}, {loaded.device}, "
        f"{torch.get_num_threads()} threads; {args.items} items x {args.new} new, "
        f"contexts {args.shortest}-{args.longest} (ragged) or {args.equal} (equal)\n"
    )
    print(f"{'arm':28} {'median ms':>10} {'quiet ms':>10} {'÷ engine':>9} {'÷ roofline':>11}")
    for name, value in medians.items():
        base = f"engine@{args.equal}" if "@" in name else "engine"
        over = f"{value / roof[name]:11.2f}" if name in roof else ""
        print(f"{name:28} {value:10.2f} {quiet[name]:10.2f} {value / medians[base]:9.2f} {over}")
    print()


def summary(
    loaded: LoadedModel,
    args: argparse.Namespace,
    medians: dict[str, float],
    quiet: dict[str, float],
    roof: dict[str, float],
) -> dict[str, object]:
    out: dict[str, object] = {
        "benchmark": "engine",
        "model": loaded.info.id,
        "dtype": loaded.info.dtype,
        "device": str(loaded.device),
        "threads": torch.get_num_threads(),
        "repeats": args.repeats,
        "trees_over_engine": round(medians["trees"] / medians["engine"], 3),
        "median_ms": {k: round(v, 3) for k, v in medians.items()},
        "quiet_ms": {k: round(v, 3) for k, v in quiet.items()},
    }
    if "loop" in medians:
        at = f"@{args.equal}"
        out["loop_over_engine"] = round(medians["loop"] / medians["engine"], 3)
        out["engine_over_dense"] = round(medians["engine"] / medians["dense"], 3)
        out[f"dense_over_engine{at}"] = round(medians["dense" + at] / medians["engine" + at], 3)
    if roof:
        out["step_over_roofline"] = {k: round(medians[k] / v, 3) for k, v in roof.items()}
    return out


if __name__ == "__main__":
    main()
