"""Draft trees beyond a session's committed text: frames merged by path, and what a step takes first. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from wispprof.token_tree import ROOT, TokenTree


class FrameTree(NamedTuple):
    """The draft tokens of one frame as a tree: ``parents`` by node, :data:`ROOT` for the text before it."""

    tokens: Sequence[int]
    parents: Sequence[int]
    acceptance_probs: Sequence[float]

    @classmethod
    def of(
        cls, tokens: Sequence[int], parents: Sequence[int], acceptance_probs: Sequence[float]
    ) -> FrameTree:
        """Without ``parents``, a chain."""
        return cls(tokens, parents or range(ROOT, len(tokens) - 1), acceptance_probs)

    def spell(self, text: Sequence[int]) -> tuple[list[int], bool]:
        """(Nodes that spell the beginning of ``text``; whether ``text`` goes on at a node that has children,
        but with none of them)."""
        child: dict[tuple[int, int], int] = {}
        for node, step in enumerate(zip(self.parents, self.tokens, strict=True)):
            child.setdefault(step, node)
        path: list[int] = []
        node = ROOT
        for token in text:
            if (following := child.get((node, token))) is None:
                return path, node in self.parents
            path.append(node := following)
        return path, False


class Grafted(NamedTuple):
    """Nodes of a frame that a tree took in: ``added`` anew, ``excess`` beyond its limit or depth, ``foreign``
    that follow another text."""

    added: list[int]
    excess: int
    foreign: int


def graft(tree: TokenTree, at: int, frame: FrameTree, root: int, path: Sequence[int], depth: int) -> Grafted:
    """Take what follows ``root`` in a frame into ``tree``, after its node ``at``; known nodes stay.

    ``path``: nodes of the frame down to ``root``, which are part of the text. No node is added below
    ``depth``.
    """
    place = {root: at}
    skipped, on_path = set[int](), set(path)
    added: list[int] = []
    foreign = 0
    for node, (token, parent) in enumerate(zip(frame.tokens, frame.parents, strict=True)):
        above = place.get(parent)
        if above is None:
            if parent in skipped:
                skipped.add(node)
            else:
                foreign += node not in on_path
            continue
        deeper = 1 if above == ROOT else 1 + tree.depths[above]
        known = len(tree)
        found = tree.add(above, token, frame.acceptance_probs[node]) if deeper <= depth else None
        if found is None:
            skipped.add(node)
            continue
        place[node] = found
        if found == known:
            added.append(found)
    return Grafted(added, len(skipped), foreign)


def as_tree(tokens: Sequence[int], acceptance_probs: Sequence[float], limit: int) -> TokenTree:
    """A chain as a tree."""
    tree = TokenTree(limit)
    for node, (token, prob) in enumerate(zip(tokens, acceptance_probs, strict=True)):
        tree.add(node - 1, token, prob)
    return tree


def deepest(parents: Sequence[int]) -> int:
    """Depth of the deepest of some nodes."""
    depths: list[int] = []
    for parent in parents:
        depths.append(1 if parent == ROOT else 1 + depths[parent])
    return max(depths, default=0)


def trunk(tree: TokenTree) -> list[int]:
    """The path of first children, which came before their siblings."""
    path: list[int] = []
    for node, parent in enumerate(tree.parents):
        if parent == (path[-1] if path else ROOT):
            path.append(node)
    return path


def best_part(tree: TokenTree, count: int, order: Sequence[int] = ()) -> tuple[list[int], Sequence[int]]:
    """(tokens, parents) of the likeliest ``count`` nodes; no parents if they are a chain. ``order``: of all
    nodes, best first, if known."""
    tokens, parents = tree.part((order or tree.best_first())[:count])
    return tokens, () if parents == list(range(ROOT, len(parents) - 1)) else parents


def in_order(acceptance_probs: Sequence[float], parents: Sequence[int]) -> list[float]:
    """:func:`successive` of nodes by their ``acceptance_probs``, each given its parent."""
    cum: list[float] = []
    for prob, parent in zip(acceptance_probs, parents, strict=True):
        cum.append(prob if parent == ROOT else prob * cum[parent])
    return successive(sorted(cum, reverse=True))


def successive(cum_acceptance: Sequence[float]) -> list[float]:
    """Cumulative acceptance in best-first order as probabilities of each node given the one before it.

    Their running products are the cumulative acceptance again. What policies work out for a chain (expected
    tokens, rank, cuts to the first j drafts) then holds for a tree.
    """
    probs: list[float] = []
    before = 1.0
    for value in cum_acceptance:
        probs.append(value / before if before > 0.0 else 0.0)
        before = value
    return probs
