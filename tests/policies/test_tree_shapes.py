"""The chosen shape of a draft tree is never worse than a chain by the same arithmetic."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wispprof.policies.interface import TreeShape
from wispprof.policies.tree_shapes import best_shape, best_stream_shape, chain_of, grow
from wispprof.sessions.tree_growth import add_candidates, next_nodes, round_nodes
from wispprof.token_tree import HELD_NODES, ROOT, TokenTree

RATES = (0.69, 0.13, 0.055, 0.026, 0.017, 0.015, 0.008, 0.008)
WEIGHTS = st.lists(st.floats(0.01, 1), min_size=4, max_size=4)


def as_rates(weights: list[float]) -> tuple[float, ...]:
    return tuple(sorted((w / (sum(weights) + 0.05) for w in weights), reverse=True))


@settings(deadline=None)
@given(
    st.builds(TreeShape, st.integers(1, 24), st.integers(1, 5), st.integers(1, 4), st.integers(1, 6)), WEIGHTS
)
def test_expected_growth_is_the_growth_of_a_real_tree(shape: TreeShape, weights: list[float]) -> None:
    rates = as_rates(weights)
    tree, expanded, forwards = TokenTree(HELD_NODES), set[int](), 0
    growth = grow(rates, shape)
    while nodes := next_nodes(tree, expanded, shape):
        expanded.update(nodes)
        add_candidates(tree, [(node, range(9), rates) for node in nodes], shape)
        forwards += 1
        sent = sorted((tree.cum_acceptance[node] for node in round_nodes(tree, shape)), reverse=True)
        assert forwards <= len(growth.expanded)
        assert sum(sent) == pytest.approx(growth.accepted(forwards, shape.nodes))
    # Equal candidates may go either way, so forwards that add nothing may differ.
    assert sum(sent) == pytest.approx(growth.accepted(len(growth.expanded), shape.nodes))
    assert ROOT in expanded


@settings(deadline=None, max_examples=40)
@given(
    WEIGHTS,
    st.floats(0.5, 60),
    st.floats(0, 10),
    st.floats(0, 200),
    st.floats(1, 50),
    st.floats(0, 5),
)
def test_a_tree_is_chosen_only_if_it_beats_every_chain(
    weights: list[float], draft_ms: float, node_ms: float, rtt_ms: float, base_ms: float, row_ms: float
) -> None:
    rates = as_rates(weights)

    def forward_ms(nodes: int) -> float:
        return draft_ms + node_ms * (nodes - 1)

    def step_ms(rows: int) -> float:
        return base_ms + row_ms * rows

    chosen = best_shape(rates, forward_ms, rtt_ms, step_ms, max_nodes=16)
    for k in range(17):
        tokens = sum(rates[0] ** depth for depth in range(k + 1))
        assert chosen.tokens_per_ms >= tokens / (k * draft_ms + rtt_ms + step_ms(1 + k)) - 1e-12


def test_free_rows_and_nodes_choose_a_tree_and_dear_ones_a_chain() -> None:
    free = best_shape(RATES, lambda n: 4.0, 50.0, lambda rows: 20.0)
    assert (free.shape.nodes, free.shape.beams) == (64, 32)
    dear_nodes = best_shape(RATES, lambda n: 4.0 * n, 50.0, lambda rows: 20.0)
    assert dear_nodes.shape == chain_of(dear_nodes.shape.nodes)
    dear_rows = best_shape(RATES, lambda n: 4.0, 5.0, lambda rows: 20.0 * rows)
    assert dear_rows.shape.nodes <= 1
    assert best_shape((), lambda n: 4.0, 5.0, lambda rows: 20.0).shape.nodes == 0


def test_streams_grow_trees_where_nodes_are_nearly_free() -> None:
    shape = best_stream_shape(RATES, lambda n: 4.0 + 0.01 * n, 40.0)
    assert shape is not None
    assert shape.beams >= 8
    assert best_stream_shape(RATES, lambda n: 4.0 * n, 40.0) is None
    assert best_stream_shape((), lambda n: 4.0, 40.0) is None
