"""The sessions of a server: who is in, what the engine holds for them, and how they leave.

Ledgers change on the event loop only. What the engine must do for it is queued as chores and done by
:meth:`SessionManager.begin_step`, between two steps.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from wispprof.errors import OutOfKvMemory
from wispprof.policies import load_level, slowdown
from wispprof.server.engine_thread import EngineWorker
from wispprof.server.kv_scheduler import schedule_kv
from wispprof.server.metrics import Metrics
from wispprof.server.prefix_cache import PrefixCache
from wispprof.server.session import ServerSession, SessionListener, SessionRequest
from wispprof.server.step_time_tracker import StepTimeTracker
from wispprof.sessions.commit_result import CommitResult
from wispprof.sessions.session_state import SessionState
from wispprof.settings.server_settings import ServerSettings
from wispprof.types import Engine

__all__ = ["SessionManager"]

log = logging.getLogger("wispprof.server")

_LOAD_EVERY_MS = 25.0


class SessionManager:
    """Sessions by their engine name, and the caches of those that left."""

    def __init__(
        self,
        settings: ServerSettings,
        worker: EngineWorker,
        clock: StepTimeTracker,
        metrics: Metrics,
        max_context: int,
        stream: bool,
    ) -> None:
        self._settings = settings
        self._worker = worker
        self._clock = clock
        self._metrics = metrics
        self._max_context = max_context
        self._stream = stream
        self._sessions: dict[str, ServerSession] = {}
        max_cached = settings.prefix_cache_sessions if worker.engine.capabilities.fork else 0
        self._prefix_cache = PrefixCache(max_cached, settings.prefix_cache_ttl_ms)
        self._opening: list[ServerSession] = []
        self._names = 0
        self._audits = 0
        self._kv_total = worker.engine.kv_free
        self._load_until_ms = -1.0
        self.load_level = 0
        self.waiting = 0
        self.wake: Callable[[], None] = lambda: None
        self.spend: Callable[[str, int, float], None] = lambda key, tokens, now_ms: None

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def kv_total(self) -> int:
        """Cache tokens of the empty engine."""
        return self._kv_total

    @property
    def sessions(self) -> Iterable[ServerSession]:
        return self._sessions.values()

    def get(self, name: str) -> ServerSession | None:
        return self._sessions.get(name)

    # --- coming -------------------------------------------------------------------------------

    def add(
        self, request: SessionRequest, listener: SessionListener, number: int, now_ms: float
    ) -> ServerSession:
        """A new session, reusing the longest prefix that a kept cache holds."""
        self._names += 1
        name = f"s{self._names}"
        state = SessionState(
            name,
            request.tokens,
            slo=request.slo,
            max_new=request.max_new,
            max_context=self._max_context,
            now_ms=now_ms,
            generated=request.generated,
            stop=request.stop,
            stream=self._stream,
            undrafted=request.undrafted,
            max_pending_drafts=self._settings.max_drafts,
        )
        session = ServerSession(
            state, request.sampling, listener, number, now_ms, last_commit_ms=now_ms
        )
        self._sessions[name] = session
        self._opening.append(session)
        self.wake()
        return session

    def _open_in_engine(self, session: ServerSession) -> None:
        """Queue what opens a session in the engine."""
        prefix = self._prefix_cache.find(session.state.tokens)
        if prefix is None:
            self._worker.deferred_op(lambda engine: _open(engine, session))
            return
        parent, length = prefix.session, prefix.length
        take_over = prefix.whole
        if take_over:
            # The child holds all that the parent held: keeping both would waste memory.
            self._prefix_cache.forget(parent)
        self._worker.deferred_op(lambda engine: _fork(engine, session, parent, length, take_over))

    # --- a step's needs -----------------------------------------------------------------------

    async def begin_step(self, now_ms: float, margin: int = 0) -> dict[str, ServerSession]:
        """Work off what happened since the last step; returns the sessions that may take part."""
        self._sweep(now_ms)
        opening, self._opening = self._opening, []
        for session in opening:
            if session.name in self._sessions:
                self._open_in_engine(session)
        await self._worker.flush_deferred()
        for session in opening:
            self._opened_in_engine(session)
        runnable = await self._schedule_kv(now_ms, margin)
        self._measure_load(now_ms)
        return runnable

    def _opened_in_engine(self, session: ServerSession) -> None:
        if session.name not in self._sessions:
            # Its owner left while the engine's thread was opening it.
            if session.in_engine:
                self._close_in_engine(session.name)
            return
        if not session.in_engine:
            self.fail(session, "busy", "The engine holds no more sessions now.", 1_000.0)
            return
        session.opened = True
        if session.reused:
            session.state.adopted(session.reused)
            self._metrics.reused_tokens.inc(session.reused)
        session.state.floor_ms = (
            self._clock.estimator.start().add(1, session.state.committed_len).p50_ms
        )
        if self._stream and not session.state.undrafted:
            session.state.floor_ms /= 1.0 + self._settings.max_drafts

    async def _schedule_kv(self, now_ms: float, margin: int) -> dict[str, ServerSession]:
        sessions = [session for session in self._sessions.values() if session.opened]
        free = max(0, self._worker.engine.kv_free - margin)
        plan = schedule_kv(
            sessions, free, self._prefix_cache.tokens, now_ms, self._settings.idle_evict_ms
        )
        self.waiting = plan.waiting
        tokens_to_free = plan.tokens_to_free
        while tokens_to_free > 0:
            before = self._prefix_cache.tokens
            self._drop_oldest_prefix()
            tokens_to_free -= before - self._prefix_cache.tokens
        for session in plan.evict:
            session.state.evicted()
            self._metrics.preempted.labels("idle" if not session.state.ready else "memory").inc()
            self._roll_back(session.name, 0)
        await self._worker.flush_deferred()
        return {
            session.name: session for session in plan.runnable if session.name in self._sessions
        }

    def _drop_oldest_prefix(self) -> None:
        name = self._prefix_cache.oldest()
        if name is not None:
            self._close_in_engine(name)

    def _measure_load(self, now_ms: float) -> None:
        if now_ms < self._load_until_ms:
            return
        self._load_until_ms = now_ms + _LOAD_EVERY_MS
        decoding = [session.state.cached for session in self._sessions.values() if session.opened]
        self.load_level = load_level(slowdown(self._clock.estimator, decoding), self.load_level)
        metrics = self._metrics
        metrics.load.set(self.load_level)
        metrics.running.set(sum(1 for cached in decoding if cached))
        metrics.waiting.set(sum(1 for cached in decoding if not cached) + len(self._opening))
        metrics.kv_usage.set(1.0 - self._worker.engine.kv_free / max(1, self._kv_total))
        metrics.kv_kept.set(self._prefix_cache.tokens)

    # --- a step's results ---------------------------------------------------------------------

    def committed(
        self, session: ServerSession, done: CommitResult, now_ms: float, verify_ms: float
    ) -> None:
        """Tell the owner, and let the session go where it ended or its owner has left."""
        if done.rollback is not None:
            self._roll_back(session.name, done.rollback)
        if session.closing:
            self._remove(session, session.closing, now_ms)
            return
        if not done.tokens:
            return
        prompt = (
            session.state.committed_len - len(done.tokens) - session.reused if done.first else 0
        )
        self.spend(session.listener.key, len(done.tokens) + prompt, now_ms)
        since = session.state.slo_tracker.opened_ms if done.first else session.last_commit_ms
        session.last_commit_ms = now_ms
        session.last_seen_ms = max(session.last_seen_ms, now_ms)
        self._metrics.commit(done, now_ms - since, done.first)
        session.listener.committed(session, done, verify_ms, self.load_level)
        if done.finished and session.name in self._sessions:
            self._remove(session, done.finished, now_ms)

    def failed_step(self, members: list[ServerSession]) -> None:
        """The engine failed in the middle of a step: nobody in it can be trusted any more."""
        for session in members:
            session.state.cancel()
            self.fail(session, "internal", "The engine failed; open the session again.", keep=False)

    # --- leaving ------------------------------------------------------------------------------

    def release(self, session: ServerSession, now_ms: float, reason: str = "abort") -> None:
        """The owner is done with the session, or gone."""
        if session.name not in self._sessions:
            return
        if session.state.in_flight:
            session.closing = reason
        else:
            self._remove(session, reason, now_ms)
        self.wake()

    def fail(
        self,
        session: ServerSession,
        code: str,
        message: str,
        retry_ms: float = 0.0,
        keep: bool = True,
    ) -> None:
        """End a session against its owner's wish, and say why."""
        if session.name not in self._sessions:
            return
        if not session.closing:
            session.listener.failed(session, code, message, retry_ms)
        self._remove(session, code, session.last_commit_ms, keep=keep)

    def _remove(
        self, session: ServerSession, reason: str, now_ms: float, keep: bool = True
    ) -> None:
        del self._sessions[session.name]
        state = session.state
        state.abandon()
        # An aborted session says nothing about the promise, unless it was broken already.
        kept: bool | None = state.slo_tracker.kept(now_ms)
        if reason not in ("stop", "length", "context") and kept:
            kept = None
        self._metrics.ended(
            state.slo,
            state.counters,
            reason,
            kept,
            max(0.0, now_ms - state.slo_tracker.opened_ms),
        )
        if not session.opened:
            return  # never opened, or being opened right now: see _opened_in_engine
        if not keep:
            self._close_in_engine(session.name)
            return
        for name in self._prefix_cache.keep(session.name, state.tokens[: state.cached], now_ms):
            self._close_in_engine(name)

    def _sweep(self, now_ms: float) -> None:
        for name in self._prefix_cache.expired(now_ms):
            self._close_in_engine(name)
        deadline = now_ms - self._settings.idle_ttl_ms
        silent = [one for one in self._sessions.values() if one.last_seen_ms < deadline]
        for session in silent:
            self.fail(session, "session", "Nothing was heard of this session for too long.")

    def _close_in_engine(self, name: str) -> None:
        self._worker.deferred_op(lambda engine: engine.close(name))

    def _roll_back(self, name: str, length: int) -> None:
        self._worker.deferred_op(lambda engine: engine.rollback(name, length))

    # --- the books ----------------------------------------------------------------------------

    async def clear_prefix_cache(self) -> None:
        """Release all kept caches."""
        while len(self._prefix_cache):
            self._drop_oldest_prefix()
        await self._worker.flush_deferred()

    async def check_integrity(self, full: bool = True) -> None:
        """Ledgers, kept caches and engine must agree to the token; call it between steps only.

        ``full`` compares every cache with its tokens, which costs a forward pass over all of them;
        otherwise one cache is. Raises :class:`EngineError` where something is off.
        """
        await self._worker.flush_deferred()
        expected = {
            session.name: session.state.cached
            for session in self._sessions.values()
            if session.opened
        }
        expected |= self._prefix_cache.lengths()
        names = sorted(expected)
        one = names[self._audits % len(names)] if names and not full else None
        self._audits += 1
        await self._worker.call(lambda engine: _audit(engine, expected, one))


def _open(engine: Engine, session: ServerSession) -> None:
    engine.open(session.name, session.sampling, session.state.tokens)
    session.in_engine = True


def _fork(
    engine: Engine, session: ServerSession, parent: str, length: int, take_over: bool
) -> None:
    try:
        engine.fork(parent, session.name, length, session.sampling)
        session.in_engine = True
        session.reused = length
    except OutOfKvMemory:
        _open(engine, session)
    finally:
        if take_over:
            engine.close(parent)


def _audit(engine: Engine, expected: dict[str, int], one: str | None) -> None:
    engine.check_integrity(one)
    engine.audit(expected)
