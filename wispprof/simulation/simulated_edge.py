"""The edge's side of one simulated generation: draft, send, wait, take in commits.

What it decides comes from the runtime's own controllers and bookkeeping: ``DraftBuffer``, ``DraftScheduler`` and
``EdgeTiming`` of :mod:`wispprof.sessions`. What is added here is time: a draft step costs what the device
profile says, a frame takes what the link says, and a step that has begun is finished (nothing interrupts
a forward), whatever commit arrives meanwhile.

Few events. In round mode nothing can arrive while a round is drafted, so it is worked out at once; and
what is drafted while it is out is worked out when its commit comes. In stream mode only two things see what
an edge has done meanwhile: a commit that reaches it, and a server that decides; both let it catch up first
(:meth:`SimulatedEdge.advance`), and frames wait in its ``outbox`` until the server looks.
"""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING

from wispprof.policies.api import Controller, RoundContext
from wispprof.sessions.commit_result import CommitResult
from wispprof.sessions.draft_buffer import DraftBuffer, Outgoing
from wispprof.sessions.draft_scheduler import DraftingSettings, DraftScheduler
from wispprof.sessions.edge_timing import EdgeTiming
from wispprof.simulation.devices import DeviceProfile, Link
from wispprof.simulation.metrics import SessionRecord
from wispprof.simulation.simulated_output import SimulatedOutput

if TYPE_CHECKING:
    from wispprof.simulation.event_loop import Simulation

__all__ = ["SimulatedEdge"]


# What the server sends: a commit, how long its step took, and the load level.
_Answer = tuple[CommitResult, float, int]
# A draft step that runs: when it ends, what it costs, the position it drafts for, and the epoch.
_Step = tuple[float, float, int, int]


