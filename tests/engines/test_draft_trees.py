"""Draft trees: every node as in a forward of its own, lossless, and a cache that stays true."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from wispprof.engines.loading import LoadedModel, random_model
from wispprof.engines.torch.cuda_graphs import StepGraphs
from wispprof.engines.torch.draft_tree import DraftTree
from wispprof.engines.torch.engine import TorchEngine
from wispprof.engines.torch.paged_kv import PagedKvStore
from wispprof.errors import EngineError, InputRefused
from wispprof.sampling.sampler import filtered_probs
from wispprof.token_tree import MAX_NODES
from wispprof.types import Sampling, StepInput

BACKENDS = ("dense", "paged", "graphs")
VOCAB = 96
MODELS = {
    name: random_model(name, seed=3, device="cpu") for name in ("tiny-llama", "tiny-qwen3", "tiny-mistral")
}
LLAMA = MODELS["tiny-llama"]


def make(loaded: LoadedModel, backend: str, **limits: int) -> TorchEngine:
    """``graphs`` is the paged backend padded to graph buckets, run uncaptured."""
    if backend == "dense":
        return TorchEngine(loaded, backend=backend, **limits)
    engine = TorchEngine(loaded, backend="paged", **limits)
    if backend == "graphs":
        store = engine._store
        assert isinstance(store, PagedKvStore)
        engine._graphs = StepGraphs(engine._decoder, store, torch.device("cpu"), capture=False)
    return engine


@torch.inference_mode()
def last_logits(loaded: LoadedModel, ids: list[int]) -> torch.Tensor:
    return loaded.model(torch.tensor([ids])).logits[0, -1]


def path_to(parents: Sequence[int], node: int) -> list[int]:
    path = []
    while node >= 0:
        path.append(node)
        node = parents[node]
    return path[::-1]


def random_parents(dice: random.Random, nodes: int) -> list[int]:
    return [dice.randrange(-1, node) for node in range(nodes)]


@pytest.mark.parametrize("family", MODELS)
@settings(max_examples=8)
@given(data=st.data())
def test_each_node_has_the_logits_of_a_forward_of_its_own(family: str, data: st.DataObject) -> None:
    """Trees, chains and prompt chunks in one step."""
    loaded = MODELS[family]
    engine = make(loaded, data.draw(st.sampled_from(BACKENDS)), kv_tokens=4000, max_sessions=8)
    dice = random.Random(data.draw(st.integers(0, 1 << 30)))
    kinds = data.draw(st.lists(st.sampled_from(["tree", "tree", "chain", "prompt"]), min_size=1, max_size=5))
    inputs, texts = [], []
    for number, kind in enumerate(kinds):
        name = str(number)
        engine.open(name)
        text = [dice.randrange(VOCAB) for _ in range(data.draw(st.integers(0, 90)))]
        if text:
            engine.step([StepInput(name, text, needs_logits=False)])
        fed = [dice.randrange(VOCAB) for _ in range(data.draw(st.integers(1, 20)))]
        nodes = 0 if kind == "prompt" else data.draw(st.integers(1, 12))
        drafts = [dice.randrange(VOCAB) for _ in range(nodes)]
        parents = random_parents(dice, nodes) if kind == "tree" else []
        inputs.append(StepInput(name, fed + drafts, nodes, kind != "prompt", parents))
        texts.append(text + fed)
    engine.step(inputs, keep_logits=True)
    for one, text, found in zip(inputs, texts, engine.last_logits, strict=True):
        drafts = list(one.tokens)[len(one.tokens) - one.drafts :]
        parents = one.parents or range(-1, one.drafts - 1)
        nodes = range(-1, one.drafts) if one.needs_logits else range(0)
        assert len(found) == len(nodes)
        for node in nodes:
            expected = last_logits(loaded, text + [drafts[i] for i in path_to(parents, node)])
            assert (found[node + 1] - expected).abs().max() < 1e-4
    engine.check_integrity()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tree_of_the_most_nodes(backend: str) -> None:
    engine = make(LLAMA, backend, kv_tokens=500, max_sessions=2)
    dice = random.Random(1)
    text = [dice.randrange(VOCAB) for _ in range(30)]
    drafts = [dice.randrange(VOCAB) for _ in range(MAX_NODES)]
    # A long path through even nodes, so that the last bit has many ancestors.
    parents = [max(-1, node - 2) for node in range(MAX_NODES)]
    engine.open("a")
    engine.step([StepInput("a", text + drafts, MAX_NODES, True, parents)], keep_logits=True)
    for node in (0, 1, 62, 63):
        expected = last_logits(LLAMA, text + [drafts[i] for i in path_to(parents, node)])
        assert (engine.last_logits[0][node + 1] - expected).abs().max() < 1e-4


def plain_text(engine: TorchEngine, prompt: list[int], sampling: Sampling, length: int) -> list[int]:
    engine.open("plain", sampling)
    text = list(engine.step([StepInput("plain", prompt)])[0].tokens)
    while len(text) < length:
        text += engine.step([StepInput("plain", text[-1:])])[0].tokens
    engine.close("plain")
    return text


def drafted_tree(
    dice: random.Random, future: Sequence[int], nodes: int, known: int
) -> tuple[list[int], list[int]]:
    """Tokens and parents of a random tree that holds the first ``known`` tokens of ``future`` as a path."""
    parents = random_parents(dice, nodes)
    tokens = [dice.randrange(VOCAB) for _ in range(nodes)]
    node = -1
    for token in future[:known]:
        children = [n for n in range(node + 1, nodes) if parents[n] == node]
        if not children:
            break
        node = dice.choice(children)
        tokens[node] = token
    return tokens, parents


class Company:
    """Sessions of known text that advance by trees, chains and lone tokens."""

    def __init__(self, engine: TorchEngine, seed: int, count: int = 6, length: int = 60) -> None:
        self.engine = engine
        self.dice = random.Random(seed)
        self.accepted = 0
        self.samplings = [
            Sampling(temperature=(0.0, 0.8, 1.0)[i % 3], top_p=1 - 0.1 * (i % 2), seed=i)
            for i in range(count)
        ]
        self.prompts = [[self.dice.randrange(VOCAB) for _ in range(3 + 5 * i)] for i in range(count)]
        self.truth = [
            plain_text(engine, p, s, length) for p, s in zip(self.prompts, self.samplings, strict=True)
        ]
        self.texts: list[list[int]] = [[] for _ in range(count)]
        self.rounds = 0

    def open(self, number: int) -> None:
        self.texts[number] = []
        self.engine.open(str(number), self.samplings[number])

    def next_input(self, number: int) -> StepInput:
        text, future = self.texts[number], self.truth[number][len(self.texts[number]) :]
        fed = text[-1:] or self.prompts[number]
        kind = self.dice.random()
        nodes = self.dice.randrange(1, 14)
        known = self.dice.randrange(0, 8)
        if kind < 0.2:
            return StepInput(str(number), fed)
        if kind < 0.4:
            drafts = [*future[:known], self.dice.randrange(VOCAB)]
            return StepInput(str(number), fed + drafts, len(drafts))
        tokens, parents = drafted_tree(self.dice, future, nodes, known)
        return StepInput(str(number), fed + tokens, nodes, True, parents)

    def step(self) -> None:
        members = self.dice.sample(range(len(self.texts)), self.dice.randrange(1, len(self.texts) + 1))
        for result in self.engine.step([self.next_input(number) for number in members]):
            number = int(result.session)
            text, truth = self.texts[number], self.truth[number]
            text += result.tokens
            self.rounds += 1
            self.accepted += result.accepted
            same = min(len(text), len(truth))
            assert text[:same] == truth[:same]
            assert self.engine.tokens(result.session) == self.prompts[number] + text[:-1]
            if len(text) >= len(truth) - 1:
                self.engine.close(result.session)
                self.open(number)


@pytest.mark.parametrize(("backend", "rounds"), [("dense", 1000), ("paged", 1000), ("graphs", 150)])
def test_random_rounds_leave_text_and_cache_true(backend: str, rounds: int) -> None:
    engine = make(LLAMA, backend, kv_tokens=1500, max_sessions=7)
    company = Company(engine, seed=5)
    for number in range(len(company.texts)):
        company.open(number)
    while company.rounds < rounds:
        company.step()
    assert company.accepted > rounds / 2
    assert max(engine.check_integrity().errors.values()) < 1e-4


@pytest.mark.parametrize("backend", ["dense", "paged"])
def test_accepted_nodes_left_in_their_places_are_noticed(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control of the one above."""
    engine = make(LLAMA, backend, kv_tokens=500)
    company = Company(engine, seed=2, count=1)
    company.open(0)
    engine.step([StepInput("0", company.prompts[0])])
    right = company.truth[0]
    tree = StepInput("0", [right[0], 1, right[1], right[2]], 3, True, [-1, -1, 1])
    if right[1] == 1:
        pytest.fail("the first node must be wrong")
    assert engine.step([tree])[0].accepted == 2
    engine.check_integrity()
    engine.rollback("0", len(company.prompts[0]))
    monkeypatch.setattr(engine._store, "move", lambda *_: None)
    assert engine.step([tree])[0].accepted == 2
    with pytest.raises(EngineError, match="fresh prefill"):
        engine.check_integrity()


