"""Drafts that are a tree: whether, of what shape, and what of the tree grows and leaves next. Pure.

Round mode. A round's tree is complete before it leaves. While it is out, outcomes are prepared.

Stream mode. The tree goes on growing beyond the text that the edge knows. After a forward that changed them,
the likeliest nodes leave in a frame of a new epoch, which replaces what the server holds. A frame in flight
may thus hold the branch that the target takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

from wispprof.backends import Continuations
from wispprof.policies.controllers import ConfidenceAcceptance
from wispprof.policies.interface import Controller, RoundContext, TreeShape, tree_shape
from wispprof.sessions.draft_buffer import DraftBuffer, Outgoing
from wispprof.sessions.edge_tree import RatedCandidates
from wispprof.sessions.tree_growth import round_nodes
from wispprof.settings.edge_settings import LIKELIEST, WAIT, DraftingSettings
from wispprof.token_tree import MAX_NODES, ROOT, TokenTree
from wispprof.types import DraftFeatures

RateCandidates = Callable[[DraftFeatures, Sequence[float], int], Iterable[float]]
"""As :meth:`~wispprof.policies.interface.CandidatePredictor.candidate_acceptance`."""

_NONE = TreeShape(0, 0, 0, 0)
_CHILDREN = _BEAMS = 4
_AHEAD = 4
"""A stream's tree holds so many times the nodes that it sends."""
_WORTH_A_FRAME = 0.2
"""A stream sends its likeliest nodes again once those that the server lacks are expected to add so many
accepted tokens, or no more are drafted."""
_LEAST = 0.002
"""A stream expands no node of less cumulative acceptance."""


class TreeStep(NamedTuple):
    """A draft step of a tree: find up to ``width`` candidates after each of ``nodes``, in one forward."""

    tree: TokenTree
    nodes: list[int]
    width: int


