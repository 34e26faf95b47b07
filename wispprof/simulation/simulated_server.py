"""The simulated server: admits sessions by KV memory, runs the batching policy if the engine is idle.

Sessions (:class:`~wispprof.sessions.session_state.SessionState`) and policies are the runtime's own. The
engine only takes time: the estimate of the batch shape times a residual.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING

from wispprof.policies.cost_model import load_level, slowdown
from wispprof.policies.interface import BatchPolicy, Limits, SessionView, StepPlan
from wispprof.sessions.draft_buffer import Outgoing
from wispprof.sessions.plan_ahead import expected_view, lead_ms, may_plan_ahead
from wispprof.sessions.session_state import SessionState
from wispprof.simulation.arrivals import BLOCK_TOKENS, Request
from wispprof.simulation.checked_plan import PolicyViolation, checked_plan
from wispprof.simulation.devices import COMMIT_BYTES, TOKEN_BYTES
from wispprof.simulation.scenario import ServerModel
from wispprof.simulation.step_costs import KvOffload, PrefixBlocks, SimulatedStepTimes, WithoutPrefixCache
from wispprof.types import Sampling, StepInput, StepTimeEstimator

if TYPE_CHECKING:
    from wispprof.simulation.event_loop import Simulation
    from wispprof.simulation.simulated_edge import SimulatedEdge

_UNLIMITED = 1 << 40
_LEVEL_EVERY = 16
_INSTANT_MS = 1e-6


class SimulatedServer:
    """One engine and its loop, driven by events."""

    def __init__(self, sim: Simulation, model: ServerModel, policy: BatchPolicy, rng: Random) -> None:
        self._sim = sim
        self._model = model
        self._policy = policy
        self._estimator: StepTimeEstimator = (
            model.estimator if sim.system.prefix_cache else WithoutPrefixCache(model.estimator)
        )
        self._times = SimulatedStepTimes(self._estimator, model.spread, rng)
        self._overhead_ms = max(model.overhead_ms, _INSTANT_MS)
        self._sessions: dict[str, SessionState] = {}
        self._edges: dict[str, SimulatedEdge] = {}
        self._streaming: dict[str, SimulatedEdge] = {}  # those of them that draft ahead in stream mode
        self._queue: deque[SimulatedEdge] = deque()
        self._reserved = 0
        self._kv_used = 0
        self._kv_tokens = model.kv_tokens if model.kv_tokens is not None else _UNLIMITED
        self._offload: KvOffload | None = None
        if model.host_kv_ms is not None:
            # With host memory every session is admitted; GPU memory limits a single step.
            self._offload = KvOffload(self._kv_tokens)
            self._kv_tokens = _UNLIMITED
        self._draft_lengths: dict[tuple[int, int], int] = {}
        self._preempted: set[str] = set()
        self._prefixes = PrefixBlocks(model.prefix_tokens)
        self._busy = False
        self._ahead: StepPlan | None = None  # of the next step, made while one runs
        self._wake = 0
        self._level = 0
        self._steps = 0
        # The least time per token: a step of one session that commits all drafts it may hold.
        single_ms = self._estimator.start().add(1, 0).p50_ms
        self._floor_ms = single_ms / (1 + sim.system.drafting.draft_ahead)

    # --- frames arrive ---

    def open(self, now_ms: float, edge: SimulatedEdge) -> None:
        """An opening frame arrived. Sessions are admitted in order of arrival, by the KV of their whole
        generation."""
        need = edge.output.prompt_tokens + edge.record.output_tokens
        if need > min(self._model.kv_tokens or _UNLIMITED, self._model.max_context):
            edge.record.refused = True
            self._sim.ended(now_ms, edge)
            return
        self._queue.append(edge)
        self._admit(now_ms)
        self._decide(now_ms)

    def draft(self, now_ms: float, sent: tuple[SimulatedEdge, Outgoing, float]) -> None:
        """A round arrived."""
        edge, frame, slack_ms = sent
        session = self._sessions.get(edge.key)
        if session is None:
            return
        epoch, base, tokens, probs, draft_ms, parents = frame
        session.merge(epoch, base, tokens, probs, now_ms, slack_ms, draft_ms, parents)
        if not self._busy:
            self._decide(now_ms)

    def _collect(self, now_ms: float) -> None:
        """Merge every frame that asynchronous edges sent and that has arrived by now."""
        sessions = self._sessions
        for key, edge in self._streaming.items():
            if edge.next_ms <= now_ms:
                edge.advance(now_ms)
            outbox = edge.outbox
            if outbox and outbox[0][0] <= now_ms:
                merge = sessions[key].merge
                while outbox and outbox[0][0] <= now_ms:
                    arrived_ms, (epoch, base, tokens, probs, draft_ms, parents) = outbox.popleft()
                    merge(epoch, base, tokens, probs, arrived_ms, math.inf, draft_ms, parents)

    def _admit(self, now_ms: float) -> None:
        model = self._model
        while self._queue:
            edge = self._queue[0]
            need = edge.output.prompt_tokens + edge.record.output_tokens
            if model.preempt:
                if self._preempted:
                    return
                if self._kv_used + edge.output.prompt_tokens + len(self._sessions) + 1 > self._kv_tokens:
                    return
            elif self._reserved + need > self._kv_tokens:
                return
            self._queue.popleft()
            self._reserved += need
            edge.record.admitted_ms = now_ms
            self._edges[edge.key] = edge
            if edge.stream and edge.controller is not None:
                self._streaming[edge.key] = edge
                # Frames before the admission are lost; after the first commit their drafts come again.
                edge.advance(now_ms)
                while edge.outbox and edge.outbox[0][0] < now_ms:
                    edge.outbox.popleft()
            self._sessions[edge.key] = SessionState(
                edge.key,
                edge.output.prompt,
                slo=edge.record.slo,
                max_new=edge.record.output_tokens,
                max_context=model.max_context + 1,
                # The SLO counts from the request, not from the admission.
                now_ms=edge.record.arrival_ms,
                stream=edge.stream,
                undrafted=edge.controller is None,
                max_pending_drafts=self._sim.system.drafting.draft_ahead,
                floor_ms=self._floor_ms,
                cached=self._reused(edge.request),
            )
            self._kv_used += self._sessions[edge.key].cached

    def _reused(self, request: Request) -> int:
        """Leading prompt tokens that need no prefill. At least one token is left to feed."""
        if not self._sim.system.prefix_cache:
            return 0
        held = max(request.reused, BLOCK_TOKENS * self._prefixes.take(request.blocks))
        reused = min(held, request.prompt_tokens - 1, self._kv_tokens - self._kv_used - 1)
        self._sim.counters.reused_tokens += reused
        return max(0, reused)

    def _preempt(self) -> None:
        """Resume preempted sessions whose tokens fit again; free what the next tokens of the others need,
        from the session admitted last on."""
        free = self._kv_tokens - self._kv_used - len(self._sessions)
        for key in list(self._preempted):
            free -= self._sessions[key].committed_len
            if free < 0:
                break
            self._preempted.discard(key)
        for session in reversed(list(self._sessions.values())):
            if self._kv_used + len(self._sessions) <= self._kv_tokens:
                return
            if session.cached:
                self._kv_used -= session.cached
                session.evicted()
                self._preempted.add(session.session)
                self._sim.counters.preemptions += 1

    def _draft(self, now_ms: float) -> None:
        """Server-side speculation: the server's draft model proposes for every decoding session."""
        decoding = [s for s in self._sessions.values() if not s.prompt_left]
        k = self._draft_length(decoding)
        for session in decoding:
            if k and not session.pending_drafts:
                output = self._edges[session.session].output
                output.open(session.tokens, Sampling())
                tokens = [output.draft().token for _ in range(min(k, session.tokens_left - 1))]
                # Epochs rise with every commit, so that a round replaces what was left of the last.
                committed = session.committed_len
                session.merge(committed, committed, tokens, [1.0] * len(tokens), now_ms, math.inf, 0.0)

    def _draft_length(self, decoding: list[SessionState]) -> int:
        if not decoding:
            return 0
        cached = sum(s.cached for s in decoding) // len(decoding)
        key = len(decoding), cached.bit_length()
        if key not in self._draft_lengths:
            self._draft_lengths[key] = self._model.draft.best_k(self._estimator, key[0], cached)
        return self._draft_lengths[key]

    # --- the engine loop ---

    def _decide(self, now_ms: float) -> None:
        if self._busy or not self._sessions:
            return
        self._wake += 1
        self._collect(now_ms)
        if self._model.preempt:
            self._preempt()
        if self._sim.system.server_drafts:
            self._draft(now_ms)
        views = [session.view(now_ms) for session in self._sessions.values()]
        plan = self._plan(now_ms, views, self._kv_tokens - self._kv_used)
        if plan.items:
            self._step(now_ms, plan)
            return
        if plan.wake_ms is not None:
            self._sim.schedule(max(plan.wake_ms, now_ms + 1e-3), self._on_wake, self._wake)
        for edge in self._streaming.values():
            self._wait_for_frame(edge)

    def _plan(self, now_ms: float, views: list[SessionView], kv_free: int) -> StepPlan:
        model = self._model
        if self._preempted:
            views = [view for view in views if view.session not in self._preempted]
        limits = Limits(model.max_items, model.max_tokens, model.prefill_chunk, kv_free)
        return checked_plan(self._policy, now_ms, views, self._estimator, limits)

    def _plan_ahead(self, now_ms: float, running: tuple[float, int]) -> None:
        """Plan the next step from what is expected at the end of the running one."""
        end_ms, rows = running
        self._collect(now_ms)
        sessions = self._sessions.values()
        views = list(filter(None, [expected_view(session, now_ms, end_ms) for session in sessions]))
        kv_free = self._kv_tokens - self._kv_used - rows
        # If memory is short, the end of the step decides who runs.
        if kv_free > sum(view.prompt_left or 1 for view in views):
            self._ahead = self._plan(end_ms, views, kv_free)

    def _planned_ahead(self) -> StepPlan | None:
        """The next step as planned, cut to what its sessions have now; ``None`` if it must be planned now."""
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return None
        items = []
        for planned in ahead.items:
            session = self._sessions.get(planned.session)
            item = session.fitted(planned) if session is not None and session.ready else None
            if item is not None:
                items.append(item)
        return replace(ahead, items=tuple(items)) if items else None

    def _wait_for_frame(self, edge: SimulatedEdge) -> None:
        """While the engine is idle, the arrival of an edge's next frame is an event."""
        when = edge.outbox[0][0] if edge.outbox else edge.next_ms
        if when < math.inf:
            self._sim.schedule(when, self._on_idle_frame, (self._wake, edge))

    def _on_idle_frame(self, now_ms: float, who: tuple[int, SimulatedEdge]) -> None:
        wake, edge = who
        if wake != self._wake:
            return
        edge.advance(now_ms)
        if edge.outbox and edge.outbox[0][0] <= now_ms:
            self._decide(now_ms)
        else:
            self._wait_for_frame(edge)

    def _on_wake(self, now_ms: float, wake: int) -> None:
        if wake == self._wake:
            self._decide(now_ms)

    def _step(self, now_ms: float, plan: StepPlan) -> None:
        items: list[tuple[int, int, bool]] = []
        inputs: list[StepInput] = []
        sessions = self._sessions
        rows = prefill = 0
        for item in plan.items:
            session = sessions.get(item.session)
            if session is None or session.in_flight:
                raise PolicyViolation(f"{self._policy.name} planned {item.session} twice, or it is none.")
            cached, chunk = session.cached, item.prefill
            step_input = session.step_input(item, now_ms)
            new = len(step_input.tokens)
            items.append((new, cached, chunk > 0))
            inputs.append(step_input)
            rows += new
            prefill += chunk
        p50_ms, took_ms, early_ms = self._times.sample(items)
        if server_drafts := self._sim.system.server_drafts:
            drafts = max(step_input.drafts for step_input in inputs)
            took_ms += self._model.draft.added_ms(drafts, len(inputs))
        host_ms = self._model.host_kv_ms
        if self._offload is not None and host_ms is not None:
            used = ((f.session, c, n) for f, (n, c, _) in zip(inputs, items, strict=True))
            took_ms += host_ms * self._offload.take(used)
        self._busy = True
        self._steps += 1
        counters = self._sim.counters
        counters.steps += 1
        counters.step_ms += took_ms
        counters.predicted_ms += p50_ms
        counters.rows += rows
        counters.prefill_rows += prefill
        states = [sessions[step_input.session] for step_input in inputs]
        if self._model.plan_ahead and not server_drafts and may_plan_ahead(states):
            plan_ms = now_ms + max(0.0, early_ms - lead_ms(states, early_ms, self._overhead_ms))
            if plan_ms < now_ms + took_ms:
                self._sim.schedule(plan_ms, self._plan_ahead, (now_ms + p50_ms, rows))
        self._sim.schedule(now_ms + took_ms, self._done, (inputs, took_ms, now_ms))

    def _done(self, now_ms: float, ran: tuple[list[StepInput], float, float]) -> None:
        inputs, took_ms, began_ms = ran
        self._collect(now_ms)
        sim, sessions, edges = self._sim, self._sessions, self._edges
        counters, schedule, level = sim.counters, sim.schedule, self._level
        # Commits leave halfway through the overhead between two steps.
        leaves_ms = now_ms + self._overhead_ms / 2.0
        counters.busy_ms += now_ms - max(began_ms, sim.counted_from_ms)
        if self._steps % _LEVEL_EVERY == 1:
            level = self._update_load_level()
        finished: list[str] = []
        queue_ms, kv_used = counters.queue_ms, self._kv_used
        committed = rounds = verified = accepted = down_bytes = 0
        for step_input in inputs:
            key = step_input.session
            session, edge = sessions[key], edges[key]
            before = session.cached
            commit = session.apply(edge.output.verify(step_input, len(session.tokens)), now_ms)
            kv_used += session.cached - before
            count = len(commit.tokens)
            if not count:
                continue
            committed += count
            if not commit.first:
                rounds += 1
                verified += commit.drafted
                accepted += commit.accepted
                queue_ms += commit.queue_ms
            size = COMMIT_BYTES + TOKEN_BYTES * count
            down_bytes += size
            schedule(edge.link.down(leaves_ms, size), edge.on_commit, (commit, took_ms, level))
            if commit.finished:
                kv_used -= session.cached
                finished.append(key)
        self._kv_used = kv_used
        counters.committed += committed
        counters.rounds += rounds
        counters.verified += verified
        counters.accepted += accepted
        counters.queue_ms = queue_ms
        counters.down_bytes += down_bytes
        for key in finished:
            edge = edges.pop(key)
            del sessions[key]
            self._streaming.pop(key, None)
            if self._offload is not None:
                self._offload.drop(key)
            self._reserved -= edge.output.prompt_tokens + edge.record.output_tokens
            self._prefixes.put(edge.request.blocks)
        if finished:
            self._admit(now_ms)
        schedule(now_ms + self._overhead_ms, self._free, None)

    def _free(self, now_ms: float, _: None) -> None:
        self._busy = False
        self._collect(now_ms)
        plan = self._planned_ahead()
        if plan is not None:
            self._step(now_ms, plan)
        else:
            self._decide(now_ms)

    def _update_load_level(self) -> int:
        cached = [s.cached for s in self._sessions.values() if not s.prompt_left]
        self._level = load_level(slowdown(self._estimator, cached), self._level)
        return self._level

    @property
    def kv_used(self) -> int:
        """Cache tokens held now."""
        return self._kv_used

    def check_integrity(self) -> None:
        """Check that used and reserved KV are sums over sessions. Raises ``AssertionError``."""
        if self._busy:
            return
        assert self._kv_used == sum(s.cached for s in self._sessions.values())
        assert self._reserved == sum(
            e.output.prompt_tokens + e.record.output_tokens for e in self._edges.values()
        )
        assert self._kv_used <= self._kv_tokens
