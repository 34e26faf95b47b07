"""The step loop: collect, plan, verify, commit.

It is the only one that reads or changes ledgers besides the front's merge, and both run on the event
loop, so nothing here is locked. The engine works in its own thread meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from wispprof.artifacts.plan import BatchRow
from wispprof.errors import OutOfKvMemory
from wispprof.policies import BatchPolicy, StepPlan, make_batch_policy
from wispprof.server.engine_thread import EngineWorker
from wispprof.server.metrics import Metrics, StepRecord
from wispprof.server.session import ServerSession
from wispprof.server.session_manager import SessionManager
from wispprof.server.step_limits import StepLimits
from wispprof.server.step_log import StepLog
from wispprof.server.step_time_tracker import StepTimeTracker
from wispprof.types import BatchShape, StepInput, VerifyResult

__all__ = ["EngineLoop"]

log = logging.getLogger("wispprof.server")

IDLE_MS = 1_000.0
"""An idle loop wakes that often, to sweep what has expired and to check the engine's books once."""


_DRIFT_EVERY = 32


class EngineLoop:
    """Drives the engine. ``limits`` says what a step may not exceed at the present load."""

    def __init__(
        self,
        manager: SessionManager,
        worker: EngineWorker,
        policy: BatchPolicy,
        clock: StepTimeTracker,
        metrics: Metrics,
        limits: StepLimits,
        now_ms: Callable[[], float],
    ) -> None:
        self.step_log: StepLog | None = None
        self._manager = manager
        self._worker = worker
        self._policy = policy
        self._simple = make_batch_policy("server-only")
        self._policy_faults: set[str] = set()
        self._clock = clock
        self._metrics = metrics
        self._limits = limits
        self._now_ms = now_ms
        self._wake_event = asyncio.Event()
        self._stopping = False
        self._checked = True
        self._margin = 0
        self._row: BatchRow | None = None
        self._audits: list[asyncio.Future[None]] = []
        self._cycle: tuple[float, StepRecord] | None = None
        self._begun_ms = 0.0
        self.rejected_plans = 0
        self.failed_steps = 0

    def wake(self) -> None:
        """Something changed: a frame, a request, a session that left."""
        self._wake_event.set()

    def stop(self) -> None:
        self._stopping = True
        self._wake_event.set()

    async def run(self) -> None:
        """Step until stopped; a step under way is finished and committed."""
        while not self._stopping:
            self._wake_event.clear()
            runnable = await self.begin_step()
            await self._audit()
            plan = self.plan(runnable)
            if not plan.members:
                self._cycle = None
                await self._rest(plan)
                continue
            self._note_cycle()
            members, inputs = self._step_inputs(plan)
            if inputs:
                await self.verify(plan, members, inputs)
                # What gathered meanwhile is merged before the next step is decided on.
                await asyncio.sleep(0)
        await self._manager.begin_step(self._now_ms())
        await self._audit()

    async def begin_step(self) -> dict[str, ServerSession]:
        """Let come and go who wants to, and seat whom memory holds."""
        return await self._manager.begin_step(self._now_ms(), margin=self._margin)

    def plan(self, runnable: dict[str, ServerSession]) -> StepPlan:
        """Ask the policy who advances now."""
        now = self._now_ms()
        views = [session.state.view(now) for session in runnable.values()]
        kv_free = max(0, self._worker.engine.kv_free - self._margin)
        limits, self._row = self._limits.at(kv_free)
        try:
            return self._policy.plan(now, views, self._clock.estimator, limits)
        except Exception as err:
            # A policy's defect costs this step its drafts, never the server its life.
            self._policy_failed(err)
        return self._simple.plan(now, views, self._clock.estimator, limits)

    def _policy_failed(self, err: Exception) -> None:
        kind = type(err).__name__
        self._metrics.policy_faults.labels(kind).inc()
        if kind in self._policy_faults:
            return
        self._policy_faults.add(kind)
        log.error(
            "policy %s failed (%s); such steps serve everybody undrafted, and this is logged once",
            self._policy.name,
            kind,
            exc_info=err,
        )

    async def verify(
        self, plan: StepPlan, members: list[ServerSession], inputs: Sequence[StepInput]
    ) -> None:
        """One engine step over the planned members; then commit."""
        shape = BatchShape.of(
            (len(feed.tokens), session.state.cached, bool(session.state.prompt_left))
            for feed, session in zip(inputs, members, strict=True)
        )
        try:
            results, actual_ms = await self._worker.step(inputs)
        except OutOfKvMemory:
            self._out_of_memory(members, shape)
            return
        except Exception:
            self.failed_steps += 1
            log.exception("engine step failed")
            self._manager.failed_step(members)
            return
        self._margin = 0
        self._checked = False
        committed = self.commit(members, results, actual_ms)
        self._note(plan, shape, actual_ms, committed)

    def commit(
        self, members: list[ServerSession], results: Sequence[VerifyResult], actual_ms: float
    ) -> int:
        """Book every outcome and tell its owner; returns the tokens committed."""
        now = self._now_ms()
        committed = 0
        for session, outcome in zip(members, results, strict=True):
            done = session.state.apply(outcome, now)
            committed += len(done.tokens)
            self._manager.committed(session, done, now, actual_ms)
        return committed

    def _step_inputs(self, plan: StepPlan) -> tuple[list[ServerSession], list[StepInput]]:
        now = self._now_ms()
        members: list[ServerSession] = []
        inputs: list[StepInput] = []
        for member in plan.members:
            session = self._manager.get(member.session)
            try:
                if session is None:
                    raise ValueError(f"{member.session} is not a session")
                inputs.append(session.state.feed(member, now))
                members.append(session)
            except ValueError:
                # A policy's defect must not take the server down: the others still advance.
                self.rejected_plans += 1
                log.exception("policy %s planned the impossible", self._policy.name)
        return members, inputs

    def _note(self, plan: StepPlan, shape: BatchShape, actual_ms: float, committed: int) -> None:
        p50, bound = plan.p50_ms, plan.bound_ms
        if p50 <= 0 or len(shape.items) != len(plan.members):
            p50, bound = self._clock.estimator.predict(shape)
        self._clock.observe(shape, p50, actual_ms)
        if self.step_log is not None:
            self.step_log.note(shape, actual_ms, p50, self._row)
        record = StepRecord(
            self._now_ms(),
            len(shape.items),
            shape.new_tokens,
            shape.prefill_tokens,
            p50,
            bound,
            actual_ms,
            committed,
            plan.reason,
            "" if self._row is None else self._row.cell,
        )
        self._metrics.step(record, self._row)
        self._cycle = (self._begun_ms, record)
        if record.prefill_tokens:
            share = record.prefill_tokens / record.new_tokens
            self._clock.prefilled(record.at_ms, share * actual_ms)
        self._metrics.drift.set(self._clock.ratio)
        if self._clock.steps % _DRIFT_EVERY == 0:
            self._metrics.drifted(self._clock.drift)

    def _note_cycle(self) -> None:
        """Called where a step begins: the one before it, if nothing was idle between, has ended."""
        now = self._now_ms()
        if self._cycle is not None:
            begun, record = self._cycle
            self._clock.cycle(now - begun, record.predicted_ms)
        self._cycle = None
        self._begun_ms = now

    def _out_of_memory(self, members: list[ServerSession], shape: BatchShape) -> None:
        """The engine's pages are coarser than tokens: try again with less, then with less still."""
        for session in members:
            session.state.cancel()
        free = self._worker.engine.kv_free
        if len(members) == 1 and self._margin >= free:
            self._manager.fail(members[0], "limit", "The KV cache cannot hold this session.")
            self._margin = 0
            return
        self._margin = min(free, max(64, 2 * self._margin, shape.new_tokens // 2 + self._margin))
        log.warning("out of KV memory at %d new tokens; margin %d", shape.new_tokens, self._margin)

    async def audit(self) -> None:
        """Have all books compared between two steps; raises what the comparison raises."""
        asked: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._audits.append(asked)
        self.wake()
        await asked

    async def _audit(self) -> None:
        asked, self._audits = self._audits, []
        if not asked:
            return
        try:
            await self._manager.check_integrity(full=True)
        except Exception as err:
            for one in asked:
                one.set_exception(err)
        else:
            for one in asked:
                one.set_result(None)

    async def _rest(self, plan: StepPlan) -> None:
        """Sleep until something changes, the policy wants to be asked, or it is time to tidy up."""
        wait_ms = IDLE_MS
        if plan.wake_ms is not None:
            wait_ms = min(wait_ms, max(0.0, plan.wake_ms - self._now_ms()))
        try:
            await asyncio.wait_for(self._wake_event.wait(), wait_ms / 1000.0)
        except TimeoutError:
            if plan.wake_ms is None and not self._checked:
                await self._manager.check_integrity(full=False)
                self._checked = True
