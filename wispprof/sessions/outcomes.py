"""The draft tree of an edge: grown for a round, and ahead of the outcomes of the round that is out. Pure.

An *outcome* of a round is how many of its drafts are accepted, and the target's token after them. Both are
one node: a child, not sent, of a sent node or of the text. Its probability is its cumulative acceptance.
While a round is out, an idle device expands the likeliest outcomes and what follows them, several in one
forward. If one of them happens, its tree is there at once.

SpecEdge's proactive drafting prepares one outcome (:data:`BEST_GUESS`); an enumeration of chains prepares
several, each without branches (:data:`ENUMERATION`).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from wispprof.policies.interface import TreeShape
from wispprof.sessions.tree_growth import add_candidates, next_nodes, round_nodes
from wispprof.token_tree import HELD_NODES, ROOT, TokenTree

Found = tuple[int, Sequence[int], Sequence[float]]
"""A node, the draft's candidates after it, and P(the target takes each | the node was accepted)."""


@dataclass(frozen=True, slots=True)
class OutcomeDrafting:
    """What is prepared while a round is out: at most ``outcomes`` outcomes (0: the device waits), trees of
    at most ``width`` children a node after each, expanded to ``depth`` tokens from the outcome's on."""

    outcomes: int = 1 << 20
    width: int = 16
    depth: int = 16


WAIT = OutcomeDrafting(0)
BEST_GUESS = OutcomeDrafting(1)
ENUMERATION = OutcomeDrafting(8, 1)
LIKELIEST = OutcomeDrafting()


class EdgeTree:
    """Drafts beyond the committed text. ``known``: nodes whose candidates are known, with these; the round is
    what :func:`~wispprof.sessions.tree_growth.round_nodes` names. ``sent``: nodes of the round that is out.
    """

    def __init__(self, shape: TreeShape) -> None:
        self.shape = shape
        self.tree = TokenTree(HELD_NODES)
        self.known: dict[int, tuple[Sequence[int], Sequence[float]]] = {}
        self.sent: list[int] = []
        self._options: list[tuple[float, int, int, float]] | None = None
        self._beyond: dict[int, int] = {}  # nodes drafted ahead: tokens from the outcome's on
        self._outcomes = 0

    # --- the round ---

    def next_nodes(self) -> list[int]:
        """Nodes to expand for the round that is being drafted; none if it is complete."""
        return next_nodes(self.tree, self.known, self.shape)

    def add(self, found: Iterable[Found]) -> list[int]:
        """Candidates of nodes that :meth:`next_nodes` named; returns the new nodes."""
        found = list(found)
        for node, tokens, probs in found:
            self.known[node] = (tokens, probs)
        return add_candidates(self.tree, found, self.shape)

    def send(self) -> list[int]:
        """The round leaves: its nodes, likeliest first."""
        self.sent = round_nodes(self.tree, self.shape)
        self._options, self._outcomes = None, 0
        self._beyond.clear()
        return self.sent

    # --- while it is out ---

    def next_outcomes(self, ahead: OutcomeDrafting, beams: int) -> list[int]:
        """Nodes to expand while the round is out, likeliest first, at most ``beams``; none if nothing is left
        to prepare. :meth:`add_ahead` must follow."""
        if not ahead.outcomes:
            return []
        if self._options is None:
            self._options = []
            for node in (ROOT, *self.sent):
                self._offer(node, ahead)
        chosen: list[int] = []
        while self._options and len(chosen) < beams and not self.tree.full:
            _, parent, token, prob = heapq.heappop(self._options)
            if token < 0:
                chosen.append(parent)  # a sent node whose candidates are not known
                continue
            beyond = 1 + self._beyond.get(parent, 0)
            if beyond == 1:
                if self._outcomes >= ahead.outcomes:
                    continue
                self._outcomes += 1
            added = self.tree.add(parent, token, prob)
            assert added is not None  # it is not full
            self._beyond[added] = beyond
            if added in self.known:  # expanded for the round, then displaced
                self._offer(added, ahead)
            else:
                chosen.append(added)
        return chosen

    def add_ahead(self, found: Iterable[Found], ahead: OutcomeDrafting) -> None:
        """Candidates of nodes that :meth:`next_outcomes` named."""
        for node, tokens, probs in found:
            self.known[node] = (tokens, probs)
            self._offer(node, ahead)

    def _offer(self, node: int, ahead: OutcomeDrafting) -> None:
        """Options after a node: its candidates that were not sent, or the node itself if they are unknown."""
        assert self._options is not None
        above = 1.0 if node == ROOT else self.tree.cum_acceptance[node]
        beyond = self._beyond.get(node, 0)
        if node not in self.known:
            heapq.heappush(self._options, (-above, node, -1, 0.0))
            return
        if beyond >= ahead.depth:
            return
        tokens, probs = self.known[node]
        sent = set(self.sent)
        left = ahead.width if beyond else len(tokens)
        for token, prob in zip(tokens[:left], probs, strict=False):
            if prob > 0.0 and self.tree.child(node, token) not in sent:
                heapq.heappush(self._options, (-above * prob, node, token, prob))

    # --- a commit ---

    def commit(self, tokens: Sequence[int], shape: TreeShape) -> dict[int, int] | None:
        """Move to the text after newly committed ``tokens``; the next round has this ``shape``.

        Returns the new number of each node that stays, the one that became the root included, or ``None`` if
        ``tokens`` were not drafted. If the root is :attr:`known`, the round was prepared in part at least.
        """
        path, old, known = self.tree.walk(tokens), self.tree, self.known
        self.shape, self.tree, self.known, self.sent = shape, TokenTree(HELD_NODES), {}, []
        self._options = None
        self._beyond.clear()
        if not path or len(path) < len(tokens):
            return None
        moved = {path[-1]: ROOT}
        for node in (path[-1], *range(path[-1] + 1, len(old))):
            if node in moved:
                place = moved[node]
            else:
                parent = moved.get(old.parents[node])
                child = None if parent is None else self.tree.child(parent, old.tokens[node])
                if child is None:
                    continue
                moved[node] = place = child
            if node in known:
                self.known[place] = known[node]
                add_candidates(self.tree, [(place, *known[node])], shape)
        return moved

    def clear(self, shape: TreeShape) -> None:
        """Start over with nothing."""
        self.commit((-1,), shape)
