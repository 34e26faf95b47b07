"""The verification server: admits requests, merges drafts, runs the engine loop.

The fronts call this object through their :class:`~wispprof.server.engine_host.EngineHost`, on the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable

from wispprof import protocol
from wispprof.artifacts.plan import BatchRow, Plan
from wispprof.backends import Engine
from wispprof.errors import EngineError, RuntimeFault
from wispprof.openai_api import ChatTokenizer
from wispprof.policies import BatchPolicy, make_batch_policy
from wispprof.server.admission import Admission, Refused
from wispprof.server.engine_host import EngineHost
from wispprof.server.engine_loop import EngineLoop
from wispprof.server.engine_thread import EngineThread
from wispprof.server.metrics import Metrics
from wispprof.server.request_log import RequestLog
from wispprof.server.server_state import update_gauges
from wispprof.server.session import ServerSession, SessionListener
from wispprof.server.session_manager import SessionManager
from wispprof.server.step_limits import StepLimits
from wispprof.server.step_log import StepLog
from wispprof.server.step_time_tracker import StepTimeTracker, warmup_shapes
from wispprof.settings.server_settings import ServerSettings
from wispprof.types import BatchShape, GenerationRequest, Sampling, ServedModel, StepInput, StepTimeEstimator

log = logging.getLogger("wispprof.server")


def monotonic_ms() -> float:
    """This process's clock. Clocks of two machines are never compared."""
    return time.monotonic_ns() / 1e6


