"""Draft trees on PyTorch: every node equals a sequence of its own, whatever was expanded, kept or cut."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from wispprof.backends import Continuations
from wispprof.drafters.torch_drafter import TorchDrafter
from wispprof.engines.loading import LoadedModel, random_model
from wispprof.errors import EngineError
from wispprof.token_tree import HELD_NODES, ROOT, TokenTree
from wispprof.types import Sampling

VOCABULARY = 96
SAMPLINGS = [Sampling(), Sampling(1.0, seed=3), Sampling(0.8, top_p=0.9, seed=5), Sampling(1.3, top_k=9)]


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return random_model("tiny-qwen3", seed=4, device="cpu")


@pytest.fixture(scope="module")
def plain(loaded: LoadedModel) -> TorchDrafter:
    """Holds one sequence at a time and never a tree."""
    return TorchDrafter(loaded)


def spelled(tree: TokenTree, node: int) -> list[int]:
    return [] if node == ROOT else tree.spelled(node)


def log_probs(found: Continuations) -> np.ndarray:
    """By token id; every token must be a candidate."""
    row = np.empty(VOCABULARY)
    row[[candidate.token for candidate in found.candidates]] = [c.prob for c in found.candidates]
    return np.log(row)


def check_node(
    plain: TorchDrafter, sequence: list[int], path: list[int], found: Continuations, sampling: Sampling
) -> None:
    """What was found after ``path`` is what a drafter finds that holds sequence and path alone."""
    plain.open([*sequence, *path], sampling)
    logits = plain.forward()
    token, features = plain.draft()
    assert found.candidates[0].token == token
    np.testing.assert_allclose(found.features, features, rtol=1e-3, atol=1e-4)
    if len(found.candidates) == VOCABULARY and sampling.temperature in (0.0, 1.0) and not sampling.top_k:
        expected = logits.log_softmax(-1).numpy()
        assert np.abs(log_probs(found) - expected).max() < 1e-4


def check_kv(plain: TorchDrafter, drafter: TorchDrafter) -> None:
    """The KV of the sequence and of every expanded node is that of a sequence of its own."""
    kv, length = drafter.cached_kv(), drafter.length
    expanded = drafter._expanded
    for node in range(ROOT, len(expanded)):
        path = spelled(expanded, node)
        plain.open([*drafter.tokens, *path, 0], Sampling())
        plain.prefill()
        rows = [*range(length), *(length + place for place in (expanded.path(node) if path else []))]
        rows = [row for row in rows if row < kv.shape[3]]
        assert rows or not drafter._cached
        assert not rows or (kv[:, :, :, rows] - plain.cached_kv()[:, :, :, : len(rows)]).abs().max() < 1e-4


def grow(
    rng: random.Random, drafter: TorchDrafter, tree: TokenTree, expanded: set[int], width: int = 4
) -> dict[int, Continuations]:
    """Expand some nodes whose parents are expanded; one or two candidates of each become nodes."""
    ready = [n for n in range(len(tree)) if n not in expanded and tree.parents[n] in {ROOT, *expanded}]
    nodes = rng.sample(ready, min(len(ready), rng.randrange(1, 5)))
    if not nodes or rng.random() < 0.3:
        nodes.insert(rng.randrange(len(nodes) + 1), ROOT)
    found = dict(zip(nodes, drafter.expand(tree, nodes, width), strict=True))
    expanded |= {node for node in nodes if node != ROOT}
    for node, after in found.items():
        for candidate in rng.sample(after.candidates[:4], rng.randrange(1, 4)):
            tree.add(node, candidate.token, 0.5)
    return found


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_every_node_equals_a_sequence_of_its_own(
    loaded: LoadedModel, plain: TorchDrafter, sampling: Sampling
) -> None:
    rng = random.Random(1)
    drafter = TorchDrafter(loaded)
    for _ in range(4):
        text = [rng.randrange(VOCABULARY) for _ in range(rng.randrange(1, 30))]
        drafter.open(text, sampling)
        if rng.random() < 0.5:
            drafter.prefill()
        tree, expanded = TokenTree(), set[int]()
        for _ in range(6):
            for node, found in grow(rng, drafter, tree, expanded, VOCABULARY).items():
                check_node(plain, text, spelled(tree, node), found, sampling)
        assert drafter.tokens == text
        check_kv(plain, drafter)


def test_commits_keep_the_kv_of_what_they_spell(loaded: LoadedModel, plain: TorchDrafter) -> None:
    rng = random.Random(2)
    sampling = Sampling(1.0, seed=8)
    drafter = TorchDrafter(loaded)
    drafter.open([5, 6, 7], sampling)
    tree, expanded = TokenTree(), set[int]()
    for _ in range(60):
        for _ in range(rng.randrange(3)):
            for node, found in grow(rng, drafter, tree, expanded).items():
                check_node(plain, drafter.tokens, spelled(tree, node), found, sampling)
        if drafter.length > 180:
            drafter.open([9, 9], sampling)
            tree, expanded = TokenTree(), set()
        kind = rng.choice(["path", "path", "part", "other", "rollback", "draft"])
        if kind == "rollback":
            drafter.rollback(rng.randrange(max(1, drafter.length - 5), drafter.length + 1))
        elif kind == "draft":
            drafter.draft()
        elif len(tree):
            node = rng.randrange(len(tree))
            tokens = tree.spelled(node) if kind != "other" else [rng.randrange(VOCABULARY)]
            drafter.extend([*tokens, 3] if kind == "part" else tokens)
            if kind == "path" and node in expanded:
                tree, old = tree.below(node), tree
                kept = (old.walk([*tokens, *tree.spelled(one)])[-1] for one in range(len(tree)))
                expanded = {number for number, one in enumerate(kept) if one in expanded}
                check_kv(plain, drafter)
                continue
        tree, expanded = TokenTree(), set()
        check_kv(plain, drafter)
    # Negative control: a row that is off is found.
    drafter._values[-1][0, :, 0] += 0.1
    with pytest.raises(AssertionError):
        check_kv(plain, drafter)


def test_kept_kv_is_moved_and_never_computed_again(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter = TorchDrafter(loaded)
    drafter.open([1, 2, 3], Sampling(1.0, seed=1))
    fed: list[int] = []
    forward = drafter._decoder.forward

    def counted(ids: torch.Tensor, positions: torch.Tensor, attend: object) -> torch.Tensor:
        fed.append(len(ids))
        return forward(ids, positions, attend)  # type: ignore[arg-type]

    monkeypatch.setattr(drafter._decoder, "forward", counted)
    tree = TokenTree()
    drafter.expand(tree, [ROOT], 3)
    for token in (10, 20, 30):
        tree.add(ROOT, token, 0.5)
    drafter.expand(tree, [0, 1, 2], 3)
    below = tree.add(1, 40, 0.5)
    assert below == 3
    after = tree.add(below, 50, 0.5)
    drafter.expand(tree, [3], 3)
    drafter.expand(tree, [4], 3)
    assert fed == [3, 3, 1, 1]
    before = drafter.cached_kv()
    drafter.extend([20, 40])
    kv = drafter.cached_kv()
    assert kv.shape[3] == 3 + 2 + 1
    # Rows 3 … 7 were the nodes 0 … 4: 20 and 40 are the nodes 1 and 3, and 50 is the node 4.
    assert torch.equal(kv, before[:, :, :, [0, 1, 2, 4, 6, 7]])
    kept = tree.below(below)
    assert kept.tokens == [50]
    new = kept.add(0, 60, 0.5)
    assert new is not None
    drafter.expand(kept, [new], 3)
    assert fed[4:] == [1]
    assert after == 4


def test_a_whole_tree_that_outgrows_the_rows_of_the_cache(loaded: LoadedModel, plain: TorchDrafter) -> None:
    text = np.random.default_rng(0).integers(0, VOCABULARY, 250).tolist()
    drafter = TorchDrafter(loaded)
    drafter.open(text, Sampling())
    tree = TokenTree(HELD_NODES)
    for number in range(HELD_NODES):
        tree.add(number // 64 - 1, number % 64, 0.5)
    assert tree.full
    found = drafter.expand(tree, range(HELD_NODES), VOCABULARY)
    for node in (0, 40, 63, 255):
        check_node(plain, text, tree.spelled(node), found[node], Sampling())
    # Another tree at the same place: the nodes of the first that it lacks give way.
    other = TokenTree()
    other.add(ROOT, 63, 0.5)
    other.add(0, 1, 0.5)
    check_node(plain, text, [63, 1], drafter.expand(other, [1], VOCABULARY)[0], Sampling())
    assert len(drafter._expanded) == 2
    check_kv(plain, drafter)


def test_what_a_tree_may_not_ask_for(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = TorchDrafter(loaded, max_context=8)
    drafter.open([1] * 5, Sampling())
    tree = TokenTree()
    drafter.expand(tree, [ROOT], 2)
    for depth in range(3):
        tree.add(depth - 1, 4 + depth, 0.5)
    with pytest.raises(ValueError, match="parent"):
        drafter.expand(tree, [1], 2)
    drafter.expand(tree, [0, 1], 2)
    with pytest.raises(EngineError, match="context"):
        drafter.expand(tree, [2], 2)
    assert len(drafter._expanded) == 2
    logits = drafter._decoder.logits
    for bad in (torch.nan, torch.inf):
        monkeypatch.setattr(drafter._decoder, "logits", lambda hidden, bad=bad: logits(hidden) * bad)
        with pytest.raises(EngineError, match="finite"):
            drafter.expand(tree, [0], 2)
        monkeypatch.undo()
        assert drafter._cached == len(drafter._expanded) == 0
        drafter.expand(tree, [0], 2)
