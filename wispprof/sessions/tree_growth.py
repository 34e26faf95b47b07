"""How a draft tree grows: always below the nodes that are likeliest to be accepted. Pure.

One forward of the draft model expands several nodes at once. Their candidates become nodes in falling order
of cumulative acceptance probability, as long as the shape allows (SpecEdge section 4.1, Sequoia).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

from wispprof.policies.interface import TreeShape
from wispprof.token_tree import ROOT, TokenTree


def next_nodes(tree: TokenTree, expanded: frozenset[int] | set[int], shape: TreeShape) -> list[int]:
    """Nodes to expand in the next forward, likeliest first; none if the tree is complete.

    ``expanded``: nodes (and :data:`ROOT`) whose candidates are known.
    """
    if ROOT not in expanded:
        return [ROOT]
    if len(tree) >= min(shape.nodes, tree.limit):
        return []
    depths, cum_acceptance = tree.depths, tree.cum_acceptance
    leaves = [node for node in range(len(tree)) if node not in expanded and depths[node] < shape.depth]
    return heapq.nsmallest(shape.beams, leaves, key=lambda node: (-cum_acceptance[node], node))


def add_candidates(
    tree: TokenTree,
    found: Iterable[tuple[int, Sequence[int], Sequence[float]]],
    shape: TreeShape,
    least: float = 0.0,
) -> list[int]:
    """Take the best candidates after some nodes into the tree; returns the new nodes.

    ``found``: (node, candidate tokens, P(each is the target's | the node was accepted)). A candidate whose
    cumulative acceptance probability is below ``least`` is left out.
    """
    offers: list[tuple[float, int, int, int, float]] = []
    for node, tokens, probs in found:
        above = 1.0 if node == ROOT else tree.cum_acceptance[node]
        for rank, (token, prob) in enumerate(zip(tokens[: shape.width], probs, strict=False)):
            if above * prob >= least and prob > 0.0:
                offers.append((-above * prob, node, rank, token, prob))
    left = min(shape.nodes, tree.limit) - len(tree)
    added: list[int] = []
    for _, node, _, token, prob in sorted(offers)[: max(0, left)]:
        known = len(tree)
        if tree.add(node, token, prob) == known:
            added.append(known)
    return added
