"""Draft trees as data: paths, parts and growth never contradict the nodes they are made of."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wispprof.policies.interface import TreeShape
from wispprof.sessions.tree_growth import add_candidates, next_nodes, round_nodes
from wispprof.token_tree import HELD_NODES, ROOT, TokenTree

Drawn = list[tuple[int, int, float]]
DRAWN = st.lists(st.tuples(st.integers(0, 80), st.integers(0, 4), st.floats(0, 1)), max_size=40)


def grown(drawn: Drawn) -> TokenTree:
    tree = TokenTree()
    for parent, token, prob in drawn:
        tree.add(parent % (len(tree) + 1) - 1, token, prob)
    return tree


@given(DRAWN)
def test_any_leading_part_in_best_first_order_is_a_tree(drawn: Drawn) -> None:
    tree = grown(drawn)
    order = tree.best_first()
    cumulative = [tree.cum_acceptance[node] for node in order]
    assert sorted(order) == list(range(len(tree)))
    assert cumulative == sorted(cumulative, reverse=True)
    for count in range(len(order) + 1):
        tokens, parents = tree.part(order[:count])
        assert all(ROOT <= parent < node for node, parent in enumerate(parents))
        copy = TokenTree()
        for token, parent, node in zip(tokens, parents, order[:count], strict=True):
            added = copy.add(parent, token, tree.acceptance_probs[node])
            assert added is not None
            assert copy.spelled(added) == tree.spelled(node)


@given(DRAWN, st.integers(0, 80))
def test_what_follows_a_node_is_what_its_descendants_spell(drawn: Drawn, chosen: int) -> None:
    tree = grown(drawn)
    node = chosen % (len(tree) + 1) - 1
    kept = tree.below(node)
    prefix = [] if node == ROOT else tree.spelled(node)
    expected = {
        tuple(spelled[len(prefix) :])
        for spelled in map(tree.spelled, range(len(tree)))
        if spelled[: len(prefix)] == prefix and len(spelled) > len(prefix)
    }
    assert {tuple(kept.spelled(one)) for one in range(len(kept))} == expected
    for spelled in expected:
        assert [kept.tokens[one] for one in kept.walk(spelled)] == list(spelled)


def test_a_known_child_is_found_and_a_full_tree_takes_none() -> None:
    tree = TokenTree(limit=2)
    assert (tree.add(ROOT, 5, 0.9), tree.add(0, 6, 0.5), tree.add(ROOT, 5, 0.1)) == (0, 1, 0)
    assert tree.full
    assert tree.add(ROOT, 7, 0.2) is None
    assert tree.cum_acceptance == [0.9, 0.45]
    assert tree.is_chain
    with pytest.raises(ValueError, match="not one of 2"):
        tree.add(2, 1, 0.5)


@given(
    st.builds(TreeShape, st.integers(1, 20), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4)),
    st.lists(st.floats(0.01, 1), min_size=4, max_size=4),
)
def test_growth_stays_within_the_shape_and_ends(shape: TreeShape, weights: list[float]) -> None:
    tree, expanded = TokenTree(HELD_NODES), set[int]()
    probs = sorted((weight / sum(weights) for weight in weights), reverse=True)
    forwards = 0
    while nodes := next_nodes(tree, expanded, shape):
        assert len(nodes) <= max(1, shape.beams)
        assert not expanded.intersection(nodes)
        expanded.update(nodes)
        add_candidates(tree, [(node, [1, 2, 3, 4], probs) for node in nodes], shape)
        forwards += 1
    assert forwards <= shape.nodes * shape.depth + 1
    assert len(round_nodes(tree, shape)) <= shape.nodes
    assert max(tree.depths) <= shape.depth
    assert all(len(list(tree.children(node))) <= shape.width for node in range(-1, len(tree)))
    if shape.beams == 4 and len(tree) < HELD_NODES:
        assert sent_acceptance(tree, shape) == pytest.approx(best_acceptance(shape, probs))


def sent_acceptance(tree: TokenTree, shape: TreeShape) -> float:
    return sum(tree.cum_acceptance[node] for node in round_nodes(tree, shape))


def best_acceptance(shape: TreeShape, probs: list[float]) -> float:
    """Expected accepted tokens of the best tree of this shape: all nodes there could be, the likeliest."""
    level, found = [1.0], list[float]()
    for _ in range(shape.depth):
        level = sorted((a * p for a in level for p in probs[: shape.width]), reverse=True)[: shape.nodes]
        found += level
    return sum(sorted(found, reverse=True)[: shape.nodes])


def test_a_likely_node_displaces_an_unlikely_one() -> None:
    """Greedy filling would keep the unlikely siblings of the first forward."""
    tree, expanded, shape = TokenTree(HELD_NODES), set[int](), TreeShape(nodes=4, depth=9, width=4, beams=2)
    while nodes := next_nodes(tree, expanded, shape):
        expanded.update(nodes)
        add_candidates(tree, [(node, [1, 2, 3, 4], [0.9, 0.05, 0.02, 0.01]) for node in nodes], shape)
    assert [tree.spelled(node) for node in round_nodes(tree, shape)] == [[1] * n for n in (1, 2, 3, 4)]


def test_no_forward_is_spent_on_what_a_round_cannot_send() -> None:
    """Nothing that follows the least likely node of a full round can displace another."""
    tree, shape = TokenTree(), TreeShape(nodes=2, depth=9, width=2, beams=2)
    assert next_nodes(tree, set(), shape) == [ROOT]
    add_candidates(tree, [(ROOT, [1, 2], [0.6, 0.3])], shape)
    assert next_nodes(tree, {ROOT}, shape) == [0]
    assert next_nodes(tree, {ROOT}, shape._replace(nodes=3)) == [0, 1]
    assert next_nodes(tree, {ROOT}, shape._replace(nodes=1)) == []


def test_a_chain_grows_node_by_node() -> None:
    tree, expanded, shape = TokenTree(), set[int](), TreeShape(nodes=3, depth=3)
    while nodes := next_nodes(tree, expanded, shape):
        expanded.update(nodes)
        add_candidates(tree, [(node, [7, 8], [0.6, 0.3]) for node in nodes], shape)
    assert tree.is_chain
    assert tree.tokens == [7, 7, 7]
