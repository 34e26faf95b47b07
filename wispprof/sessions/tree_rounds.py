"""Rounds that are draft trees: whether, of what shape, and what of the tree grows next. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from wispprof.backends import Continuations
from wispprof.policies.controllers import ConfidenceAcceptance
from wispprof.policies.interface import Controller, RoundContext, TreeShape, tree_shape
from wispprof.sessions.draft_buffer import DraftBuffer, Outgoing
from wispprof.sessions.round_tree import RateCandidates
from wispprof.sessions.tree_growth import round_nodes
from wispprof.settings.edge_settings import DraftingSettings
from wispprof.token_tree import TokenTree

_NONE = TreeShape(0, 0, 0, 0)


class TreeStep(NamedTuple):
    """A draft step of a tree: find up to ``width`` candidates after each of ``nodes``, in one forward."""

    tree: TokenTree
    nodes: list[int]
    width: int


class TreeRounds:
    """Grows the tree of a session's round.

    ``allowed``: the drafter offers trees and the server verifies them. A controller that knows what nodes
    cost (``node_ms``) names the shape, see :func:`~wispprof.policies.interface.tree_shape`. For others the
    settings do, as deep as the controller's draft length. Settings bound every shape. A shape without
    branches is drafted as a chain.
    """

    def __init__(self, buffer: DraftBuffer, settings: DraftingSettings, stop: Collection[int]) -> None:
        self._buffer = buffer
        self._settings = settings
        self._stop = stop
        self._shape = _NONE
        self._rate: RateCandidates = ConfidenceAcceptance().candidate_acceptance
        self._growing: list[int | None] = []  # nodes of the step that runs; None: gone
        self.allowed = False

    def begin(self, controller: Controller, context: RoundContext, budget: int) -> bool:
        """A round begins, for which the controller drafts up to ``budget`` tokens; returns whether it is a
        tree. A tree that is left of the last round is gone on with."""
        buffer = self._buffer
        held = buffer.round_tree
        self._shape = _NONE
        if budget > 0 and self.allowed:
            self._shape = self._shape_of(controller, context, budget)
        branches = self._shape.width > 1 and self._shape.nodes > 1
        if not branches and (held is None or not len(held.tree)):
            buffer.drop_tree()
            return False
        predictor = getattr(controller, "predictor", None)
        self._rate = getattr(predictor, "candidate_acceptance", self._rate)
        buffer.begin_tree()
        return True

    def _shape_of(self, controller: Controller, context: RoundContext, budget: int) -> TreeShape:
        settings = self._settings
        most = TreeShape(settings.tree_nodes, settings.tree_depth, settings.tree_width, settings.tree_beams)
        decides = hasattr(controller, "shape") and getattr(controller, "node_ms", 0.0) is not None
        shape = tree_shape(controller, context) if decides else most._replace(depth=budget)
        if shape is None:
            return _NONE
        nodes, depth, width, beams = map(min, shape, most)
        return TreeShape(nodes, min(depth, self._buffer.depth_left), width, beams)

    def next_nodes(self) -> list[int]:
        """Nodes that the next step expands; none if the tree is complete."""
        held, shape = self._buffer.round_tree, self._current
        return held.next_nodes(shape) if held is not None and min(shape) > 0 else []

    def due(self, exhausted: bool = False) -> Outgoing | None:
        """The round, once its tree is complete or the drafter has nothing more to propose (``exhausted``)."""
        held = self._buffer.round_tree
        if held is None or (not exhausted and self.next_nodes()):
            return None
        return self._buffer.take_tree(round_nodes(held.tree, self._shape))

    @property
    def _current(self) -> TreeShape:
        """The shape that the tree grows to now: while a round is out, it may outgrow that of the round."""
        shape, more = self._shape, self._settings.proactive
        if not self._buffer.waiting:
            return shape
        depth = min(shape.depth + more, self._buffer.depth_left)
        return shape._replace(nodes=shape.nodes + more, depth=depth)

    def may_go_on(self, left_ms: float, draft_ms: float) -> bool:
        """Whether to grow the tree while a round is out, see :meth:`DraftScheduler.may_draft`."""
        held = self._buffer.round_tree
        if held is None or held.unsent >= self._settings.proactive:
            return False
        nodes = self.next_nodes()
        overlap_ms = min(max(left_ms, 0.0), draft_ms)
        if not nodes or overlap_ms >= draft_ms:
            return bool(nodes)
        prob = min(1.0, sum(held.tree.cum_acceptance[node] if node >= 0 else 1.0 for node in nodes))
        return prob * overlap_ms > (1.0 - prob) * (draft_ms - overlap_ms)

    def step(self) -> TreeStep | None:
        """The draft step that begins now; ``None`` if drafts are no tree."""
        held = self._buffer.round_tree
        if held is None:
            return None
        nodes = self.next_nodes()
        self._growing = list(nodes)
        return TreeStep(held.tree, nodes, self._current.width)

    def committed(self) -> None:
        """A commit changed the buffer while a step may run."""
        if self._growing:
            moved = self._buffer.moved if self._buffer.round_tree is not None else {}
            self._growing = [None if node is None else moved.get(node) for node in self._growing]

    def grown(self, found: Sequence[Continuations], draft_ms: float) -> int | None:
        """The step ended; returns the number of new nodes, ``None`` if a commit has overtaken it."""
        growing, self._growing = self._growing, []
        held = self._buffer.round_tree
        left = [(node, after) for node, after in zip(growing, found, strict=True) if node is not None]
        if held is None or not left:
            return None
        return held.grow(left, self._current, self._rate, draft_ms, self._stop)