class VerificationServer:
    """One engine, one batching policy, many sessions.

    ``estimator``: a fitted one, or ``None`` to fit this server's own steps. ``plan``: its batching table
    limits the steps, besides the settings. ``tokenizer``: for the OpenAI API, which is off without it.
    ``reload``: loads an engine that is lost once more. ``owns_engine``: it is shut down with the server.
    ``run_id`` tells one run of a server from the next.
    """

    def __init__(
        self,
        engine: Engine,
        model: ServedModel,
        settings: ServerSettings,
        *,
        policy: BatchPolicy | None = None,
        estimator: StepTimeEstimator | None = None,
        plan: Plan | None = None,
        tokenizer: ChatTokenizer | None = None,
        reload: Callable[[], Engine] | None = None,
        owns_engine: bool = False,
        now_ms: Callable[[], float] = monotonic_ms,
    ) -> None:
        self.settings = settings
        self.model = model
        self.plan = plan
        self.tokenizer = tokenizer
        self.policy = policy or make_batch_policy(settings.policy, **settings.policy_options)
        self.metrics = Metrics()
        self.step_times = StepTimeTracker(estimator)
        self.now_ms = now_ms
        self._draining = False
        self.started = False
        self.failure = ""
        self.hosts: list[EngineHost] = []
        self.run_id = secrets.token_hex(4)
        self._engine_thread = EngineThread(engine)
        self._owns_engine = owns_engine
        self.manager = SessionManager(
            settings,
            self._engine_thread,
            self.step_times,
            self.metrics,
            model.max_context,
            self.policy.stream,
        )
        self._limits = StepLimits(settings, plan, self.manager)
        self.loop = EngineLoop(
            self.manager,
            self._engine_thread,
            self.policy,
            self.step_times,
            self.metrics,
            self._limits,
            now_ms,
            not settings.plan_late,
        )
        self.manager.wake = self.loop.wake
        self.manager.load_changed = self.update_fronts
        self.manager.load_engine = reload
        self.admission = Admission(settings, self.manager, self.step_times, model)
        self.manager.spend = self.admission.budget.spend
        self._task: asyncio.Task[None] | None = None

    def metrics_text(self) -> bytes:
        """What ``/metrics`` returns: the server's metrics, then the engine's own."""
        update_gauges(self)
        return self.metrics.text() + self._engine_thread.engine.metrics_text()

    # --- starting and stopping ----------------------------------------------------------------

    async def start(self) -> None:
        """Calibrate if there is no fitted estimator, then run the engine loop."""
        if self.step_times.learning:
            rows = await self._engine_thread.call(
                lambda engine: _calibrate(engine, self.model, self.settings.prefill_chunk)
            )
            self.step_times.learn(rows)
            log.info("no estimator given: calibrated on %d steps of this server", len(rows))
        if self.settings.step_log is not None:
            self.loop.step_log = StepLog(self.settings.step_log)
        if self.settings.request_log is not None:
            offset_ms = time.time() * 1000.0 - self.now_ms()
            self.manager.request_log = RequestLog(self.settings.request_log, lambda ms: ms + offset_ms)
        self._task = asyncio.create_task(self.loop.run(), name="engine loop")
        self._task.add_done_callback(self._loop_ended)
        self.started = True

    async def stop(self) -> None:
        """End the loop and release everything; raises the loop's exception, if it had one."""
        self.draining = True
        self.loop.stop()
        task, self._task = self._task, None
        try:
            if task is not None:
                await task
            self._fail_all("draining", "The server is shutting down.", 1_000.0)
            await self.manager.clear_prefix_cache()
        finally:
            self._engine_thread.stop()
            if self._owns_engine:
                await asyncio.to_thread(self._engine_thread.engine.shutdown)
            if self.loop.step_log is not None:
                await asyncio.to_thread(self.loop.step_log.close)
            if self.manager.request_log is not None:
                await asyncio.to_thread(self.manager.request_log.close)

    async def drain(self, timeout_ms: float) -> None:
        """Admit nothing new and let sessions finish; after ``timeout_ms`` fail those that are left."""
        self.draining = True
        deadline_ms = self.now_ms() + timeout_ms
        while len(self.manager) and self.now_ms() < deadline_ms:
            await asyncio.sleep(0.02)
        self._fail_all("draining", "The server is shutting down; resume on another server.")

    @property
    def draining(self) -> bool:
        """Whether nothing new is admitted any more."""
        return self._draining

    @draining.setter
    def draining(self, value: bool) -> None:
        self._draining = value
        self.update_fronts()

    def update_fronts(self) -> None:
        """Tell the fronts what has changed: draining, load level."""
        for host in self.hosts:
            host.update_status()

    @property
    def ready(self) -> bool:
        """Whether requests are admitted now."""
        return self.state == "ok"

    @property
    def state(self) -> str:
        """``starting``, ``ok``, ``draining`` or ``failed``; :attr:`failure` says why it failed."""
        if self.failure:
            return "failed"
        if self.draining:
            return "draining"
        return "ok" if self.started and self._task is not None else "starting"

    async def wait_loop_ended(self) -> None:
        """Until the engine loop has ended, by itself or by :meth:`stop`."""
        if self._task is not None:
            await asyncio.wait([self._task])

    def _loop_ended(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or (err := task.exception()) is None:
            return
        # Without its loop the server would look healthy and answer nobody.
        self.draining = True
        self.failure = str(err) or type(err).__name__
        log.critical("the engine loop failed", exc_info=err)
        self._fail_all("internal", "The server's engine failed; resume on another server, or later.", 1_000.0)

    def _fail_all(self, code: str, message: str, retry_ms: float = 0.0) -> None:
        for session in list(self.manager.sessions):
            self.manager.fail(session, code, message, retry_ms)

    # --- for the endpoints --------------------------------------------------------------------

    @property
    def batch_row(self) -> BatchRow | None:
        """The plan's row in force."""
        return self._limits.row

    @property
    def kv_free(self) -> int:
        """KV tokens not in use."""
        return self._engine_thread.engine.kv_free

    @property
    def trees(self) -> bool:
        """Whether the engine verifies draft trees."""
        return self._engine_thread.engine.capabilities.trees

    @property
    def dtype(self) -> str:
        """What the engine computes in; the setting if the engine does not say."""
        return self._engine_thread.engine.capabilities.dtype or self.settings.dtype

    def open(self, request: GenerationRequest, listener: SessionListener, number: int = 0) -> ServerSession:
        """Admit a request. Raises :class:`~wispprof.server.admission.Refused`."""
        try:
            request = self.admission.check(request, listener.key, self.now_ms(), self.draining)
        except Refused as err:
            self.metrics.refused.labels(err.code).inc()
            raise
        return self.manager.add(request, listener, number, self.now_ms())

    def draft(self, session: ServerSession, frame: protocol.Draft) -> None:
        """Merge a checked draft frame into its session."""
        now = self.now_ms()
        session.last_seen_ms = now
        session.state.merge(
            frame.epoch,
            frame.base,
            frame.tokens,
            [byte / 255.0 for byte in frame.acceptance_prob],
            now,
            frame.slack_ms,
            frame.draft_ms,
            protocol.parents_of(frame) if frame.parents else (),
        )
        self.loop.drafts_arrived(session)

    def close(self, session: ServerSession, reason: str = "abort") -> None:
        """The listener ends a session; ``reason`` is ``stop`` if it has all it wants."""
        self.manager.release(session, self.now_ms(), reason)

    async def check_integrity(self) -> None:
        """Full audit between two steps. Raises :class:`EngineError` if something leaked."""
        if self._task is None or self._task.done():
            raise RuntimeFault("Only a running server can be audited.", "Start it first.")
        await self.loop.audit()
        if self._engine_thread.failed_ops:
            raise EngineError(
                f"{self._engine_thread.failed_ops} deferred engine operations failed; see the log."
            )


def _calibrate(engine: Engine, model: ServedModel, prefill_chunk: int) -> list[tuple[BatchShape, float]]:
    """Time a few small shapes twice each on the idle engine; leaves no session behind."""
    rows: list[tuple[BatchShape, float]] = []
    for sessions, new, cached in warmup_shapes(prefill_chunk):
        if (new + cached) * sessions > engine.kv_free or new + cached > model.max_context:
            continue
        names = [f"calibration-{i}" for i in range(sessions)]
        for name in names:
            engine.open(name, Sampling(), [0] * (cached + new))
            if cached:
                engine.step([StepInput(name, [0] * cached, 0, False)])
        shape = BatchShape.uniform(sessions, new, cached)
        for _ in range(2):
            begin = time.perf_counter()
            drafts = min(new - 1, engine.capabilities.max_drafts)
            engine.step([StepInput(name, [0] * new, drafts, True) for name in names])
            rows.append((shape, (time.perf_counter() - begin) * 1000.0))
            for name in names:
                engine.rollback(name, cached)
        for name in names:
            engine.close(name)
    return rows
