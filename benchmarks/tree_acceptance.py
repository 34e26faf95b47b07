"""Accepted tokens of draft trees: siblings ranked by probability, and by the noise of their position.

    python benchmarks/tree_acceptance.py             # the bundled pair
    python benchmarks/tree_acceptance.py --target FOLDER --draft FOLDER
    python benchmarks/tree_acceptance.py --target FOLDER --without-layers 8 20

Chain, probability-ranked tree and noise-ranked tree have equal rows. A node's children are the draft's first
candidates at its position. They are ranked by probability, as in SpecExec, or by logits / T plus the
position's noise, as the target chooses. Without a temperature the two are one. The chain takes the first by
noise.

A tree's shape is the best one under rates by rank that do not depend on the position (Sequoia, arXiv
2402.12374). Rates come from half of the prompts, the table from the other half. Only nodes on the target's
own path are accepted, and the draft's candidates along that path are known, so any tree can be replayed. The
rounds of some prompts are also run on the engine, with whole trees, and must accept the same tokens. A draft
forward computes one level of a tree.

`grown` is what an edge does: a torch drafter expands the likeliest nodes, and a predictor fitted on the first
half of the prompts rates their candidates. Each round sends the likeliest nodes. A forward expands as many as
are worth it, or at most a quarter of the rows (`grown/4`).

`--without-layers FIRST END` makes a draft of the target by leaving those layers out. Prints a table and one
JSON line.
"""

from __future__ import annotations

import argparse
import heapq
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from wispprof.artifacts import bundled_model
from wispprof.drafters.torch_drafter import TorchDrafter
from wispprof.engines.loading import LoadedModel, load_model
from wispprof.engines.torch.engine import TorchEngine
from wispprof.fitting import FittedPredictor, fit_predictor
from wispprof.policies.interface import TreeShape
from wispprof.profiling.acceptance_trace import collect_trace
from wispprof.profiling.prompts import held_out_prompts
from wispprof.sampling.candidates import noise_ranked, ranks_of
from wispprof.sessions.tree_growth import add_candidates, next_nodes, round_nodes
from wispprof.settings.profiler_settings import TraceSettings
from wispprof.token_tree import HELD_NODES, TokenTree
from wispprof.types import Sampling, StepInput

WIDTH = 16
"""Candidates of a position that a tree may hold."""


class TargetPath(NamedTuple):
    """A prompt and the target's own tokens after it. ``candidates`` (m, WIDTH): the draft's, by rank."""

    prompt: list[int]
    tokens: list[int]
    candidates: dict[str, np.ndarray]

    def ranks(self, ranking: str) -> np.ndarray:
        """(m,): rank of the target's token among the draft's candidates, WIDTH if it is not among them."""
        return ranks_of(self.tokens, self.candidates[ranking])


class Shape(NamedTuple):
    """A tree: each node's parent, and its rank among the candidates of its position."""

    parents: list[int]
    ranks: list[int]

    @property
    def depth(self) -> int:
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 + (depths[parent] if parent >= 0 else 0))
        return max(depths)

    def accepted(self, truth: Sequence[int]) -> list[int]:
        """The path of nodes whose ranks are ``truth``."""
        children = {step: node for node, step in enumerate(zip(self.parents, self.ranks, strict=True))}
        path: list[int] = []
        node = -1
        for rank in truth:
            if (node := children.get((node, rank), -2)) == -2:
                break
            path.append(node)
        return path


def best_shape(rates: np.ndarray, rows: int) -> Shape:
    """The tree of ``rows`` nodes with the most accepted tokens if the target takes rank r at rate r."""
    shape = Shape([], [])
    open_nodes = [(-rates[0], -1, 0)]
    while len(shape.parents) < rows:
        negative, parent, rank = heapq.heappop(open_nodes)
        node = len(shape.parents)
        shape.parents.append(parent)
        shape.ranks.append(rank)
        heapq.heappush(open_nodes, (negative * rates[0], node, 0))
        if rank + 1 < WIDTH and rates[rank] > 0:
            heapq.heappush(open_nodes, (negative / rates[rank] * rates[rank + 1], parent, rank + 1))
    return shape


def chain(rows: int) -> Shape:
    return Shape(list(range(-1, rows - 1)), [0] * rows)


