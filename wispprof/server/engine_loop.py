"""The engine loop: collect, plan, verify, commit.

While a step runs, the policy plans the next one from what it expects of this one's result
(:mod:`~wispprof.sessions.plan_ahead`). When the step is done, the engine's thread cuts the planned items to
what was really accepted and begins the next step, without a word to the event loop
(:mod:`~wispprof.server.running_step`). Session states follow, and commits leave, while that step runs.

The loop runs on the event loop, as the merging of drafts does, so session states need no locks.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from wispprof.artifacts.plan import BatchRow
from wispprof.errors import EngineLost, OutOfKvMemory
from wispprof.policies import BatchPolicy, StepPlan, make_batch_policy
from wispprof.policies.interface import SessionView
from wispprof.server.engine_thread import EngineThread, finish_operations
from wispprof.server.failed_steps import FailedSteps
from wispprof.server.metrics import Metrics
from wispprof.server.running_step import PreparedStep, RunningStep
from wispprof.server.session import ServerSession
from wispprof.server.session_manager import SessionManager
from wispprof.server.step_limits import StepLimits
from wispprof.server.step_log import StepLog
from wispprof.server.step_recorder import EndedStep, StepRecorder
from wispprof.server.step_time_tracker import StepTimeTracker
from wispprof.sessions.plan_ahead import lead_ms, may_plan_ahead
from wispprof.sessions.session_state import CommitResult, SessionState
from wispprof.types import BatchShape, StepInput, VerifyResult

log = logging.getLogger("wispprof.server")

IDLE_MS = 1_000.0
"""Longest sleep of an idle loop, which then removes expired sessions and audits the engine once."""

_LEAD_MS = 0.5
"""A plan is ready so long before its step can begin, besides twice the time that planning takes."""


class EngineLoop:
    """Drives the engine, step by step. ``plan_ahead``: plan a step while the one before it runs."""

    def __init__(
        self,
        manager: SessionManager,
        engine_thread: EngineThread,
        policy: BatchPolicy,
        step_times: StepTimeTracker,
        metrics: Metrics,
        limits: StepLimits,
        now_ms: Callable[[], float],
        plan_ahead: bool = True,
    ) -> None:
        self._manager = manager
        self._engine_thread = engine_thread
        self._policy = policy
        self._fallback_policy = make_batch_policy("server-only")
        self._policy_errors: set[str] = set()
        self._step_times = step_times
        self._metrics = metrics
        self._recorder = StepRecorder(step_times, metrics)
        self._limits = limits
        self._now_ms = now_ms
        self._plans_ahead = plan_ahead
        self._plan_ms = 0.0
        self._wake_event = asyncio.Event()
        self._stopping = False
        self._audited = True
        self._kv_margin = 0
        self._audit_requests: list[asyncio.Future[None]] = []
        self._ended: EndedStep | None = None
        self._prepared: PreparedStep | None = None
        self._failed = FailedSteps(manager, engine_thread, metrics, self._commit_part)
        self.rejected_plans = 0

    @property
    def failed_steps(self) -> int:
        """Steps that raised."""
        return self._failed.count

    @property
    def step_log(self) -> StepLog | None:
        """Where the shape and time of every step go."""
        return self._recorder.step_log

    @step_log.setter
    def step_log(self, step_log: StepLog | None) -> None:
        self._recorder.step_log = step_log

    def wake(self) -> None:
        """A frame or request arrived, or a session ended."""
        self._wake_event.set()

    def drafts_arrived(self, session: ServerSession) -> None:
        """A draft frame was merged."""
        if session.planned and self._prepared is not None:
            self._prepared.renew(session)
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
            plan, row = self.plan(runnable)
            step = self._begin(plan, row)
            if not plan.items:
                self._keep_books()
                await self._sleep(plan)
            while step is not None:
                self._after_begin(step)
                step = await self._finish(step)
        self._keep_books()
        await self._manager.begin_step(self._now_ms())
        await self._serve_audits()

    # --- planning -----------------------------------------------------------------------------

    def plan(self, runnable: dict[str, ServerSession]) -> tuple[StepPlan, BatchRow | None]:
        """What goes into a step that starts now, and the plan's row that limits it."""
        now = self._now_ms()
        views = [session.state.view(now) for session in runnable.values()]
        return self._ask_policy(now, views, self._engine_thread.engine.kv_free - self._kv_margin)

    def _plan_ahead(self, step: RunningStep) -> None:
        """Prepare the step after this one, from what is expected at its end."""
        if self._stopping or self._audit_requests or step.results.done():
            return
        begun_ms = self._now_ms()
        end_ms = max(begun_ms, step.started_ms + self._step_times.ratio * step.p50_ms)
        margin = self._kv_margin + step.shape.new_tokens
        expected = self._manager.expected(begun_ms, end_ms, margin)
        if expected is not None:
            plan, row = self._ask_policy(end_ms, *expected)
            if plan.items:
                step.prepared = self._prepare(plan, row)
        # The slowest of late, so that plans are ready in time.
        self._plan_ms = max(self._now_ms() - begun_ms, 0.95 * self._plan_ms)

    def _prepare(self, plan: StepPlan, row: BatchRow | None) -> PreparedStep:
        thread = self._engine_thread
        results = asyncio.get_running_loop().create_future()
        prepared = PreparedStep(plan, row, results, thread.take_deferred(), thread, self._now_ms)
        for item in plan.items:
            session = self._manager.get(item.session)
            if session is not None and not session.closing:
                prepared.add(session, item)
        self._prepared = prepared
        return prepared

    def _release_prepared(self, step: RunningStep) -> None:
        """The step after this one has begun, or will not: close who left meanwhile."""
        self._prepared, prepared = None, step.prepared
        if prepared is None:
            return
        if not prepared.taken:
            self._engine_thread.defer_again(prepared.ops)
        for session in prepared.sessions:
            session.planned = False
            if session.closing:
                self._manager.release(session, self._now_ms(), session.closing)

    def _ask_policy(
        self, at_ms: float, views: list[SessionView], kv_free: int
    ) -> tuple[StepPlan, BatchRow | None]:
        """The policy's plan; server-only if it raises."""
        limits, row = self._limits.get(max(0, kv_free))
        estimator = self._step_times.estimator
        try:
            return self._policy.plan(at_ms, views, estimator, limits), row
        except Exception as err:
            self._policy_failed(err)
        return self._fallback_policy.plan(at_ms, views, estimator, limits), row

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

    # --- a step -------------------------------------------------------------------------------

    def _begin(self, plan: StepPlan, row: BatchRow | None) -> RunningStep | None:
        """Begin a step in the engine's thread; ``None`` if no item of its plan can take part."""
        now = self._now_ms()
        sessions: list[ServerSession] = []
        inputs: list[StepInput] = []
        for item in plan.items:
            session = self._manager.get(item.session)
            try:
                if session is None:
                    raise ValueError(f"{item.session} is not a session")
                inputs.append(session.state.step_input(item, now))
                sessions.append(session)
            except ValueError:
                # The policy's defect; the other sessions still advance.
                self.rejected_plans += 1
                log.exception("policy %s planned an invalid item", self._policy.name)
        if not inputs:
            return None
        results = asyncio.get_running_loop().create_future()
        step = RunningStep(plan, row, sessions, inputs, now, results)
        self._engine_thread.begin(step)
        return step

    def _after_begin(self, step: RunningStep) -> None:
        """What the step before left to do, now that the engine computes; and when to plan the next."""
        self._keep_books(step.started_ms)
        step.shape = shape = BatchShape.of(
            (len(one.tokens), session.state.cached, bool(session.state.prompt_left))
            for one, session in zip(step.inputs, step.sessions, strict=True)
        )
        step.p50_ms, step.bound_ms = self._step_times.estimator.predict(shape)

    async def _finish(self, step: RunningStep) -> RunningStep | None:
        """Wait for a step, then commit. Returns the step that has followed at once, if any."""
        states = [session.state for session in step.sessions]
        ahead = self._plans_ahead and may_plan_ahead(states)
        timer = self._schedule_plan(step, states) if ahead else None
        try:
            results, actual_ms = await step.results
        except OutOfKvMemory:
            self._out_of_memory(step.sessions, step.shape)
            self._release_prepared(step)
            return None
        except Exception as err:
            self._release_prepared(step)
            await self._failed.recover(err, step.sessions, step.inputs)
            return None
        finally:
            if timer is not None:
                timer.cancel()
        now_ms, following = self._now_ms(), step.following
        commits, failed = self._advance(step.sessions, results, now_ms)
        if step.prepared is not None and step.prepared.taken:
            finish_operations(step.prepared.ops)
        if following is not None:
            for session, step_input in zip(following.sessions, following.inputs, strict=True):
                if not session.state.finished:
                    session.state.begin(step_input, following.started_ms)
        committed = self._commit(commits, failed, now_ms, actual_ms)
        self._release_prepared(step)
        self._kv_margin = 0
        self._ended = EndedStep(
            step.plan.reason,
            step.shape,
            step.row,
            step.started_ms,
            now_ms,
            actual_ms,
            step.p50_ms,
            step.bound_ms,
            committed,
        )
        return following

    def _schedule_plan(self, step: RunningStep, states: list[SessionState]) -> asyncio.TimerHandle:
        """Plan as late as possible, because every acceptance and frame known by then is worth knowing."""
        early_ms = self._step_times.early_ratio * step.p50_ms
        ahead_ms = lead_ms(states, early_ms, 2.0 * self._plan_ms + _LEAD_MS)
        delay_ms = step.started_ms + early_ms - ahead_ms - self._now_ms()
        return asyncio.get_running_loop().call_later(max(0.0, delay_ms) / 1000.0, self._plan_ahead, step)

    def _commit(
        self,
        commits: list[tuple[ServerSession, CommitResult]],
        failed: list[ServerSession],
        now_ms: float,
        actual_ms: float,
    ) -> int:
        """Returns the number of tokens committed. They are delivered later."""
        self._audited = False
        committed = 0
        for session, commit in commits:
            committed += len(commit.tokens)
            try:
                self._manager.committed(session, commit, now_ms, actual_ms)
            except Exception:
                log.exception("the commit of a session failed")
                failed.append(session)
        for session in failed:
            self._manager.end_failed(session)
        return committed

    def _advance(
        self, sessions: list[ServerSession], results: Sequence[VerifyResult], now_ms: float
    ) -> tuple[list[tuple[ServerSession, CommitResult]], list[ServerSession]]:
        """Take the results into the sessions' states; returns what they commit, and the sessions that
        cannot."""
        commits, failed = [], []
        for session, result in zip(sessions, results, strict=True):
            if session.state.in_flight:  # or it was ended during the step
                try:
                    commits.append((session, session.state.apply(result, now_ms)))
                except Exception:
                    # One session's defect: the others' results are good.
                    log.exception("the result of a session does not fit it")
                    failed.append(session)
        return commits, failed

    def _commit_part(
        self, sessions: list[ServerSession], results: Sequence[VerifyResult], actual_ms: float
    ) -> None:
        now_ms = self._now_ms()
        self._commit(*self._advance(sessions, results, now_ms), now_ms, actual_ms)

    def _keep_books(self, next_ms: float | None = None) -> None:
        """Deliver the commits of the step before, and record it. ``next_ms``: the start of the step that
        followed at once."""
        ended, self._ended = self._ended, None
        self._manager.deliver()
        if ended is not None:
            self._recorder.record(ended, next_ms)
        self._manager.measure_load(self._now_ms())

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

    # --- between two steps --------------------------------------------------------------------

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
