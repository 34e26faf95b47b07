"""The edge's side of one simulated generation: a driver of the runtime's own ``EdgeSession``.

The device profile gives the time of a draft step, the link that of a frame. A step that has begun always
ends. Each forward of a draft tree is a step.

To keep events few, drafting is worked out late. In round mode nothing can arrive while a round is
drafted: it is worked out at once, and proactive drafts when the commit arrives. In stream mode only an
arriving commit and a scheduling server depend on the edge: both call :meth:`SimulatedEdge.advance`
first. Frames wait in ``outbox`` until the server collects them.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import InitVar, dataclass, field
from typing import TYPE_CHECKING

from wispprof.policies.interface import Controller
from wispprof.sessions.draft_buffer import Outgoing
from wispprof.sessions.edge_session import EdgeSession
from wispprof.sessions.edge_tree import RatedCandidates
from wispprof.sessions.session_state import CommitResult
from wispprof.settings.edge_settings import DraftingSettings
from wispprof.simulation.arrivals import Request
from wispprof.simulation.devices import DeviceProfile, Link
from wispprof.simulation.metrics import SessionRecord
from wispprof.simulation.simulated_output import SimulatedOutput

if TYPE_CHECKING:
    from wispprof.simulation.event_loop import Simulation

# What the server sends: a commit, the duration of its step, and the load level.
_Answer = tuple[CommitResult, float, int]
# A running draft step: when it ends, and what it costs.
_Step = tuple[float, float]


@dataclass(slots=True, eq=False)
class SimulatedEdge:
    """One generation on one device. ``controller`` ``None``: it never drafts. ``trees``: it may draft trees.

    Stream mode: ``next_ms``, when it next acts by itself (``inf``: not before a commit); ``outbox``: frames
    that have left, with the time of their arrival at the server, in order.
    """

    sim: Simulation
    key: str
    record: SessionRecord
    device: DeviceProfile
    link: Link
    output: SimulatedOutput
    controller: Controller | None
    stream: bool
    drafting: InitVar[DraftingSettings]
    trees: InitVar[bool]
    request: Request
    next_ms: float = field(default=math.inf, init=False)
    outbox: deque[tuple[float, Outgoing]] = field(default_factory=deque, init=False)
    _session: EdgeSession = field(init=False)
    _running: _Step | None = field(default=None, init=False)
    _found: list[RatedCandidates] | None = field(default=None, init=False)
    _free_ms: float = field(default=0.0, init=False)

    def __post_init__(self, drafting: DraftingSettings, trees: bool) -> None:
        self._session = EdgeSession(
            self.output.prompt,
            self.record.output_tokens,
            self.record.slo,
            drafting,
            self.controller,
            stream=self.stream,
            rtt_ms=self.link.profile.mean_rtt_ms,
            trees=trees,
        )

    @property
    def committed(self) -> tuple[int, ...]:
        """Every token that reached the device, prompt included."""
        return self._session.buffer.committed

    def begin(self, now_ms: float) -> None:
        """The opening frame has left; the draft model reads the prompt meanwhile."""
        self._free_ms = now_ms + self.device.prefill_ms_per_token * self.output.prompt_tokens
        if self.controller is not None and self.stream:
            self.next_ms = self._free_ms

    def on_commit(self, now_ms: float, answer: _Answer) -> None:
        """A commit reached the device."""
        commit, verify_ms, load_level = answer
        record, session = self.record, self._session
        if record.tokens == 0:
            record.first_ms = now_ms
        record.tokens += len(commit.tokens)
        record.last_ms = now_ms
        controller = self.controller
        if controller is not None:
            if not self.stream:
                self._catch_up(now_ms)
            elif self.next_ms <= now_ms:
                self.advance(now_ms)
            effect = session.on_commit(
                now_ms,
                commit.committed_len,
                commit.tokens,
                commit.accepted,
                commit.drafted,
                commit.queue_ms + verify_ms,
            )
            assert effect is not None  # links keep frames in order
            if effect.rollback_to is not None:
                self.output.rollback(effect.rollback_to)
            if effect.extend:
                self.output.extend(effect.extend)
            session.load_level = load_level
            self.sim.count_effect(effect)
        else:
            session.buffer.on_commit(commit.committed_len, commit.tokens)
        if commit.finished:
            record.done = True
            self.next_ms = math.inf
            self.sim.ended(now_ms, self)
        elif controller is not None:
            if self.stream:
                self._stream_on(now_ms)
            else:
                self._round(now_ms)

    # --- round mode ---

    def _round(self, now_ms: float) -> None:
        """Draft the next round and send it. Nothing can arrive before it has left."""
        session = self._session
        frame = session.next_frame(now_ms)
        while frame is None:
            running = self._running
            if running is not None:
                self._running = None
                now_ms = running[0]
                self._end_step(running)
                frame = session.next_frame(now_ms)
            else:
                now_ms = max(now_ms, self._free_ms)
                if not session.may_draft(now_ms):
                    return
                if session.buffer.tree is not None:
                    self._running = self._begin_step(now_ms)
                else:
                    now_ms, frame = self._draft_round(now_ms)
        self._free_ms = max(now_ms, self._free_ms)
        self.sim.send_round(now_ms, self, frame, session.sent(frame, now_ms))

    def _draft_round(self, now_ms: float) -> tuple[float, Outgoing]:
        """Draft step after draft step until the round is due; returns when that is, and the round."""
        device, position = self.device, self._session.buffer.length
        drafted, draft = self._session.drafted, self.output.draft
        counters = self.sim.counters
        drafting_ms, steps = counters.drafting_ms, 0
        resuming_ms = device.resuming_ms(now_ms - self._free_ms)
        frame: Outgoing | None = None
        while frame is None:
            cost_ms = device.step_ms(position) + resuming_ms
            resuming_ms = 0.0
            now_ms += cost_ms
            drafting_ms += cost_ms
            position += 1
            steps += 1
            token = draft()
            if token.token < 0:
                self._nothing_to_draft()
                frame = self._session.next_frame(now_ms)
            else:
                frame = drafted(token, cost_ms, now_ms)
        counters.drafted += steps
        counters.drafting_ms = drafting_ms
        return now_ms, frame

    def _catch_up(self, now_ms: float) -> None:
        """Work out what was drafted while the round was out and the server computed, up to now."""
        running, self._running = self._running, None
        while True:
            if running is None:
                if self._free_ms >= now_ms or not self._session.may_draft(self._free_ms):
                    return
                running = self._begin_step(self._free_ms)
            if running[0] > now_ms:
                self._running = running
                return
            self._end_step(running)
            running = None

    # --- stream mode ---

    def advance(self, until_ms: float) -> None:
        """Work out what it has done up to and with ``until_ms``."""
        while self.next_ms <= until_ms:
            now_ms, step, session = self.next_ms, self._running, self._session
            # Only the first of its steps can have been overtaken: no commit comes while this runs.
            grows = session.buffer.tree is not None or self._found is not None
            if step is None or grows or session.step_overtaken or not session.scheduler.may_draft():
                self.next_ms, self._running = math.inf, None
                if step is not None:
                    self._end_step(step)
                step = self._stream_on(now_ms)
            if step is not None and step[0] <= until_ms and self._found is None:
                self._draft_on(step, until_ms)

    def _draft_on(self, step: _Step, until_ms: float) -> None:
        """Draft step after draft step up to and with ``until_ms``; ``step`` is the first of them."""
        session, device, counters = self._session, self.device, self.sim.counters
        drafted, draft, may_draft = session.drafted, self.output.draft, session.scheduler.may_draft
        send, link, outbox = self.sim.send, self.link, self.outbox
        now_ms, cost_ms = step
        position = session.buffer.length
        drafting_ms, steps = counters.drafting_ms, 0
        constant_cost = not (device.draft_ms_per_ktoken or device.resume_ms or device.steps_ms)
        slowdown = device.server_slowdown
        while now_ms <= until_ms:
            token = draft()
            if token.token < 0:
                self._nothing_to_draft()
                frame = session.next_frame(now_ms)
            else:
                frame = drafted(token, cost_ms, now_ms)
            if frame is not None or token.token < 0:
                if frame is not None:
                    outbox.append((send(now_ms, link, len(frame.tokens)), frame))
                if not may_draft():
                    self._free_ms, self.next_ms = now_ms, math.inf
                    self._running = None
                    break
            position += 1
            if not constant_cost:
                cost_ms = device.step_ms(position) * slowdown
            now_ms += cost_ms
            steps += 1
            drafting_ms += cost_ms
        else:
            session.begin_step()
            self._free_ms = self.next_ms = now_ms
            self._running = now_ms, cost_ms
        counters.drafted += steps
        counters.drafting_ms = drafting_ms

    def _stream_on(self, now_ms: float) -> _Step | None:
        """A step ended, a commit came, or the draft model is ready: send what is due and draft on.

        Returns the step that runs now."""
        session = self._session
        frame = session.next_frame(now_ms)
        if frame is not None:
            self.outbox.append((self.sim.send(now_ms, self.link, len(frame.tokens)), frame))
        if self._running is None and now_ms >= self._free_ms and session.may_draft(now_ms):
            self._running = step = self._begin_step(now_ms)
            self.next_ms = step[0]
        return self._running

    # --- both modes ---

    def _begin_step(self, now_ms: float) -> _Step:
        """Begin a step while the server computes: a round is out, or drafting is asynchronous."""
        session, nodes = self._session, 1
        context = session.buffer.length
        if (step := session.begin_step()) is not None:
            output, nodes = self.output, len(step.nodes)
            if output.length > context:
                output.rollback(context)
            self._found = output.expand(step.tree, step.nodes, len(output.candidates[0]), context)
        cost_ms = self.device.forward_ms(context, nodes) * self.device.server_slowdown
        if self.device.resume_ms:
            cost_ms += self.device.resuming_ms(now_ms - self._free_ms)
        self._free_ms = done_ms = now_ms + cost_ms
        counters = self.sim.counters
        counters.drafted += nodes
        counters.drafting_ms += cost_ms
        return done_ms, cost_ms

    def _end_step(self, step: _Step) -> None:
        session, found = self._session, self._found
        if found is not None:
            self._found = None
            session.grow_tree(found, step[1])
            return
        if not session.step_overtaken and self.output.proposes_nothing():
            self._nothing_to_draft(drafted=False)
            return
        wasted_ms = session.end_step(self.output.draft, step[1])
        if wasted_ms is not None:
            self.sim.count_wasted(wasted_ms, 1)

    def _nothing_to_draft(self, drafted: bool = True) -> None:
        """The drafter has no proposal until the text goes on; ``drafted``: it was asked already."""
        if drafted:
            self.output.rollback(self.output.length - 1)
        self._session.scheduler.nothing_to_draft()
