"""Which kind of draft is accepted how often, by category: a model, n-gram lookup, or lookup before the model.

    python benchmarks/draft_kinds.py --model TARGET --draft DRAFT --prompts chats.jsonl

The prompts are JSON lines with `category` beside `prompt` or `messages`. The target answers each once. Then
rounds of `--k` drafts are played along the answers with the drafters that an edge uses. Nothing is timed, so
the figures do not depend on the machine. Lookup remembers the answers before, in the order of the file, as an
edge does (`--memory 0`: it searches the request's own text alone). Rounds at the end of an answer count with
the drafts that still fit.

`both` should accept as many drafts as the better of the two in every category, within the noise: the interval
of their difference over the category's prompts (paired, 95 %) must reach zero. The last line is JSON;
the exit code is 1 if a category misses that.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from wispprof.backends import Drafter
from wispprof.drafters import is_llama, load_llama, make_drafter
from wispprof.drafters.ngram import LookupMemory
from wispprof.engines.loading import load_model
from wispprof.profiling.acceptance_trace import target_paths
from wispprof.profiling.prompts import load_prompts
from wispprof.settings.draft_settings import LlamaSettings
from wispprof.settings.profiler_settings import TraceSettings
from wispprof.types import Sampling

KINDS = ("model", "lookup", "both")
_RESAMPLES = 4000
_BATCH = 16


@dataclass(frozen=True)
class Answer:
    """One prompt's tokens and what the target answers."""

    category: str
    prompt: list[int]
    path: list[int]


def rounds(drafter: Drafter, answer: Answer, k: int, sampling: Sampling) -> tuple[int, int]:
    """(drafts accepted, rounds) of one answer."""
    drafter.open(answer.prompt, sampling)
    drafter.extend(answer.path[:1])
    place, accepted, count = 1, 0, 0
    while place < len(answer.path):
        held, drafts = drafter.length, []
        most = min(k, len(answer.path) - place - 1)
        while len(drafts) < most and drafter.can_draft:
            drafts.append(drafter.draft().token)
        right = 0
        while right < len(drafts) and drafts[right] == answer.path[place + right]:
            right += 1
        drafter.rollback(held + right)
        drafter.extend([answer.path[place + right]])
        accepted, count, place = accepted + right, count + 1, place + right + 1
    return accepted, count


def answers(target: Any, args: argparse.Namespace, sampling: Sampling) -> list[Answer]:
    """The target's answers in the order of the file."""
    found: list[tuple[str, list[int]]] = []
    for line in args.prompts.read_text("utf-8").splitlines():
        if not line.strip():
            continue
        category = str(json.loads(line).get("category", "all"))
        one = args.scratch / "one.jsonl"
        one.write_text(line)
        found.append((category, load_prompts(one, target.tokenizer, 1, args.prompt_tokens)[0]))
    settings = TraceSettings(path_tokens=args.path_tokens, sampling=sampling)
    paths: list[list[int]] = []
    for start in range(0, len(found), _BATCH):
        paths += target_paths(target, [prompt for _, prompt in found[start : start + _BATCH]], settings)
        print(f"{len(paths)} of {len(found)} answers", file=sys.stderr)
    return [Answer(name, prompt, path) for (name, prompt), path in zip(found, paths, strict=True)]


def means(counts: Sequence[tuple[int, int]], picks: np.ndarray) -> np.ndarray:
    """Accepted per round of every resample (n,)."""
    sums = np.array(counts, dtype=float)[picks].sum(1)
    return np.asarray(sums[:, 0] / np.maximum(1.0, sums[:, 1]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--draft", required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--path-tokens", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--memory", type=int, default=1 << 16)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        args.scratch = Path(scratch)
        return run(args)


def run(args: argparse.Namespace) -> int:
    sampling = Sampling(args.temperature, seed=7)
    target = load_model(args.model, device="cpu")
    if is_llama(args.draft):
        loaded: Any = load_llama(args.draft, LlamaSettings(threads=args.threads), "cpu", target.tokenizer)
    else:
        loaded = load_model(args.draft, device="cpu")
    known = answers(target, args, sampling)
    counts: dict[str, dict[str, list[tuple[int, int]]]] = {}
    for kind in KINDS:
        memory = LookupMemory(args.memory)
        drafter = make_drafter(kind, loaded, memory)
        by_category: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for number, answer in enumerate(known):
            by_category[answer.category].append(rounds(drafter, answer, args.k, sampling))
            memory.remember([*answer.prompt, *answer.path])
            print(f"{kind}: {number + 1} of {len(known)}", file=sys.stderr)
        counts[kind] = by_category
    generator, missed, figures = np.random.default_rng(0), [], {}
    print(f"{'category':16} {'prompts':>7} " + " ".join(f"{kind:>7}" for kind in KINDS) + "   both - better")
    categories = list(counts["both"])
    for category in [*categories, "all"]:
        mine = {
            kind: counts[kind][category]
            if category != "all"
            else [pair for name in categories for pair in counts[kind][name]]
            for kind in KINDS
        }
        picks = generator.integers(0, len(mine["both"]), (_RESAMPLES, len(mine["both"])))
        whole = np.arange(len(mine["both"]))[None]
        figure = {kind: float(means(mine[kind], whole)[0]) for kind in KINDS}
        better = max(("model", "lookup"), key=figure.__getitem__)
        low, high = np.quantile(means(mine["both"], picks) - means(mine[better], picks), (0.025, 0.975))
        shown = " ".join(f"{figure[kind]:7.2f}" for kind in KINDS)
        print(
            f"{category:16} {len(mine['both']):7} {shown}   "
            f"{figure['both'] - figure[better]:+.2f} ({low:+.2f} … {high:+.2f})"
        )
        figures[category] = {**figure, "low": float(low), "high": float(high)}
        if high < 0:
            missed.append(category)
    print(json.dumps({"benchmark": "draft_kinds", "k": args.k, "accepted": figures, "missed": missed}))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