class SimulatedEdge:
    """One generation on one device. ``controller`` ``None``: it never drafts.

    Stream mode: ``next_ms``, when it next has something to do by itself (``inf``: nothing before a commit);
    ``outbox``: frames that have left, with the time of their arrival at the server, in order.
    """

    __slots__ = (
        "_free_ms",
        "_load_level",
        "_rtt_ms",
        "_running",
        "_scheduler",
        "_sim",
        "_timing",
        "controller",
        "device",
        "key",
        "link",
        "next_ms",
        "outbox",
        "output",
        "path",
        "record",
        "stream",
    )

    def __init__(
        self,
        sim: Simulation,
        key: str,
        record: SessionRecord,
        device: DeviceProfile,
        link: Link,
        output: SimulatedOutput,
        controller: Controller | None,
        stream: bool,
        drafting: DraftingSettings,
    ) -> None:
        self._sim = sim
        self.key = key
        self.record = record
        self.device = device
        self.link = link
        self.output = output
        self.controller = controller
        self.stream = stream
        prompt = output.prompt
        self.path = DraftBuffer(
            prompt,
            stream=stream,
            draft_ahead_limit=drafting.draft_ahead,
            end=len(prompt) + record.output_tokens,
        )
        self._scheduler = DraftScheduler(self.path, controller, drafting)
        self._timing = EdgeTiming(record.slo, drafting.carry)
        self._rtt_ms = link.profile.mean_rtt_ms
        self._load_level = 0
        self._running: _Step | None = None
        self._free_ms = 0.0
        self.next_ms = math.inf
        self.outbox: deque[tuple[float, Outgoing]] = deque()

    # --- life ---

    def begin(self, now_ms: float) -> None:
        """The opening frame has left; the draft model reads the prompt meanwhile."""
        self._free_ms = now_ms + self.device.prefill_ms_per_token * self.output.prompt_tokens
        if self.controller is not None and self.stream:
            self.next_ms = self._free_ms

    def on_commit(self, now_ms: float, answer: _Answer) -> None:
        """A commit reached the device: its tokens are shown, and drafts held against it."""
        commit, verify_ms, load_level = answer
        record, count = self.record, len(commit.tokens)
        if record.tokens == 0:
            record.first_ms = now_ms
        record.tokens += count
        record.last_ms = now_ms
        controller = self.controller
        if controller is not None:
            if not self.stream:
                self._catch_up(now_ms)
            elif self.next_ms <= now_ms:
                self.advance(now_ms)
        effect = self.path.on_commit(
            commit.committed_len, commit.tokens, commit.accepted, commit.drafted
        )
        if controller is not None:
            if effect.rollback_to is not None:
                self.output.rollback(effect.rollback_to)
            if effect.extend:
                self.output.extend(effect.extend)
            self._load_level = load_level
            self._timing.committed(now_ms, commit.queue_ms + verify_ms, count)
            self._scheduler.committed(effect, commit.drafted)
            self._sim.effect(effect)
        if commit.finished:
            record.done = True
            self.next_ms = math.inf
            self._sim.ended(now_ms, self)
        elif controller is None:
            pass
        elif self.stream:
            self._streams(now_ms)
        else:
            self._round(now_ms)

    # --- round mode ---

    def _round(self, now_ms: float) -> None:
        """Draft the next round and send it. Nothing can arrive before it has left."""
        scheduler = self._scheduler
        at = now_ms
        out = scheduler.due(self._context)
        while out is None:
            running = self._running
            if running is not None:
                self._running = None
                at = running[0]
                self._absorb(running)
                out = scheduler.due(self._context)
            else:
                at = max(at, self._free_ms)
                if not self._may_draft(at):
                    return
                at, out = self._draft_round(at)
        self._free_ms = max(at, self._free_ms)
        self._send(at, out)

    def _draft_round(self, at_ms: float) -> tuple[float, Outgoing]:
        """Draft step after draft step until the round is due; when that is, and the round."""
        device, position = self.device, self.path.length
        rounded, draft, context = self._scheduler.rounded, self.output.draft, self._context
        drafted, counters = self._timing.drafted, self._sim.counters
        drafting_ms, steps = counters.drafting_ms, 0
        resuming_ms = device.resuming_ms(at_ms - self._free_ms)
        out: Outgoing | None = None
        while out is None:
            cost_ms = device.step_ms(position) + resuming_ms
            resuming_ms = 0.0
            at_ms += cost_ms
            drafting_ms += cost_ms
            position += 1
            steps += 1
            drafted(cost_ms)
            out = rounded(draft(), cost_ms, context)
        counters.drafted += steps
        counters.drafting_ms = drafting_ms
        return at_ms, out

    def _catch_up(self, now_ms: float) -> None:
        """What was drafted ahead while the round was out, up to now."""
        running, self._running = self._running, None
        while True:
            if running is None:
                if self._free_ms >= now_ms or not self._may_draft(self._free_ms):
                    return
                running = self._begin_step(self._free_ms)
            if running[0] > now_ms:
                self._running = running
                return
            self._absorb(running)
            running = None

    # --- stream mode ---

    def advance(self, until_ms: float) -> None:
        """Work out what it has done up to and with ``until_ms``."""
        now_ms = self.next_ms
        if now_ms > until_ms:
            return
        step, path = self._running, self.path
        # Only the first of its steps can have been overtaken: no commit comes while this runs.
        if (
            step is None
            or path.epoch != step[3]
            or path.length != step[2]
            or not self._scheduler.may_draft()
        ):
            self.next_ms, self._running = math.inf, None
            if step is not None:
                self._absorb(step)
            step = self._streams(now_ms)
        if step is not None and step[0] <= until_ms:
            self._draft_on(step, until_ms)

    def _draft_on(self, step: _Step, until_ms: float) -> None:
        """Draft step after draft step up to and with ``until_ms``; ``step`` is the first of them."""
        scheduler, timing, device = self._scheduler, self._timing, self.device
        streamed, draft, context = scheduler.streamed, self.output.draft, self._context
        counters, rtt_ms = self._sim.counters, self._rtt_ms
        at_ms, cost_ms, position, epoch = step
        drafting_ms, steps = counters.drafting_ms, 0
        usual_ms = math.nan
        even = not device.draft_ms_per_ktoken and not device.resume_ms
        while at_ms <= until_ms:
            if cost_ms != usual_ms:  # else it teaches nothing
                timing.drafted(cost_ms)
                usual_ms, hold = timing.draft_ms, timing.holds(rtt_ms)
            out = streamed(draft(), cost_ms, context, hold(at_ms))
            if out is not None:
                arrives_ms = self._sim.sent(at_ms, self.link, len(out.tokens))
                self.outbox.append((arrives_ms, out))
                if not scheduler.may_draft():
                    self._free_ms, self.next_ms = at_ms, math.inf
                    self._running = None
                    break
            position += 1
            if not even:
                cost_ms = device.step_ms(position)
            at_ms += cost_ms
            steps += 1
            drafting_ms += cost_ms
        else:
            self._free_ms = self.next_ms = at_ms
            self._running = at_ms, cost_ms, position, epoch
        counters.drafted += steps
        counters.drafting_ms = drafting_ms

    def _streams(self, now_ms: float) -> _Step | None:
        """A step ended, a commit came, or the draft model is ready: send what is due, draft on. Returns the
        step that runs now."""
        scheduler = self._scheduler
        # Where nothing is unsent there is nothing to hold.
        hold = self.path.unsent > 0 and self._timing.may_hold(now_ms, self._rtt_ms)
        out = scheduler.due(self._context, hold)
        if out is not None:
            # A stream's deadlines are the server's to know: no slack goes with its frames.
            self.outbox.append((self._sim.sent(now_ms, self.link, len(out.tokens)), out))
        if self._running is None and now_ms >= self._free_ms and scheduler.may_draft():
            self._running = step = self._begin_step(now_ms)
            self.next_ms = step[0]
        return self._running

    # --- both ---

    def _may_draft(self, at_ms: float) -> bool:
        left_ms = self._timing.left_ms(at_ms, self._rtt_ms)
        return self._scheduler.may_draft(left_ms, self._timing.draft_ms)

    def _begin_step(self, at_ms: float) -> _Step:
        path = self.path
        position = path.length
        cost = self.device.step_ms(position)
        if self.device.resume_ms:
            cost += self.device.resuming_ms(at_ms - self._free_ms)
        self._free_ms = done_ms = at_ms + cost
        counters = self._sim.counters
        counters.drafted += 1
        counters.drafting_ms += cost
        return done_ms, cost, position, path.epoch

    def _absorb(self, step: _Step) -> None:
        """A step ended: hold its token, unless its place has been decided meanwhile."""
        path = self.path
        _, cost_ms, position, epoch = step
        self._timing.drafted(cost_ms)
        if path.epoch != epoch or path.length != position:
            self._sim.wasted(cost_ms if path.epoch != epoch else 0.0, 1)
            return
        drafted = self.output.draft()
        path.propose(drafted.token, 1.0, cost_ms)
        self._scheduler.drafted(drafted)

    def _send(self, now_ms: float, out: Outgoing) -> None:
        slack_ms = self._timing.slack_ms(out.acceptance_prob, now_ms, self._rtt_ms)
        self._timing.sent(now_ms)
        self._sim.send_draft(now_ms, self, out, slack_ms)

    def _context(self, draft_ahead: int) -> RoundContext:
        return self._timing.context(self._rtt_ms, self._load_level, draft_ahead)
