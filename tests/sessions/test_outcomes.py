"""Drafting ahead for outcomes: what was prepared is what would have been drafted."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from wispprof.policies.interface import TreeShape
from wispprof.sessions.edge_tree import EdgeTree, RatedCandidates
from wispprof.sessions.tree_growth import round_nodes
from wispprof.settings.edge_settings import BEST_GUESS, LIKELIEST, WAIT, OutcomeDrafting
from wispprof.token_tree import ROOT

PROBS = (0.6, 0.2, 0.1)
SHAPE = TreeShape(6, 3, 3, 2)

Found = list[tuple[int, RatedCandidates]]


def candidates(edge: EdgeTree, text: list[int], nodes: list[int]) -> Found:
    """The draft's candidates depend on the whole text before them."""
    found = []
    for node in nodes:
        before = [*text, *([] if node == ROOT else edge.tree.spelled(node))]
        found.append(
            (node, RatedCandidates([sum(before) % 7 + len(before) * 10 + r for r in range(3)], PROBS))
        )
    return found


def draft_round(edge: EdgeTree, text: list[int], shape: TreeShape = SHAPE) -> int:
    forwards = 0
    edge.refill(shape)
    while nodes := edge.next_nodes(shape):
        edge.grow(candidates(edge, text, nodes), shape)
        forwards += 1
    return forwards


def send(edge: EdgeTree, shape: TreeShape = SHAPE) -> list[int]:
    nodes = round_nodes(edge.tree, shape)
    edge.send(nodes)
    return nodes


def draft_ahead(edge: EdgeTree, text: list[int], ahead: OutcomeDrafting, forwards: int) -> int:
    nodes_in_all = 0
    for _ in range(forwards):
        nodes = edge.next_outcomes(ahead, 4)
        nodes_in_all += len(nodes)
        edge.grow_ahead(candidates(edge, text, nodes), ahead)
    return nodes_in_all


def spelled(edge: EdgeTree) -> set[tuple[int, ...]]:
    return {tuple(edge.tree.spelled(node)) for node in send(edge)}


@given(st.lists(st.lists(st.integers(0, 3), min_size=5, max_size=5), max_size=6), st.integers(0, 6))
@example([[0] * 5] * 2, 5)  # drafted ahead beyond the depth of a round
def test_a_prepared_round_is_the_round_that_would_have_been_drafted(
    ranks: list[list[int]], ahead: int
) -> None:
    """The target takes the candidates of these ranks, 3: none of them."""
    edge, text = EdgeTree(), [1]
    for taken in ranks:
        draft_round(edge, text)
        fresh = EdgeTree()
        draft_round(fresh, text)
        assert spelled(edge) == spelled(fresh)
        draft_ahead(edge, text, LIKELIEST, ahead)
        commit, node = list[int](), ROOT
        for rank in taken:
            after = candidates(edge, [*text, *commit], [ROOT])[0][1].tokens
            commit.append(after[rank] if rank < 3 else 5)
            node = edge.tree.child(node, commit[-1]) if node is not None else None  # type: ignore[assignment]
            if node not in edge.sent:
                break
        decided = edge.commit(commit)
        text += commit
        assert decided.hits == len(commit) or ROOT not in edge.known


def test_the_likeliest_outcomes_are_prepared_first() -> None:
    edge = EdgeTree()
    draft_round(edge, [1])
    sent = set(send(edge))
    nodes = edge.next_outcomes(LIKELIEST, 4)
    outcomes = [
        (1.0 if n == ROOT else edge.tree.cum_acceptance[n]) * prob
        for n in (ROOT, *sent)
        for token, prob in zip(*edge.known.get(n, RatedCandidates()), strict=True)
        if edge.tree.child(n, token) not in sent
    ]
    unknown = [edge.tree.cum_acceptance[n] for n in sent if n not in edge.known]
    best = sorted([*outcomes, *unknown], reverse=True)[: len(nodes)]
    assert [edge.tree.cum_acceptance[n] for n in nodes] == pytest.approx(best)


def test_one_outcome_is_followed_and_none_when_the_device_waits() -> None:
    chain = TreeShape(2, 2, 1, 1)
    edge = EdgeTree()
    draft_round(edge, [1], chain)
    send(edge, chain)
    draft_ahead(edge, [1], BEST_GUESS, 5)
    ahead = [n for n in range(len(edge.tree)) if n not in edge.sent]
    first = min(ahead)
    assert all(n == first or first in edge.tree.path(n) for n in ahead)
    assert edge.next_outcomes(WAIT, 4) == []


def test_a_hit_needs_no_forward_and_a_miss_all_of_them() -> None:
    edge = EdgeTree()
    fresh = draft_round(edge, [1])
    send(edge)
    draft_ahead(edge, [1], LIKELIEST, 20)
    node, commit = ROOT, list[int]()
    while node == ROOT or node in edge.sent:
        token = edge.known[node].tokens[0]
        node = edge.tree.child(node, token)  # type: ignore[assignment]
        commit.append(token)
    assert edge.commit(commit).proactive_hit
    assert draft_round(edge, [1, *commit]) < fresh
    send(edge)
    assert edge.commit([5]).hits == 0
    assert draft_round(edge, [1, *commit, 5]) == fresh