@settings(max_examples=200)
@given(parents=st.integers(1, MAX_NODES).flatmap(
    lambda n: st.tuples(*(st.integers(-1, node - 1) for node in range(n)))
))  # fmt: skip
def test_ancestors_and_depths_are_those_of_the_path(parents: tuple[int, ...]) -> None:
    tree = DraftTree.of(parents)
    hidden = set(zip(*(side.tolist() for side in tree.hidden()), strict=True))
    for node in range(len(parents)):
        path = path_to(parents, node)
        assert tree.depths[node] == len(path)
        assert int(tree.ancestors[node]) % (1 << 64) == sum(1 << other for other in path)
        assert {j for j in range(node) if (node, j) in hidden} == set(range(node)) - set(path)


def test_of_equal_siblings_the_first_is_taken() -> None:
    tree = DraftTree.of([-1, -1, 0, 1])
    assert tree.accepted_path([5, 5, 6, 7], [5, 7, 7, 0, 0]) == [0]
    assert tree.accepted_path([5, 5, 6, 7], [5, 6, 7, 0, 0]) == [0, 2]
    assert tree.accepted_path([5, 4, 6, 7], [4, 6, 7, 0, 0]) == [1, 3]
    assert tree.accepted_path([5, 4, 6, 7], [3, 6, 7, 0, 0]) == []