def rates_by_rank(paths: Sequence[TargetPath], ranking: str) -> np.ndarray:
    ranks = np.concatenate([path.ranks(ranking) for path in paths])
    return np.bincount(ranks, minlength=WIDTH + 1)[:WIDTH] / len(ranks)


def replay(paths: Sequence[TargetPath], ranking: str, shape: Shape) -> float:
    """Accepted tokens a round. A round of ``a`` accepted tokens moves on by ``a + 1``."""
    rounds = accepted = 0
    for path in paths:
        ranks, at = path.ranks(ranking).tolist(), 0
        while at < len(ranks):
            taken = len(shape.accepted(ranks[at:]))
            rounds, accepted, at = rounds + 1, accepted + taken, at + taken + 1
    return accepted / rounds


def grown(
    drafter: TorchDrafter,
    paths: dict[int, TargetPath],
    temperature: float,
    predictor: FittedPredictor,
    rows: int,
    beams: int,
) -> tuple[float, float]:
    """(accepted tokens, draft forwards) a round of trees that a drafter grows. ``paths``: by their seed."""
    shape = TreeShape(nodes=rows, depth=WIDTH, width=8, beams=beams)
    rounds = accepted = forwards = 0
    for seed, path in paths.items():
        drafter.open(path.prompt, Sampling(temperature, seed=seed))
        at = 0
        while at < len(path.tokens):
            tree, expanded = TokenTree(HELD_NODES), set[int]()
            while nodes := next_nodes(tree, expanded, shape):
                found = []
                for node, after in zip(nodes, drafter.expand(tree, nodes, shape.width), strict=True):
                    probs = [candidate.prob for candidate in after.candidates]
                    depth = tree.depths[node] if node >= 0 else 0
                    rated = predictor.candidate_acceptance(after.features, probs, depth).tolist()
                    found.append((node, [candidate.token for candidate in after.candidates], rated))
                expanded.update(nodes)
                add_candidates(tree, found, shape)
                forwards += 1
            sent = set(round_nodes(tree, shape))
            taken = sum(node in sent for node in tree.walk(path.tokens[at:]))
            drafter.extend(path.tokens[at : at + taken + 1])
            rounds, accepted, at = rounds + 1, accepted + taken, at + taken + 1
    return accepted / rounds, forwards / rounds


def without_layers(loaded: LoadedModel, first: int, end: int) -> LoadedModel:
    """The model without some of its layers. Changes ``loaded``."""
    decoder = loaded.model.model
    kept = [layer for number, layer in enumerate(decoder.layers) if not first <= number < end]
    for number, layer in enumerate(kept):
        layer.self_attn.layer_idx = number
    decoder.layers = torch.nn.ModuleList(kept)
    loaded.model.config.num_hidden_layers = len(kept)
    info = replace(loaded.info, id=f"{loaded.info.id} without layers {first}-{end - 1}", layers=len(kept))
    return replace(loaded, info=info)


def check_on_engine(
    engine: TorchEngine, path: TargetPath, sampling: Sampling, ranking: str, shape: Shape
) -> int:
    """Run a path's rounds with real trees; returns how many rounds differ from the replay."""
    ranks, candidates = path.ranks(ranking).tolist(), path.candidates[ranking]
    engine.open("check", sampling)
    text = list(engine.step([StepInput("check", path.prompt)])[0].tokens)
    wrong = int(text != path.tokens[:1])
    at = 1
    while at < len(ranks) - len(shape.parents):
        on_path = {-1: 0}
        tokens = []
        for node, (parent, rank) in enumerate(zip(shape.parents, shape.ranks, strict=True)):
            depth = on_path.get(parent)
            # Nodes off the path are never accepted, whatever the draft would put there.
            tokens.append(int(candidates[at + (depth or 0), rank]))
            if depth is not None and rank == ranks[at + depth]:
                on_path[node] = depth + 1
        fed = [path.tokens[at - 1], *tokens]
        result = engine.step([StepInput("check", fed, len(tokens), True, shape.parents)])[0]
        taken = len(shape.accepted(ranks[at:]))
        wrong += result.tokens != tuple(path.tokens[at : at + taken + 1])
        at += taken + 1
    engine.check_integrity("check")
    engine.close("check")
    return wrong


