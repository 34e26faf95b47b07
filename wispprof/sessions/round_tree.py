"""The draft tree of a round on the edge: how it grows, what was sent of it, what a commit leaves. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

from wispprof.backends import Continuations
from wispprof.policies.interface import TreeShape
from wispprof.sessions.pending_tree import as_tree, deepest
from wispprof.sessions.tree_growth import add_candidates, next_nodes
from wispprof.token_tree import HELD_NODES, ROOT, TokenTree
from wispprof.types import DraftFeatures

RateCandidates = Callable[[DraftFeatures, Sequence[float], int], Iterable[float]]
"""As :meth:`~wispprof.policies.interface.CandidatePredictor.candidate_acceptance`."""


class DecidedTree(NamedTuple):
    """What a commit leaves of a tree.

    ``hits``: committed tokens that it held. ``rejected``: the text left it at a node that has children.
    ``contradicted``: the text left what was sent at a node that has children there. The server then ignores
    the epoch, also if an unsent child stands.
    ``proactive``: at the place of the target's own token there was a node that had not been sent. ``depth``:
    of the deepest node verified. ``dropped`` nodes, which took ``dropped_ms``, are gone; of these
    ``wasted_ms`` were spent on others than the one that was rejected. ``moved``: new numbers of those that
    stand.
    """

    hits: int
    rejected: bool
    contradicted: bool
    proactive: bool
    depth: int
    dropped: int
    dropped_ms: float
    wasted_ms: float
    moved: dict[int, int]


class RoundTree:
    """A tree that hangs at the committed text. ``expanded``: nodes whose candidates are known, or that end
    the text. ``sent``: nodes that the server received."""

    def __init__(
        self,
        tokens: Sequence[int] = (),
        acceptance_probs: Sequence[float] = (),
        draft_ms: Sequence[float] = (),
    ) -> None:
        self.tree = as_tree(tokens, acceptance_probs, HELD_NODES)
        self.expanded: set[int] = set()
        self.sent: set[int] = set()
        self._sent_order: list[int] = []
        self._sent_len = 0
        self._draft_ms = list(draft_ms)

    @property
    def draft_ms(self) -> float:
        """Drafting time of all nodes."""
        return sum(self._draft_ms)

    @property
    def unsent(self) -> int:
        """Nodes that were added since a round was sent."""
        return len(self.tree) - self._sent_len

    def next_nodes(self, shape: TreeShape) -> list[int]:
        """Nodes to expand next; none if the tree is complete. The drafter needs a node's parent first, which
        drafts of an earlier chain may lack."""
        expanded = self.expanded
        waiting = {node for node, parent in enumerate(self.tree.parents) if parent not in expanded}
        return next_nodes(self.tree, expanded | waiting, shape)

    def grow(
        self,
        found: Sequence[tuple[int, Continuations]],
        shape: TreeShape,
        rate: RateCandidates,
        draft_ms: float,
        stop: Collection[int] = (),
    ) -> int:
        """Take in what one forward of ``draft_ms`` found after some nodes; returns the number of new nodes.
        Nodes with a ``stop`` token are not expanded."""
        tree, offers = self.tree, []
        for node, after in found:
            self.expanded.add(node)
            depth = 0 if node == ROOT else tree.depths[node]
            probs = [candidate.prob for candidate in after.candidates]
            if probs:
                rated = [float(prob) for prob in rate(after.features, probs, depth)]
                offers.append((node, [candidate.token for candidate in after.candidates], rated))
        added = add_candidates(tree, offers, shape)
        self._draft_ms += [draft_ms / len(added)] * len(added) if added else []
        self.expanded.update(node for node in added if tree.tokens[node] in stop)
        return len(added)

    def send(self, nodes: Sequence[int]) -> tuple[list[int], list[int], list[float], float]:
        """(tokens, parents, acceptance probabilities, drafting time) of nodes that leave in a frame."""
        tokens, parents = self.tree.part(nodes)
        self.sent.update(nodes)
        self._sent_order, self._sent_len = list(nodes), len(self.tree)
        probs = [self.tree.acceptance_probs[node] for node in nodes]
        return tokens, parents, probs, sum(self._draft_ms[node] for node in nodes)

    def lost(self) -> None:
        """The server holds none of it any more."""
        self.sent.clear()
        self._sent_order, self._sent_len = [], 0

    def commit(self, tokens: Sequence[int], drafted: int | None) -> DecidedTree:
        """Follow committed ``tokens``, for which the server verified ``drafted`` nodes. What comes after them
        becomes the tree, if it holds them all; else nothing does."""
        tree, times = self.tree, self._draft_ms
        path = tree.walk(tokens)
        hits, last = len(path), path[-1] if path else ROOT
        whole = hits == len(tokens)
        rejected = not whole and last in tree.parents
        place = last if not whole else path[-2] if hits > 1 else ROOT
        known = [node for node in path if node in self.sent]
        left_at = known[-1] if known else ROOT
        contradicted = len(known) < len(tokens) and any(n in self.sent for n in tree.children(left_at))
        proactive = hits >= len(tokens) - 1 and any(n not in self.sent for n in tree.children(place))
        verified = self._sent_order[:drafted]
        depth = deepest(tree.part(verified)[1])
        kept = tree.descendants(last) if whole else []
        gone = set(range(len(tree))).difference(path, kept)
        dropped_ms = sum(times[node] for node in gone)
        wrong = next(iter(tree.children(last)), None) if rejected else None
        moved = {node: number for number, node in enumerate(kept)}
        if whole:
            moved[last] = ROOT
        self.tree = tree.below(last) if whole else TokenTree(HELD_NODES)
        self.expanded = {moved[node] for node in self.expanded if node in moved}
        self.sent = {moved[node] for node in self.sent if node in moved} - {ROOT}
        self._sent_order, self._sent_len = [], 0
        self._draft_ms = [times[node] for node in kept]
        wasted_ms = dropped_ms - (0.0 if wrong is None else times[wrong])
        return DecidedTree(
            hits, rejected, contradicted, proactive, depth, len(gone), dropped_ms, wasted_ms, moved
        )
