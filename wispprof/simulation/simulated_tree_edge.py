"""The edge's side of one simulated generation that drafts trees: a driver of :class:`EdgeTree`.

One forward of the draft model expands several nodes; the device profile gives its time. A forward that has
begun always ends.

Round mode: the tree of a round is complete before it leaves. While it is out, the device prepares outcomes
in the forwards that fit into the expected wait. Stream mode: the device goes on expanding, and sends the
likeliest part of its tree after each forward that changed it. Each such frame replaces the one before.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from wispprof.policies.interface import Controller, RoundContext, TreeShape, tree_shape
from wispprof.policies.tree_shapes import chain_of
from wispprof.sessions.draft_buffer import CommitEffect, Outgoing
from wispprof.sessions.edge_timing import EdgeTiming
from wispprof.sessions.outcomes import EdgeTree, OutcomeDrafting
from wispprof.sessions.pending_tree import successive
from wispprof.sessions.session_state import CommitResult
from wispprof.simulation.arrivals import Request
from wispprof.simulation.devices import DeviceProfile, Link
from wispprof.simulation.metrics import SessionRecord
from wispprof.simulation.simulated_output import SimulatedOutput
from wispprof.token_tree import MAX_NODES, ROOT

if TYPE_CHECKING:
    from wispprof.simulation.event_loop import Simulation

_Answer = tuple[CommitResult, float, int]
_LEAST = 0.002
"""A stream expands no node of less cumulative acceptance."""


@dataclass(slots=True, eq=False)
class SimulatedTreeEdge:
    """As :class:`~wispprof.simulation.simulated_edge.SimulatedEdge`, for a session whose controller names a
    tree. ``ahead``: what it prepares while a round is out."""

    sim: Simulation
    key: str
    record: SessionRecord
    device: DeviceProfile
    link: Link
    output: SimulatedOutput
    controller: Controller
    stream: bool
    ahead: OutcomeDrafting
    request: Request
    next_ms: float = field(default=math.inf, init=False)
    outbox: deque[tuple[float, Outgoing]] = field(default_factory=deque, init=False)
    _edge: EdgeTree = field(init=False)
    _timing: EdgeTiming = field(init=False)
    _committed_len: int = field(init=False)
    _load_level: int = field(default=0, init=False)
    _free_ms: float = field(default=0.0, init=False)
    _sent_ms: float = field(default=math.inf, init=False)
    _epoch: int = field(default=0, init=False)
    _running: tuple[list[int], float] = field(default=([], 0.0), init=False)
    _draft_ms: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._committed_len = self.output.prompt_tokens
        self._timing = EdgeTiming(self.record.slo)
        self._timing.drafted(self.device.step_ms(self._committed_len))
        self._edge = EdgeTree(self._shape())

    @property
    def committed(self) -> tuple[int, ...]:
        """Every token that reached the device, prompt included."""
        made = self._committed_len - self.output.prompt_tokens
        return (*self.output.prompt, *self.output.path[:made])

    def begin(self, now_ms: float) -> None:
        """The opening frame has left; the draft model reads the prompt meanwhile."""
        self._free_ms = now_ms + self.device.prefill_ms_per_token * self.output.prompt_tokens
        if self.stream:
            self._begin_forward(self._free_ms)

    def on_commit(self, now_ms: float, answer: _Answer) -> None:
        """A commit reached the device."""
        commit, verify_ms, load_level = answer
        record, timing, edge = self.record, self._timing, self._edge
        if record.tokens == 0:
            record.first_ms = now_ms
        record.tokens += len(commit.tokens)
        record.last_ms = now_ms
        if self.stream:
            self.advance(now_ms)
        else:
            self._prepare(now_ms)
        timing.committed(now_ms, commit.queue_ms + verify_ms, len(commit.tokens))
        self._load_level = load_level
        self._committed_len = commit.committed_len
        self.controller.finish(commit.drafted, commit.accepted)
        asked = bool(edge.sent) and not self.stream and self.ahead.outcomes > 0
        moved = edge.commit(commit.tokens, self._shape())
        self.sim.count_effect(
            CommitEffect(commit.tokens, proactive=asked, proactive_hit=asked and ROOT in edge.known)
        )
        if commit.finished:
            record.done = True
            self.next_ms = math.inf
            self.sim.ended(now_ms, self)
        elif self.stream:
            nodes, cost_ms = self._running
            self._running = ([] if moved is None else [moved[n] for n in nodes if n in moved], cost_ms)
            if self.next_ms == math.inf:
                self._begin_forward(max(now_ms, self._free_ms))
        else:
            self._round(max(now_ms, self._free_ms))

    # --- round mode ---

    def _round(self, now_ms: float) -> None:
        """Draft what the round still lacks, and send it. Nothing can arrive before it has left."""
        edge, output = self._edge, self.output
        while nodes := edge.next_nodes():
            now_ms += self._forward_ms(len(nodes))
            edge.add(output.expand(edge.tree, nodes, len(output.candidates[0]), self._committed_len))
        frame = self._frame(edge.send())
        self._free_ms = self._sent_ms = now_ms
        self._timing.sent(now_ms)
        probs = successive([edge.tree.cum_acceptance[node] for node in edge.sent])
        slack_ms = self._timing.slack_ms(probs, now_ms, self.link.profile.mean_rtt_ms)
        self.sim.send_round(now_ms, self, frame, slack_ms)

    def _prepare(self, now_ms: float) -> None:
        """Work out what was prepared while the round was out."""
        edge, output = self._edge, self.output
        if self._sent_ms == math.inf:
            return
        # By what is known when the round leaves: a forward that would outlast the wait is not begun.
        until_ms = self._sent_ms + self._timing.left_ms(self._sent_ms, self.link.profile.mean_rtt_ms)
        width = len(output.candidates[0])
        while self._free_ms < now_ms and self._free_ms + self._cost_ms(edge.shape.beams) <= until_ms:
            nodes = edge.next_outcomes(self.ahead, edge.shape.beams)
            if not nodes:
                break
            self._free_ms += self._forward_ms(len(nodes))
            edge.add_ahead(output.expand(edge.tree, nodes, width, self._committed_len), self.ahead)
        self._sent_ms = math.inf

    # --- stream mode ---

    def advance(self, until_ms: float) -> None:
        """Work out what it has done up to and with ``until_ms``."""
        edge, output = self._edge, self.output
        while self.next_ms <= until_ms:
            now_ms = self._free_ms = self.next_ms
            nodes, _ = self._running
            if nodes:
                width = len(output.candidates[0])
                if edge.add(output.expand(edge.tree, nodes, width, self._committed_len)):
                    self._send(now_ms)
            self._begin_forward(now_ms)

    def _begin_forward(self, now_ms: float) -> None:
        edge = self._edge
        self.next_ms = math.inf
        nodes = [
            node for node in edge.next_nodes() if node == ROOT or edge.tree.cum_acceptance[node] >= _LEAST
        ]
        self._running = (nodes, 0.0)
        if nodes:
            self.next_ms = now_ms + self._forward_ms(len(nodes))

    def _send(self, now_ms: float) -> None:
        frame = self._frame(self._edge.tree.best_first()[:MAX_NODES])
        self.outbox.append((self.sim.send(now_ms, self.link, len(frame.tokens)), frame))

    # --- both modes ---

    def _frame(self, nodes: list[int]) -> Outgoing:
        tree = self._edge.tree
        last = self.output.prompt_tokens + self.record.output_tokens - 1 - self._committed_len
        nodes = [node for node in nodes if tree.depths[node] <= last]
        tokens, parents = tree.part(nodes)
        probs = tuple(tree.acceptance_probs[node] for node in nodes)
        draft_ms, self._draft_ms = self._draft_ms, 0.0
        chain = parents == list(range(ROOT, len(nodes) - 1))
        up = () if chain else tuple(parents)
        self._epoch += 1  # a frame replaces what the server holds
        return Outgoing(self._epoch, self._committed_len, tuple(tokens), probs, draft_ms, up)

    def _cost_ms(self, nodes: int) -> float:
        return self.device.forward_ms(self._committed_len, nodes)

    def _forward_ms(self, nodes: int) -> float:
        """Time of a forward, counted."""
        cost_ms = self._cost_ms(nodes)
        self._draft_ms += cost_ms
        counters = self.sim.counters
        counters.drafted += nodes
        counters.drafting_ms += cost_ms
        return cost_ms

    def _context(self) -> RoundContext:
        context = self._timing.context(
            self.link.profile.mean_rtt_ms, self._load_level, 0, self._committed_len
        )
        return context._replace(draft_ms=self.device.step_ms(self._committed_len))

    def _shape(self) -> TreeShape:
        context = self._context()
        return tree_shape(self.controller, context) or chain_of(max(1, self.controller.begin(context)))