@torch.inference_mode()
def trace(
    target: TorchEngine, draft: LoadedModel, prompts: list[list[int]], size: int, temperature: float
) -> list[TargetPath]:
    paths = []
    names = [str(number) for number in range(len(prompts))]
    for number, name in enumerate(names):
        target.open(name, Sampling(temperature, seed=number))
    texts = {}
    for name, prompt in zip(names, prompts, strict=True):
        texts[name] = list(target.step([StepInput(name, prompt)])[0].tokens)
    for _ in range(size - 1):
        for result in target.step([StepInput(name, texts[name][-1:]) for name in names]):
            texts[result.session] += result.tokens
    for number, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
        target.close(name)
        text = prompt + texts[name]
        logits = draft.model(torch.tensor([text[:-1]])).logits[0, len(prompt) - 1 :].float()
        sampling = Sampling(temperature, seed=number)
        noised, _ = noise_ranked(logits, np.arange(len(prompt), len(text)), sampling, WIDTH)
        likeliest = logits.topk(WIDTH).indices
        candidates = {"probability": likeliest.numpy(), "noise": noised.numpy()}
        paths.append(TargetPath(prompt, texts[name], candidates))
    return paths


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default=bundled_model("target"))
    parser.add_argument("--draft", default=bundled_model("draft"))
    parser.add_argument("--without-layers", type=int, nargs=2, metavar=("FIRST", "END"))
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--checked", type=int, default=3, help="prompts whose rounds the engine repeats")
    parser.add_argument("--grown", type=int, default=30, help="prompts whose trees are grown; 0: none")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rows", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.8, 1.0])
    args = parser.parse_args()
    target = load_model(args.target, dtype="float32", device="cpu")
    cut = args.without_layers
    draft = load_model(args.target if cut else args.draft, dtype="float32", device="cpu")
    if cut:
        draft = without_layers(draft, *cut)
    prompts = held_out_prompts(target.tokenizer, args.prompts, 48)
    engine = TorchEngine(target, kv_tokens=args.prompts * (48 + 2 * args.tokens), max_sessions=args.prompts)
    drafter = TorchDrafter(draft)
    rows_out, wrong = [], 0
    print(f"{target.info.id} and {draft.info.id}: accepted tokens a round (and a draft forward)\n")
    names = ("chain", "by probability", "by noise", "grown/4", "grown")
    print(f"{'T':>4} {'rows':>4}{''.join(f'{name:>16}' for name in names)}   forwards")
    for temperature in args.temperatures:
        paths = trace(engine, draft, prompts, args.tokens, temperature)
        half = len(paths) // 2
        learnt = None
        if args.grown:
            settings = TraceSettings(
                path_tokens=args.tokens, sampling=Sampling(temperature, seed=args.prompts)
            )
            learnt = fit_predictor(collect_trace(target, draft, settings, prompts=prompts[:half]))
            print(f"     candidates of held-out prompts: {learnt.report.get('candidates')}")
        for rows in args.rows:
            arms = {"chain": ("noise", chain(rows))}
            for ranking in ("probability", "noise"):
                arms[ranking] = (ranking, best_shape(rates_by_rank(paths[:half], ranking), rows))
            found = {name: replay(paths[half:], *arm) for name, arm in arms.items()}
            forwards: dict[str, float] = {name: shape.depth for name, (_, shape) in arms.items()}
            if learnt is not None:
                tested = dict(enumerate(paths[half : half + args.grown], half))
                for name, beams in (("grown/4", max(1, rows // 4)), ("grown", rows)):
                    found[name], forwards[name] = grown(drafter, tested, temperature, learnt, rows, beams)
            for number in range(half, half + args.checked):
                sampling = Sampling(temperature, seed=number)
                wrong += check_on_engine(engine, paths[number], sampling, *arms["noise"])
            cells = "".join(f"{found[n]:9.2f} ({found[n] / forwards[n]:4.2f})" for n in found)
            print(f"{temperature:4.1f} {rows:4d} {cells}   {' '.join(f'{f:.3g}' for f in forwards.values())}")
            row = {"temperature": temperature, "rows": rows, "accepted": found, "forwards": forwards}
            rows_out.append(row)
    print(f"\nRounds on the engine that differ from the replay: {wrong}")
    print(json.dumps({"benchmark": "tree_acceptance", "wrong": wrong, "rows": rows_out}))
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
