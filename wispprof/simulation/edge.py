"""The edge's side of one simulated generation: draft, send, wait, take in commits.

It runs the runtime's own bookkeeping (:class:`~wispprof.sessions.path.EdgePath`) and controllers. What it
adds is time: a draft step costs what the device profile says, a frame takes what the link says. A forward
that has begun is finished (nothing interrupts a kernel), whatever commit arrives meanwhile.

Few events: the tokens of a chunk are worked out when it begins, with the moment each is finished, and a
commit that arrives in between takes only those into account that were finished by then. Proactive drafts of
round mode need no event at all: they are worked out when the commit comes.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from wispprof.core import DraftFeatures, Slo
from wispprof.policies.api import Controller, RoundContext
from wispprof.sessions.ledger import Committed
from wispprof.sessions.path import EdgePath
from wispprof.simulation.acceptance import Script
from wispprof.simulation.devices import DeviceProfile
from wispprof.simulation.links import Link
from wispprof.simulation.metrics import SessionRecord

if TYPE_CHECKING:
    from wispprof.simulation.engine import Simulation

__all__ = ["Answer", "Edge"]

_SMOOTH = 0.25


class Answer(NamedTuple):
    """What the server sends with a commit."""

    commit: Committed
    verify_ms: float
    load_level: int


class _Step(NamedTuple):
    """A draft token under way: when its forward is finished, and what it is."""

    done_ms: float
    token: int
    survival: float
    cost_ms: float
    features: DraftFeatures


class Edge:
    """One generation on one device. ``controller`` ``None``: it never drafts."""

    __slots__ = (
        "_busy_until",
        "_chunk",
        "_depth",
        "_features",
        "_go_on",
        "_left",
        "_ready_ms",
        "_rejected",
        "_server_ms",
        "_sim",
        "_turn",
        "_waiting_from",
        "controller",
        "device",
        "key",
        "link",
        "load_level",
        "path",
        "record",
        "script",
        "slo",
        "stream",
    )

    def __init__(
        self,
        sim: Simulation,
        key: str,
        record: SessionRecord,
        device: DeviceProfile,
        link: Link,
        script: Script,
        controller: Controller | None,
        stream: bool,
        lead_limit: int,
    ) -> None:
        self._sim = sim
        self.key = key
        self.record = record
        self.slo: Slo = record.slo
        self.device = device
        self.link = link
        self.script = script
        self.controller = controller
        self.stream = stream
        self.load_level = 0
        prompt = script.prompt
        self.path = EdgePath(
            prompt, stream=stream, lead_limit=lead_limit, end=len(prompt) + record.output_tokens
        )
        self._server_ms = 0.0
        self._turn = 0
        self._chunk: deque[_Step] = deque()
        self._busy_until = 0.0
        self._ready_ms = 0.0
        self._depth = self._left = 0
        self._features: list[DraftFeatures] = []
        self._waiting_from = -1.0
        # What the controller said of the last draft, and whether the last commit contradicted one.
        self._go_on = self._rejected = False

    # --- life ---

    def begin(self, now_ms: float) -> None:
        """The request was made; the opening frame has left. The draft model reads the prompt meanwhile."""
        self._ready_ms = now_ms + self.device.prefill_ms_per_token * self.script.prompt_tokens
        self._busy_until = self._ready_ms
        if self.controller is None:
            return
        if self.stream:
            self._sim.at(self._ready_ms, self._stretch, self._turn)
        elif self._sim.system.proactive:
            self._waiting_from = self._ready_ms

    def on_commit(self, now_ms: float, answer: Answer) -> None:
        """A commit reached the device: its tokens are shown, and drafts held against it."""
        commit, verify_ms, load_level = answer
        record = self.record
        if record.tokens == 0:
            record.first_ms = now_ms
        record.tokens += len(commit.tokens)
        record.last_ms = now_ms
        spent = commit.queue_ms + verify_ms
        self._server_ms += _SMOOTH * (spent - self._server_ms) if self._server_ms else spent
        self.load_level = load_level
        if self.controller is None:
            self.path.on_commit(commit.frontier, commit.tokens, commit.accepted)
        elif self.stream:
            self._streamed(now_ms, commit)
        else:
            self._answered(now_ms, commit)
        if commit.finished:
            self._turn += 1
            self._chunk.clear()
            record.done = True
            self._sim.ended(now_ms, self)

    # --- round mode ---

    def _answered(self, now_ms: float, commit: Committed) -> None:
        controller = self.controller
        assert controller is not None
        at = max(now_ms, self._ready_ms)
        if self._waiting_from >= 0:
            at = max(at, self._proactive(now_ms))
        first = commit.first
        kept = self._hold(commit)
        if not first:
            controller.finish(commit.drafted, commit.accepted)
        if not commit.finished:
            self._round(at, kept)

    def _round(self, now_ms: float, kept: int) -> None:
        """Draft one round on top of ``kept`` proactive drafts, and send it when it is ready."""
        controller, path = self.controller, self.path
        assert controller is not None
        most = min(controller.begin(self._context(0)), kept + path.room)
        depth = 0
        more = most > 0
        while more and depth < kept:
            # Tokens drafted ahead are judged like any other, they only cost nothing now.
            more = controller.go_on(depth, self._features[depth])
            depth += 1
        at = now_ms
        while more and depth < most:
            step = self._draft(at, depth)
            at = step.done_ms
            more = self._go_on
            self._keep(step)
            depth += 1
        if at > now_ms:
            self._sim.at(at, self._send_round, self._turn)
        else:
            self._send_round(now_ms, self._turn)

    def _send_round(self, now_ms: float, turn: int) -> None:
        if turn != self._turn:
            return
        frame = self.path.take()
        assert frame is not None
        expected = alive = 1.0
        for survival in frame.survival:
            alive *= survival
            expected += alive
        self._sim.send_draft(now_ms, self, frame, self._slack_ms(now_ms, expected))
        if self._sim.system.proactive:
            self._waiting_from = now_ms

    def _proactive(self, now_ms: float) -> float:
        """Draft on while the round is out: what was done by now. Returns when the device is free."""
        at, self._waiting_from = self._waiting_from, -1.0
        ahead = self._sim.system.proactive
        while ahead > 0 and at < now_ms and self.path.room > 0:
            step = self._draft(at, len(self._features))
            at = step.done_ms
            self._keep(step)
            ahead -= 1
        return at

    def _slack_ms(self, now_ms: float, expected: float) -> float:
        """What is left for the server before the round's answer would be late: the tokens that it is
        expected to bring, at the promised speed, less the way there and back (systems.md, WISP 3)."""
        record = self.record
        if record.tokens == 0:
            return float("inf")
        due = record.first_ms + (record.tokens - 1 + expected) * self.slo.tpot_ms
        return due - now_ms - self.link.profile.rtt_ms

    # --- stream mode ---

    def _stretch(self, now_ms: float, turn: int) -> None:
        """Ask the controller how far to draft from here, and begin."""
        if turn != self._turn or self._chunk:
            return
        controller, path = self.controller, self.path
        assert controller is not None
        room = path.room
        if room <= 0:
            return
        self._left = min(room, controller.begin(self._context(path.lead)))
        self._depth = 0
        if self._left > 0:
            self._next_chunk(max(now_ms, self._busy_until))

    def _next_chunk(self, now_ms: float) -> None:
        """The drafts of one frame: as many as the frame may hold, until the controller stops."""
        group = self._sim.system.frame_tokens(
            self.link.profile.rtt_ms, self.device.step_ms(self.script.length)
        )
        at = now_ms
        while self._left > 0 and group > 0:
            step = self._draft(at, self._depth)
            at = step.done_ms
            self._chunk.append(step)
            self._depth += 1
            self._left = self._left - 1 if self._go_on else 0
            group -= 1
        self._busy_until = at
        self._sim.at(at, self._chunk_done, self._turn)

    def _chunk_done(self, now_ms: float, turn: int) -> None:
        if turn != self._turn:
            return
        while self._chunk:
            self._keep(self._chunk.popleft())
        self._send_stream(now_ms)
        self._left = min(self._left, self.path.room)
        if self._left > 0:
            self._next_chunk(now_ms)
        else:
            self._stretch(now_ms, self._turn)

    def _send_stream(self, now_ms: float) -> None:
        frame = self.path.take()
        if frame is not None:
            self._sim.send_draft(now_ms, self, frame, float("inf"))

    def _streamed(self, now_ms: float, commit: Committed) -> None:
        chunk, path = self._chunk, self.path
        while chunk and chunk[0].done_ms <= now_ms:
            self._keep(chunk.popleft())
        under_way = chunk[0] if chunk else None
        if under_way is not None and commit.frontier > path.length:
            self._abandon(under_way)
        self._hold(commit)
        assert self.controller is not None
        if not commit.first:
            self.controller.finish(commit.drafted, commit.accepted)
        if commit.finished:
            return
        if chunk and self._rejected:
            self._abandon(chunk[0])
        if not chunk:
            if self._busy_until > now_ms:
                self._sim.at(self._busy_until, self._stretch, self._turn)
            else:
                self._stretch(now_ms, self._turn)

    def _abandon(self, under_way: _Step) -> None:
        """Nothing under way is wanted any more; the forward that runs now is finished for nothing."""
        self._turn += 1
        self._busy_until = under_way.done_ms
        self._sim.wasted(under_way.cost_ms, 1)
        # What was not begun was never drafted: it costs nothing.
        for step in list(self._chunk)[1:]:
            self._sim.drafted(-step.cost_ms, -1)
        self._chunk.clear()
        if self.script.length > self.path.length:
            self.script.rollback(self.path.length)

    # --- both ---

    def _draft(self, at_ms: float, depth: int) -> _Step:
        """One draft step that begins at ``at_ms``, judged by the controller."""
        token, features = self.script.draft()
        cost = self.device.step_ms(self.script.length)
        controller = self.controller
        assert controller is not None
        self._go_on = controller.go_on(depth, features)
        self._sim.drafted(cost)
        return _Step(at_ms + cost, token, controller.survival(), cost, features)

    def _keep(self, step: _Step) -> None:
        self.path.propose(step.token, step.survival, step.cost_ms)
        self._features.append(step.features)

    def _hold(self, commit: Committed) -> int:
        """Hold the path against a commit, and the drafter with it; returns the drafts that stand."""
        effect = self.path.on_commit(commit.frontier, commit.tokens, commit.accepted)
        if effect.rollback_to is not None:
            self.script.rollback(effect.rollback_to)
        if effect.extend:
            self.script.extend(effect.extend)
        self._rejected = effect.rejected
        kept = effect.kept
        self._features = self._features[-kept:] if kept else []
        self._sim.effect(effect)
        return kept

    def _context(self, lead: int) -> RoundContext:
        return RoundContext(
            draft_ms=self.device.step_ms(self.script.length),
            rtt_ms=self.link.profile.rtt_ms + 2 * self.link.profile.jitter_ms,
            server_ms=self._server_ms,
            load_level=self.load_level,
            lead=lead,
            slo=self.slo,
        )