@pytest.mark.parametrize(
    "at_fault",
    [
        StepInput("a", [1, 2, 3], 2, True, [-1]),
        StepInput("a", [1, 2, 3], 2, True, [-1, 1]),
        StepInput("a", [1, 2, 3], 2, True, [0, 0]),
        StepInput("a", [1, 2, 3], 2, True, [-2, 0]),
        StepInput("a", [1] * 66, 65, True, [-1] * 65),
        StepInput("a", [1, 2], 0, False, [-1, -1]),
    ],
)
def test_what_is_no_tree_is_refused_and_changes_nothing(at_fault: StepInput) -> None:
    engine = make(LLAMA, "dense", kv_tokens=500)
    engine.open("a")
    engine.open("b")
    with pytest.raises(InputRefused, match="parent"):
        engine.step([StepInput("b", [1]), at_fault])
    engine.audit({"a": 0, "b": 0})


def test_sampled_tokens_of_nodes_follow_the_target() -> None:
    """Chi-square over seeds: after the root, and after whichever of two siblings the target agrees with."""
    prompt, seeds = [3, 1, 4, 1, 5], 2048
    sampling = Sampling(temperature=0.7, top_k=12)
    engine = make(LLAMA, "dense", kv_tokens=8192, max_sessions=260)
    engine.open("prompt")
    engine.step([StepInput("prompt", prompt[:-1], needs_logits=False)])
    root = filtered_probs(last_logits(LLAMA, prompt)[None], sampling)[0].numpy()
    likely = np.argsort(-root)[:3].tolist()
    after = {t: filtered_probs(last_logits(LLAMA, [*prompt, t])[None], sampling)[0].numpy() for t in likely}
    firsts = np.zeros(VOCAB)
    seconds = {t: np.zeros(VOCAB) for t in likely}
    for start in range(0, seeds, 256):
        names = [f"{seed}" for seed in range(start, start + 256)]
        for name in names:
            engine.fork("prompt", name, len(prompt) - 1, Sampling(0.7, top_k=12, seed=int(name)))
        tree = [prompt[-1], likely[0], likely[1], likely[2]]
        for result in engine.step([StepInput(name, tree, 3, True, [-1, -1, -1]) for name in names]):
            firsts[result.tokens[0]] += 1
            if result.accepted:
                seconds[result.tokens[0]][result.tokens[1]] += 1
            engine.close(result.session)
    assert p_value(firsts, root) > 1e-4
    for token in likely:
        assert seconds[token].sum() == firsts[token]
        assert p_value(seconds[token], after[token]) > 1e-4
    # Negative control: the tokens after one sibling are not those after another.
    assert p_value(seconds[likely[0]], after[likely[1]]) < 1e-6


def p_value(counts: np.ndarray, p: np.ndarray) -> float:
    """Chi-square test of counts against probabilities, rare tokens pooled; 0 for a token that cannot be."""
    if counts[p == 0].any():
        return 0.0
    expected = p * counts.sum()
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    used = wanted > 1e-9
    return float(stats.chisquare(observed[used], wanted[used] * (counts.sum() / wanted[used].sum())).pvalue)
