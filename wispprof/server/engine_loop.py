"""The engine loop: collect, plan, verify, commit. What no step depends on waits until the next has begun.

It runs on the event loop, as the merging of drafts does, so session states need no locks. The engine
works in its own thread.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

from wispprof.artifacts.plan import BatchRow, Plan
from wispprof.errors import EngineError, EngineLost, InputRefused, OutOfKvMemory
from wispprof.policies import BatchPolicy, Limits, StepPlan, make_batch_policy
from wispprof.server.engine_thread import EngineThread
from wispprof.server.metrics import Metrics, StepRecord
from wispprof.server.session import ServerSession
from wispprof.server.session_manager import SessionManager
from wispprof.server.step_log import StepLog
from wispprof.server.step_time_tracker import StepTimeTracker
from wispprof.settings.server_settings import ServerSettings
from wispprof.types import BatchShape, StepInput, VerifyResult

log = logging.getLogger("wispprof.server")

IDLE_MS = 1_000.0
"""Longest sleep of an idle loop, which then removes expired sessions and audits the engine once."""

_DRIFT_EVERY_STEPS = 32


class StepLimits:
    """What a step may hold: the settings, tightened by the plan's row for the fastest SLO class that
    is open, the load level, and the sessions' mean context (a step's KV reads follow the mean)."""

    def __init__(self, settings: ServerSettings, plan: Plan | None, manager: SessionManager) -> None:
        self._plan = plan
        self._settings = settings
        self._manager = manager
        self._rows: dict[tuple[float, int, int], BatchRow] = {}

    @property
    def row(self) -> BatchRow | None:
        """The plan's row in force; ``None`` without a plan."""
        if self._plan is None:
            return None
        states = [one.state for one in self._manager.sessions]
        speed = max((state.slo.tokens_per_s for state in states), default=1.0)
        mean = sum(state.committed_len for state in states) // len(states) if states else None
        key = (speed, self._manager.load_level, self._plan.nearest_context(mean))
        if key not in self._rows:
            self._rows[key] = self._plan.batch_row(*key)
        return self._rows[key]

    def get(self, kv_free: int) -> tuple[Limits, BatchRow | None]:
        """The limits of a step that starts now, and the plan's row they follow."""
        settings, row = self._settings, self.row
        items, tokens, chunk = settings.max_items, settings.max_tokens, settings.prefill_chunk
        if row is not None:
            items = max(1, min(items, row.max_items))
            tokens = max(1, min(tokens, row.token_budget))
            chunk = max(1, min(chunk, row.prefill_chunk))
        return Limits(items, tokens, chunk, kv_free), row


class _EndedStep(NamedTuple):
    """A step that is committed but not recorded yet; ``row``: the plan's row that limited it."""

    plan: StepPlan
    shape: BatchShape
    row: BatchRow | None
    started_ms: float
    at_ms: float
    actual_ms: float
    committed: int


