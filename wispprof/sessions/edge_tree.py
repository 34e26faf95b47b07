"""The draft tree of an edge: how it grows, what was sent of it, what a commit leaves. Pure.

While a round is out, the tree grows ahead of its outcomes. An *outcome* is how many of the round's drafts are
accepted, and the target's token after them. Both are one node: a child, not sent, of a sent node or of the
text. Its probability is its cumulative acceptance. An idle device expands the likeliest outcomes and what
follows them, several in one forward. If one of them happens, its tree is there at once.

SpecEdge's proactive drafting prepares one outcome; an enumeration of chains prepares several, each without
branches (:class:`~wispprof.settings.edge_settings.OutcomeDrafting`).
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Sequence
from typing import NamedTuple

from wispprof.policies.interface import TreeShape
from wispprof.sessions.pending_tree import as_tree, deepest
from wispprof.sessions.tree_growth import add_candidates, next_nodes
from wispprof.settings.edge_settings import OutcomeDrafting
from wispprof.token_tree import HELD_NODES, ROOT, TokenTree

_KEPT_NODES = HELD_NODES // 2
"""Most nodes that outlast a commit, so that the tree can grow."""


class RatedCandidates(NamedTuple):
    """The draft's candidates after a node, best first, and P(the target takes each | the node was
    accepted)."""

    tokens: Sequence[int] = ()
    acceptance_probs: Sequence[float] = ()


class DecidedTree(NamedTuple):
    """What a commit leaves of a tree.

    ``hits``: committed tokens that it held. ``rejected``: the text left it at a node that has children.
    ``proactive``: outcomes were prepared; ``proactive_hit``: this one was, in part at least.
    ``depth``: of the deepest node verified. ``dropped`` nodes, which took ``dropped_ms``, are gone; of these
    ``wasted_ms`` were spent on others than the one that was rejected. ``moved``: new numbers of those that
    stand, the last committed one included.
    """

    hits: int
    rejected: bool
    proactive: bool
    proactive_hit: bool
    depth: int
    dropped: int
    dropped_ms: float
    wasted_ms: float
    moved: dict[int, int]


class EdgeTree:
    """A tree that hangs at the committed text. ``known``: nodes whose candidates are known, with these; none
    after a node that ends the text. ``sent``: nodes that the server received. ``added``: nodes added since
    somebody set it to 0. ``max_depth``: of any use.

    Drafts of an earlier chain may be its first path.
    """

    def __init__(
        self,
        tokens: Sequence[int] = (),
        acceptance_probs: Sequence[float] = (),
        draft_ms: Sequence[float] = (),
    ) -> None:
        self.tree = as_tree(tokens, acceptance_probs, HELD_NODES)
        self.known: dict[int, RatedCandidates] = {}
        self.sent: set[int] = set()
        self.added = 0
        self.max_depth = HELD_NODES
        self._sent_order: list[int] = []
        self._draft_ms = list(draft_ms)
        # (−cumulative acceptance, node, candidate after it or -1 for the node itself, P(candidate | node))
        self._options: list[tuple[float, int, int, float]] | None = None
        self._beyond: dict[int, int] = {}  # nodes drafted ahead: tokens from the outcome's on
        self._outcomes = self._prepared = 0

    @property
    def draft_ms(self) -> float:
        """Drafting time of all nodes."""
        return sum(self._draft_ms)

    # --- growth ---

    def next_nodes(self, shape: TreeShape, least: float = 0.0) -> list[int]:
        """Nodes to expand next, of cumulative acceptance ``least`` or more; none if the tree is complete. The
        drafter needs a node's parent first, which drafts of an earlier chain may lack."""
        known = self.known
        waiting = {node for node, parent in enumerate(self.tree.parents) if parent not in known}
        found = next_nodes(self.tree, known.keys() | waiting, shape)
        return [node for node in found if node == ROOT or self.tree.cum_acceptance[node] >= least]

    def grow(
        self,
        found: Sequence[tuple[int, RatedCandidates]],
        shape: TreeShape,
        draft_ms: float = 0.0,
        stop: Collection[int] = (),
    ) -> list[int]:
        """Take in what one forward of ``draft_ms`` found after some nodes; returns the new nodes. Nodes with
        a ``stop`` token are not expanded."""
        self.known.update(found)
        added = self._add([(node, *after) for node, after in found], shape, stop)
        for node in added:
            self._draft_ms[node] = draft_ms / len(added)
        return added

    def refill(self, shape: TreeShape, stop: Collection[int] = ()) -> None:
        """Take in candidates that likelier nodes displaced, now that these are gone."""
        for node in sorted(self.known):
            self._add([(node, *self.known[node])], shape, stop)

    def _add(
        self,
        found: list[tuple[int, Sequence[int], Sequence[float]]],
        shape: TreeShape,
        stop: Collection[int],
    ) -> list[int]:
        found = [one for one in found if self._depth(one[0]) < self.max_depth]
        added = add_candidates(self.tree, found, shape)
        self._appended(added, stop)
        return added

    def _appended(self, added: Collection[int], stop: Collection[int]) -> None:
        self.added += len(added)
        self._draft_ms += [0.0] * len(added)
        self.known.update((node, RatedCandidates()) for node in added if self.tree.tokens[node] in stop)

    # --- sending ---

    def send(self, nodes: Sequence[int]) -> tuple[list[int], list[int], list[float], float]:
        """(tokens, parents, acceptance probabilities, drafting time) of nodes that leave in a frame and
        replace all that the server holds."""
        tokens, parents = self.tree.part(nodes)
        self.sent = set(nodes)
        self._sent_order = list(nodes)
        self._forget_outcomes()
        probs = [self.tree.acceptance_probs[node] for node in nodes]
        return tokens, parents, probs, sum(self._draft_ms[node] for node in nodes)

    def lost(self) -> None:
        """The server holds none of it any more."""
        self.sent.clear()
        self._sent_order = []
        self._forget_outcomes()

    # --- outcomes ---

    def may_prepare(self, ahead: OutcomeDrafting) -> bool:
        """Whether :meth:`next_outcomes` would return any nodes."""
        if not ahead.outcomes or self.tree.full:
            return False
        if self._options is None:
            self._options = []
            for node in (ROOT, *self.sent):
                self._offer(node, ahead)
        while self._options:
            _, parent, token, _ = self._options[0]
            if token < 0:
                return True
            child = self.tree.child(parent, token)
            first = parent not in self._beyond
            if first and self._outcomes >= ahead.outcomes:
                heapq.heappop(self._options)
            elif child is not None and child in self.known:  # expanded for the round, then displaced
                heapq.heappop(self._options)
                self._outcomes += first
                self._beyond[child] = 1 + self._beyond.get(parent, 0)
                self._offer(child, ahead)
            else:
                return True
        return False

    def next_outcomes(self, ahead: OutcomeDrafting, beams: int, stop: Collection[int] = ()) -> list[int]:
        """Nodes to expand while the round is out, likeliest first, at most ``beams``; none if nothing is left
        to prepare. :meth:`grow_ahead` must follow."""
        chosen: list[int] = []
        while len(chosen) < beams and self.may_prepare(ahead):
            assert self._options is not None
            _, node, token, prob = heapq.heappop(self._options)
            if token >= 0:
                beyond, held = self._beyond.get(node, 0), len(self.tree)
                self._outcomes += not beyond
                added = self.tree.add(node, token, prob)
                assert added is not None  # it is not full
                if added == held:
                    self._appended([added], stop)
                self._beyond[added] = beyond + 1
                node = added
            if node not in self.known:
                chosen.append(node)
        self._prepared += len(chosen)
        return chosen

    def grow_ahead(
        self, found: Sequence[tuple[int, RatedCandidates]], ahead: OutcomeDrafting, draft_ms: float = 0.0
    ) -> None:
        """Take in what a forward of ``draft_ms`` found after nodes that :meth:`next_outcomes` named."""
        self.known.update(found)
        for node, _ in found:
            if node != ROOT:
                self._draft_ms[node] += draft_ms / len(found)
            if self._options is not None:
                self._offer(node, ahead)
                children = {self.tree.child(node, token) for token in self.known[node].tokens}
                for child in self.sent.intersection(children) - self.known.keys():
                    self._offer(child, ahead)

    def _offer(self, node: int, ahead: OutcomeDrafting) -> None:
        """Options after a node: its candidates that were not sent, or the node itself if they are unknown."""
        assert self._options is not None
        if self._depth(node) >= self.max_depth:
            return
        above = 1.0 if node == ROOT else self.tree.cum_acceptance[node]
        if node not in self.known:
            if node != ROOT and self.tree.parents[node] not in self.known:
                return  # of an earlier chain: the drafter needs its parent first
            heapq.heappush(self._options, (-above, node, -1, 0.0))
            return
        beyond = self._beyond.get(node, 0)
        if beyond >= ahead.depth:
            return
        tokens, probs = self.known[node]
        left = ahead.width if beyond else len(tokens)
        for token, prob in zip(tokens[:left], probs, strict=False):
            if prob > 0.0 and self.tree.child(node, token) not in self.sent:
                heapq.heappush(self._options, (-above * prob, node, token, prob))

    def _depth(self, node: int) -> int:
        return 0 if node == ROOT else self.tree.depths[node]

    def _forget_outcomes(self) -> None:
        self._options = None
        self._beyond.clear()
        self._outcomes = self._prepared = 0

    # --- a commit ---

    def commit(self, tokens: Sequence[int], drafted: int | None = None) -> DecidedTree:
        """Follow committed ``tokens``, for which the server verified ``drafted`` nodes. What comes after them
        becomes the tree, if it holds them all; else nothing does."""
        tree, times = self.tree, self._draft_ms
        path = tree.walk(tokens)
        hits, last = len(path), path[-1] if path else ROOT
        whole = hits == len(tokens)
        rejected = not whole and last in tree.parents
        depth = deepest(tree.part(self._sent_order[:drafted])[1])
        kept = tree.descendants(last) if whole else []
        if len(kept) > _KEPT_NODES:
            kept = sorted(sorted(kept, key=tree.cum_acceptance.__getitem__, reverse=True)[:_KEPT_NODES])
        gone = set(range(len(tree))).difference(path, kept)
        dropped_ms = sum(times[node] for node in gone)
        wrong = next(iter(tree.children(last)), None) if rejected else None
        moved = {node: number for number, node in enumerate(kept)}
        if whole:
            moved[last] = ROOT
        self.tree = TokenTree(HELD_NODES)
        for node in kept:
            self.tree.add(moved[tree.parents[node]], tree.tokens[node], tree.acceptance_probs[node])
        self.known = {moved[node]: after for node, after in self.known.items() if node in moved}
        self.sent = {moved[node] for node in self.sent if node in moved} - {ROOT}
        self._sent_order = []
        self._draft_ms = [times[node] for node in kept]
        self.max_depth -= len(tokens)
        proactive = self._prepared > 0
        proactive_hit = proactive and whole and last in self._beyond
        self._forget_outcomes()
        wasted_ms = dropped_ms - (0.0 if wrong is None else times[wrong])
        return DecidedTree(
            hits,
            rejected,
            proactive,
            proactive_hit,
            depth,
            len(gone),
            dropped_ms,
            wasted_ms,
            moved,
        )
