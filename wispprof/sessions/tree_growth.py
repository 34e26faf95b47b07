"""How a draft tree grows: always below the nodes that are likeliest to be accepted. Pure.

One forward of the draft model expands several nodes at once. Candidates that are not among the likeliest
``nodes`` of the shape are left out, so a likely node deep down displaces an unlikely one above it (SpecEdge
section 4.1, SpecExec, Sequoia). The tree then holds more nodes than a round sends: :func:`round_nodes` says
which those are.
"""

from __future__ import annotations

import heapq
from collections.abc import Container, Iterable, Sequence

from wispprof.policies.interface import TreeShape
from wispprof.token_tree import ROOT, TokenTree


def next_nodes(tree: TokenTree, expanded: Container[int], shape: TreeShape) -> list[int]:
    """Nodes to expand in the next forward, likeliest first; none if the tree is complete: what follows a node
    outside the likeliest ``shape.nodes`` is outside, too.

    ``expanded``: nodes (and :data:`ROOT`) whose candidates are known.
    """
    if ROOT not in expanded:
        return [ROOT]
    if tree.full:
        return []
    depths, cum_acceptance = tree.depths, tree.cum_acceptance
    inside = round_nodes(tree, shape)
    if len(inside) == shape.nodes:
        inside.pop()  # what follows the least likely node is less likely still
    leaves = [node for node in inside if node not in expanded and depths[node] < shape.depth]
    return heapq.nsmallest(shape.beams, leaves, key=lambda node: (-cum_acceptance[node], node))


def add_candidates(
    tree: TokenTree,
    found: Iterable[tuple[int, Sequence[int], Sequence[float]]],
    shape: TreeShape,
    least: float = 0.0,
) -> list[int]:
    """Take the best candidates after some nodes into the tree; returns the new nodes.

    ``found``: (node, candidate tokens, P(each is the target's | the node was accepted)). A candidate is left
    out if its cumulative acceptance probability is below ``least``, or not above that of ``shape.nodes``
    nodes within ``shape.depth`` which the tree has already.
    """
    nodes, cum_acceptance = shape.nodes, tree.cum_acceptance
    # Deeper ones, drafted ahead of an earlier round, are not for this one.
    inside = [prob for prob, depth in zip(cum_acceptance, tree.depths, strict=True) if depth <= shape.depth]
    if 0 < nodes <= len(inside):
        least = max(least, sorted(inside)[-nodes])
    offers: list[tuple[float, int, int, int, float]] = []
    for node, tokens, probs in found:
        above = 1.0 if node == ROOT else cum_acceptance[node]
        for rank, (token, prob) in enumerate(zip(tokens[: shape.width], probs, strict=False)):
            if above * prob >= least and prob > 0.0:
                offers.append((-above * prob, node, rank, token, prob))
    added: list[int] = []
    for _, node, _, token, prob in sorted(offers)[:nodes]:
        known = len(tree)
        if tree.add(node, token, prob) == known:
            added.append(known)
    return added


def round_nodes(tree: TokenTree, shape: TreeShape) -> list[int]:
    """The nodes that a round of this shape sends, likeliest first, a parent before its children."""
    depths = tree.depths
    return [node for node in tree.best_first() if depths[node] <= shape.depth][: shape.nodes]