class TreeDrafting:
    """Grows the tree of a session.

    ``allowed``: the drafter offers trees and the server verifies them. ``most``: nodes that the server holds
    of a session. A controller that knows what nodes cost (``node_ms``) names the shape, see
    :func:`~wispprof.policies.interface.tree_shape`. For others the settings do: a round's tree is as deep as
    the controller's draft length, a stream's as the draft-ahead. Settings bound every shape. A shape without
    branches is drafted as a chain.
    """

    def __init__(
        self, buffer: DraftBuffer, settings: DraftingSettings, stop: Collection[int], most: int = MAX_NODES
    ) -> None:
        self._buffer = buffer
        self._settings = settings
        self._stop = stop
        self._most = min(most, settings.tree_nodes or most)
        self._ahead = settings.ahead or (LIKELIEST if settings.proactive else WAIT)
        self._shape = _NONE
        self._rate: RateCandidates = ConfidenceAcceptance().candidate_acceptance
        self._growing: list[int | None] = []  # nodes of the step that runs; None: gone
        self._next: list[int] | None = None  # nodes to expand; None: not worked out yet
        self._fresh = False  # stream: the tree changed since the last look at what to send
        self.node_ms = 0.0
        self.allowed = False

    def begin(self, controller: Controller, context: RoundContext, budget: int) -> bool:
        """A round begins, or a commit came in stream mode, and the controller drafts up to ``budget`` tokens;
        returns whether they are a tree. What is left of a tree is used up first."""
        buffer = self._buffer
        held = buffer.tree
        self._shape = self._shape_of(controller, context, budget) if budget > 0 and self.allowed else _NONE
        branches = self._shape.width > 1 and self._shape.nodes > 1
        if not branches and (held is None or not len(held.tree)):
            buffer.drop_tree()
            return False
        node_ms = getattr(controller, "node_ms", None) or 0.0
        self.node_ms = node_ms if math.isfinite(node_ms) else 0.0
        predictor = getattr(controller, "predictor", None)
        self._rate = getattr(predictor, "candidate_acceptance", self._rate)
        tree = buffer.begin_tree()
        tree.max_depth = buffer.depth_left
        if self._shape.nodes:
            tree.refill(self._shape, self._stop)
        self._changed()
        return True

    def _shape_of(self, controller: Controller, context: RoundContext, budget: int) -> TreeShape:
        settings, stream = self._settings, self._buffer.stream
        depth = self._buffer.draft_ahead_limit if stream else budget
        shape: TreeShape | None = None
        if hasattr(controller, "shape") and getattr(controller, "node_ms", 0.0) is not None:
            shape = tree_shape(controller, context)
            depth = depth if stream else MAX_NODES
        elif settings.tree_nodes:
            nodes = (_AHEAD if stream else 1) * settings.tree_nodes
            shape = TreeShape(nodes, depth, settings.tree_width or _CHILDREN, settings.tree_beams or _BEAMS)
        if shape is None:
            return _NONE
        return TreeShape(
            shape.nodes if stream else min(shape.nodes, self._most),
            min(shape.depth, depth, settings.tree_depth or MAX_NODES, self._buffer.depth_left),
            min(shape.width, settings.tree_width or MAX_NODES),
            min(shape.beams, settings.tree_beams or MAX_NODES),
        )

    # --- growth ---

    def next_nodes(self) -> list[int]:
        """Nodes that the next step expands; none if the tree is complete."""
        held = self._buffer.tree
        if held is None or min(self._shape) <= 0:
            return []
        if self._next is None:
            self._next = held.next_nodes(self._shape, _LEAST if self._buffer.stream else 0.0)
        return self._next

    def forward_ms(self, draft_ms: float) -> float:
        """Time of a forward over as many nodes as the shape allows; ``draft_ms``: over a single one."""
        return draft_ms + self.node_ms * max(0, self._shape.beams - 1)

    def may_go_on(self, left_ms: float, draft_ms: float) -> bool:
        """Whether to prepare outcomes while a round is out: if a forward ends before the commit is expected,
        in ``left_ms``. ``draft_ms``: a forward over a single node."""
        held = self._buffer.tree
        if held is None or not self.allowed or self.forward_ms(draft_ms) > left_ms:
            return False
        return held.may_prepare(self._ahead)

    def step(self) -> TreeStep | None:
        """The draft step that begins now; ``None`` if drafts are no tree."""
        held, shape = self._buffer.tree, self._shape
        if held is None:
            return None
        if self._preparing:
            nodes = held.next_outcomes(self._ahead, shape.beams, self._stop)
        else:
            nodes = self.next_nodes()
        self._growing = list(nodes)
        return TreeStep(held.tree, nodes, shape.width)

    def rate(self, found: Sequence[Continuations]) -> list[RatedCandidates]:
        """RatedCandidates of the step that runs, rated by the controller's predictor."""
        held, rated = self._buffer.tree, []
        for node, (candidates, features) in zip(self._growing, found, strict=True):
            probs = [candidate.prob for candidate in candidates]
            if held is None or node is None or not probs:
                rated.append(RatedCandidates())
                continue
            depth = 0 if node == ROOT else held.tree.depths[node]
            accepted = [float(prob) for prob in self._rate(features, probs, depth)]
            rated.append(RatedCandidates([candidate.token for candidate in candidates], accepted))
        return rated

    def grown(self, found: Sequence[RatedCandidates], draft_ms: float) -> bool:
        """The step ended; returns ``False`` if a commit has overtaken it."""
        growing, self._growing = self._growing, []
        held = self._buffer.tree
        left = [(node, after) for node, after in zip(growing, found, strict=True) if node is not None]
        if held is None or not left:
            return False
        if self._preparing:
            held.grow_ahead(left, self._ahead, draft_ms)
        else:
            held.grow(left, self._shape, draft_ms, self._stop)
        self._changed()
        return True

    def committed(self) -> None:
        """A commit changed the buffer while a step may run."""
        if self._growing:
            moved = self._buffer.moved if self._buffer.tree is not None else {}
            self._growing = [None if node is None else moved.get(node) for node in self._growing]
        self._changed()

    @property
    def _preparing(self) -> bool:
        return self._buffer.waiting and not self._buffer.stream

    def _changed(self) -> None:
        self._next, self._fresh = None, True

    # --- sending ---

    def due(self, exhausted: bool = False, hold: bool = False) -> Outgoing | None:
        """What leaves now. A round does once its tree is complete, or the drafter has nothing more to propose
        (``exhausted``). In stream mode new nodes may ``hold``, as in :meth:`DraftScheduler.due`."""
        buffer, held = self._buffer, self._buffer.tree
        if held is None:
            return None
        complete = exhausted or not self.next_nodes()
        if not buffer.stream:
            return buffer.take_tree(round_nodes(held.tree, self._shape)) if complete else None
        if not self._fresh or (hold and not complete):
            return None
        nodes = held.tree.best_first()[: self._most]
        gain = sum(held.tree.cum_acceptance[node] for node in nodes if node not in held.sent)
        if 0.0 < gain < _WORTH_A_FRAME and not complete:
            return None
        self._fresh = False
        return buffer.take_tree(nodes) if gain else None
