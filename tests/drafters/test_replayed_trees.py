"""Draft trees replayed from traces: the target's token at its rank, the rest invented but always the same."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from fake_pair import hash_trace

from wispprof.artifacts.rows import AcceptanceTrace
from wispprof.drafters.replay import ReplayDrafter, ReplayTreeDrafter, replay_drafter
from wispprof.errors import ProfileError
from wispprof.token_tree import ROOT, TokenTree
from wispprof.types import Sampling

WIDTH = 6
CHAINS = hash_trace(paths=3, length=30, depth=6)


@pytest.fixture(scope="module")
def trace() -> AcceptanceTrace:
    """With ranks and probabilities; a draft that is right stands first."""
    rng = np.random.default_rng(0)
    paths = []
    for path in CHAINS.paths:
        ranks = np.where(path.drafts[:, 0] == path.path, 0, rng.integers(1, WIDTH + 1, len(path.path)))
        probs = rng.dirichlet(np.ones(WIDTH + 1), len(path.path))[:, :WIDTH]
        paths.append(dataclasses.replace(path, target_ranks=ranks, candidate_probs=probs))
    return dataclasses.replace(CHAINS, paths=tuple(paths))


def test_the_target_stands_at_its_recorded_rank(trace: AcceptanceTrace) -> None:
    drafter, chain = ReplayTreeDrafter(trace), ReplayDrafter(trace)
    ranks_seen = set()
    for path in trace.paths:
        drafter.open(path.prompt, Sampling())
        tree, node = TokenTree(), ROOT
        for position in range(20):
            (found,) = drafter.expand(tree, [node], WIDTH)
            tokens = [candidate.token for candidate in found.candidates]
            assert len(set(tokens)) == len(tokens) == WIDTH
            assert [c.prob for c in found.candidates] == path.candidate_probs[position].tolist()
            rank = int(path.target_ranks[position])
            ranks_seen.add(rank)
            assert [r for r, token in enumerate(tokens) if token == path.path[position]] == (
                [rank] if rank < WIDTH else []
            )
            chain.open([*path.prompt, *path.path[:position]], Sampling())
            assert (tokens[0], found.features) == chain.draft()
            # After a wrong token: what the draft model went on with, and always the same candidates.
            wrong = tree.add(node, tokens[rank == 0], 0.5)
            again = drafter.expand(tree, [wrong, wrong], 4)
            assert again[0] == again[1]
            if rank:
                assert again[0].candidates[0].token == chain.draft().token
            node = tree.add(node, path.path[position], 0.5)
    assert {0, WIDTH} < ranks_seen


def test_a_tree_hangs_at_the_tokens_held(trace: AcceptanceTrace) -> None:
    drafter, path = ReplayTreeDrafter(trace), trace.paths[0]
    drafter.open(path.prompt, Sampling())
    drafter.extend(path.path[:7])
    (found,) = drafter.expand(TokenTree(), [ROOT], 2)
    assert [c.prob for c in found.candidates] == path.candidate_probs[7, :2].tolist()
    drafter.extend(path.path[7:])
    assert drafter.expand(TokenTree(), [ROOT], WIDTH)[0].candidates == []


def test_trees_need_the_candidates_of_a_trace(trace: AcceptanceTrace) -> None:
    assert isinstance(replay_drafter(trace), ReplayTreeDrafter)
    assert not isinstance(replay_drafter(CHAINS), ReplayTreeDrafter)
    with pytest.raises(ProfileError, match="candidates"):
        ReplayTreeDrafter(CHAINS)