class EngineLoop:
    """Drives the engine, step by step."""

    def __init__(
        self,
        manager: SessionManager,
        engine_thread: EngineThread,
        policy: BatchPolicy,
        step_times: StepTimeTracker,
        metrics: Metrics,
        limits: StepLimits,
        now_ms: Callable[[], float],
    ) -> None:
        self.step_log: StepLog | None = None
        self._manager = manager
        self._engine_thread = engine_thread
        self._policy = policy
        self._fallback_policy = make_batch_policy("server-only")
        self._policy_errors: set[str] = set()
        self._step_times = step_times
        self._metrics = metrics
        self._limits = limits
        self._now_ms = now_ms
        self._wake_event = asyncio.Event()
        self._stopping = False
        self._audited = True
        self._kv_margin = 0
        self._row: BatchRow | None = None
        self._audit_requests: list[asyncio.Future[None]] = []
        self._ended: _EndedStep | None = None
        self.rejected_plans = 0
        self.failed_steps = 0

    def wake(self) -> None:
        """A frame or request arrived, or a session ended."""
        self._wake_event.set()

    def stop(self) -> None:
        self._stopping = True
        self._wake_event.set()

    async def run(self) -> None:
        """Step until stopped; the step under way is finished and committed."""
        while not self._stopping:
            self._wake_event.clear()
            runnable = await self._manager.begin_step(self._now_ms(), self._kv_margin)
            await self._serve_audits()
            plan = self.plan(runnable)
            if not plan.items:
                self._keep_books()
                await self._sleep(plan)
                continue
            sessions, inputs = self._step_inputs(plan)
            if inputs:
                await self.verify(plan, sessions, inputs)
        self._keep_books()
        await self._manager.begin_step(self._now_ms())
        await self._serve_audits()

    def plan(self, runnable: dict[str, ServerSession]) -> StepPlan:
        """What the policy puts into the next step; server-only if the policy raises."""
        now = self._now_ms()
        views = [session.state.view(now) for session in runnable.values()]
        kv_free = max(0, self._engine_thread.engine.kv_free - self._kv_margin)
        limits, self._row = self._limits.get(kv_free)
        estimator = self._step_times.estimator
        try:
            return self._policy.plan(now, views, estimator, limits)
        except Exception as err:
            self._policy_failed(err)
        return self._fallback_policy.plan(now, views, estimator, limits)

    def _policy_failed(self, err: Exception) -> None:
        kind = type(err).__name__
        self._metrics.policy_errors.labels(kind).inc()
        if kind not in self._policy_errors:
            self._policy_errors.add(kind)
            log.error(
                "policy %s raised %s; such steps serve all sessions without drafts (logged once)",
                self._policy.name,
                kind,
                exc_info=err,
            )

    async def verify(
        self, plan: StepPlan, sessions: list[ServerSession], inputs: Sequence[StepInput]
    ) -> None:
        """One engine step over the planned sessions, then commit. While the engine computes, what the step
        before has left to do is done."""
        step = self._engine_thread.step(inputs)
        started_ms, row = self._now_ms(), self._row
        shape = BatchShape.of(
            (len(one.tokens), session.state.cached, bool(session.state.prompt_left))
            for one, session in zip(inputs, sessions, strict=True)
        )
        self._keep_books(started_ms)
        try:
            results, actual_ms = await step
        except OutOfKvMemory:
            self._out_of_memory(sessions, shape)
            return
        except Exception as err:
            await self._step_failed(err, sessions, inputs)
            return
        self._kv_margin = 0
        self._audited = False
        now_ms = self._now_ms()
        committed = self.commit(sessions, results, now_ms, actual_ms)
        self._ended = _EndedStep(plan, shape, row, started_ms, now_ms, actual_ms, committed)

    def _keep_books(self, next_ms: float | None = None) -> None:
        """Deliver the commits of the step before, and record it. ``next_ms``: the start of the step that
        followed at once."""
        ended, self._ended = self._ended, None
        self._manager.deliver()
        if ended is not None:
            self._record(ended, next_ms)
        self._manager.measure_load(self._now_ms())

    def commit(
        self,
        sessions: list[ServerSession],
        results: Sequence[VerifyResult],
        now_ms: float,
        actual_ms: float,
    ) -> int:
        """Apply every result; returns the number of tokens committed. They are delivered later."""
        committed = 0
        for session, result in zip(sessions, results, strict=True):
            try:
                commit = session.state.apply(result, now_ms)
                committed += len(commit.tokens)
                self._manager.committed(session, commit, now_ms, actual_ms)
            except Exception:
                # One session's defect: the others' results are good.
                log.exception("the commit of a session failed")
                self._manager.end_failed(session)
        return committed

    async def _step_failed(
        self, err: Exception, sessions: list[ServerSession], inputs: Sequence[StepInput]
    ) -> None:
        """End the session that made the step fail. The others lose nothing: they advance here, or in the
        next step. Raises :class:`EngineError` if the engine is lost."""
        self.failed_steps += 1
        self._metrics.failed_steps.inc()
        log.error("engine step of %d inputs failed", len(inputs), exc_info=err)
        if isinstance(err, EngineLost):
            await self._manager.reload()
            return
        if isinstance(err, InputRefused):
            for session in sessions:
                session.state.cancel()
            at_fault = [session for session in sessions if session.name == err.session]
            for session in at_fault:
                self._manager.end_failed(session)
            if at_fault:
                return
        if not isinstance(err, EngineError):
            await self._manager.restore(sessions)
        if len(sessions) == 1:
            self._manager.end_failed(sessions[0])
            if not isinstance(err, EngineError):
                await self._manager.probe()
            return
        middle = len(sessions) // 2
        for part in (slice(None, middle), slice(middle, None)):
            if all(session.state.in_flight for session in sessions[part]):
                await self._verify_part(sessions[part], inputs[part])

    async def _verify_part(self, sessions: list[ServerSession], inputs: Sequence[StepInput]) -> None:
        """Half of a step that failed, as a step of its own."""
        try:
            results, actual_ms = await self._engine_thread.step(inputs)
        except OutOfKvMemory:
            for session in sessions:
                session.state.cancel()
        except Exception as err:
            await self._step_failed(err, sessions, inputs)
        else:
            self._audited = False
            self.commit(sessions, results, self._now_ms(), actual_ms)

    def _step_inputs(self, plan: StepPlan) -> tuple[list[ServerSession], list[StepInput]]:
        now = self._now_ms()
        sessions: list[ServerSession] = []
        inputs: list[StepInput] = []
        for member in plan.items:
            session = self._manager.get(member.session)
            try:
                if session is None:
                    raise ValueError(f"{member.session} is not a session")
                inputs.append(session.state.step_input(member, now))
                sessions.append(session)
            except ValueError:
                # The policy's defect; the other sessions still advance.
                self.rejected_plans += 1
                log.exception("policy %s planned an invalid item", self._policy.name)
        return sessions, inputs

    def _record(self, ended: _EndedStep, next_ms: float | None) -> None:
        plan, shape, row, started_ms, at_ms, actual_ms, committed = ended
        p50, bound = plan.p50_ms, plan.bound_ms
        if p50 <= 0 or len(shape.items) != len(plan.items):
            p50, bound = self._step_times.estimator.predict(shape)
        self._step_times.observe(shape, p50, actual_ms)
        if next_ms is not None:
            self._step_times.cycle(next_ms - started_ms, p50)
        if self.step_log is not None:
            self.step_log.append(shape, actual_ms, p50, row)
        record = StepRecord(
            at_ms,
            len(shape.items),
            shape.new_tokens,
            shape.prefill_tokens,
            p50,
            bound,
            actual_ms,
            committed,
            plan.reason,
            "" if row is None else row.cell,
        )
        self._metrics.step(record, row)
        if record.prefill_tokens:
            share = record.prefill_tokens / record.new_tokens
            self._step_times.prefilled(record.at_ms, share * actual_ms)
        self._metrics.drift.set(self._step_times.ratio)
        if self._step_times.steps % _DRIFT_EVERY_STEPS == 0:
            self._metrics.drifted(self._step_times.drift)

    def _out_of_memory(self, sessions: list[ServerSession], shape: BatchShape) -> None:
        """KV blocks are coarser than tokens: keep a margin of free tokens, doubled until a step fits."""
        for session in sessions:
            session.state.cancel()
        free, margin = self._engine_thread.engine.kv_free, self._kv_margin
        if len(sessions) == 1 and margin >= free:
            self._manager.fail(sessions[0], "limit", "The KV cache cannot hold this session.")
            self._kv_margin = 0
            return
        self._kv_margin = min(free, max(64, 2 * margin, shape.new_tokens // 2 + margin))
        log.warning("out of KV memory at %d new tokens; margin %d", shape.new_tokens, self._kv_margin)

    async def audit(self) -> None:
        """Check engine against sessions between two steps; raises :class:`EngineError`."""
        request: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._audit_requests.append(request)
        self.wake()
        await request

    async def _serve_audits(self) -> None:
        requests, self._audit_requests = self._audit_requests, []
        if not requests:
            return
        try:
            await self._manager.check_integrity(full=True)
        except Exception as err:
            for request in requests:
                request.set_exception(err)
        else:
            for request in requests:
                request.set_result(None)

    async def _sleep(self, plan: StepPlan) -> None:
        """Sleep until woken, until the policy wants to plan again, or for :data:`IDLE_MS`."""
        wait_ms = IDLE_MS
        if plan.wake_ms is not None:
            wait_ms = min(wait_ms, max(0.0, plan.wake_ms - self._now_ms()))
        try:
            await asyncio.wait_for(self._wake_event.wait(), wait_ms / 1000.0)
        except TimeoutError:
            if plan.wake_ms is None and not self._audited:
                try:
                    await self._manager.check_integrity(full=False)
                except EngineLost:
                    await self._manager.reload()
                self._audited = True
