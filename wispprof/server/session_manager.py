"""The open sessions of a server and the KV that the engine holds for them.

Session states change on the event loop only. Engine operations are deferred and run by
:meth:`SessionManager.begin_step`, between two steps.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterable
from functools import partial

from wispprof.backends import Engine
from wispprof.errors import EngineError
from wispprof.policies import load_level, slowdown
from wispprof.policies.interface import SessionView
from wispprof.server.engine_operations import audit_engine, fork_in_engine, open_in_engine, probe_engine
from wispprof.server.engine_thread import EngineThread
from wispprof.server.kv_scheduler import schedule_kv
from wispprof.server.metrics import Metrics
from wispprof.server.prefix_cache import PrefixCache
from wispprof.server.request_log import EndedRequest, RequestLog
from wispprof.server.session import ServerSession, SessionListener
from wispprof.server.step_time_tracker import StepTimeTracker
from wispprof.sessions.plan_ahead import expected_view
from wispprof.sessions.session_state import CommitResult, SessionState
from wispprof.settings.server_settings import ServerSettings
from wispprof.types import GenerationRequest

log = logging.getLogger("wispprof.server")

_LOAD_EVERY_MS = 25.0


class SessionManager:
    """Sessions by their engine name, and the prefix cache.

    Set before use: ``wake`` (something changed, the engine loop should plan), ``load_changed`` (the load
    level did), ``spend`` (count tokens against an API key: key, tokens, now_ms), ``load_engine`` (for an
    engine that is lost) and ``request_log``. ``waiting``: sessions that wait for memory.
    """

    def __init__(
        self,
        settings: ServerSettings,
        engine_thread: EngineThread,
        step_times: StepTimeTracker,
        metrics: Metrics,
        max_context: int,
        stream: bool,
    ) -> None:
        self._settings = settings
        self._engine_thread = engine_thread
        self._step_times = step_times
        self._metrics = metrics
        self._max_context = max_context
        self._stream = stream
        self._sessions: dict[str, ServerSession] = {}
        engine = engine_thread.engine
        cached_sessions = settings.prefix_cache_sessions if engine.capabilities.fork else 0
        self._prefix_cache = PrefixCache(cached_sessions, settings.prefix_cache_ttl_ms)
        self._new_sessions: list[ServerSession] = []
        self._undelivered: list[tuple[ServerSession, CommitResult, float, float]] = []
        self._numbers = itertools.count(1)
        self._audits = 0
        self._next_load_ms = -1.0
        self.kv_total = engine.kv_free
        self.greedy_only = engine.capabilities.greedy_only
        self.load_level = 0
        self.waiting = 0
        self.wake: Callable[[], None] = lambda: None
        self.load_changed: Callable[[], None] = lambda: None
        self.load_engine: Callable[[], Engine] | None = None
        self.request_log: RequestLog | None = None
        self.spend: Callable[[str, int, float], None] = lambda key, tokens, now_ms: None

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def sessions(self) -> Iterable[ServerSession]:
        return self._sessions.values()

    def get(self, name: str) -> ServerSession | None:
        return self._sessions.get(name)

    # --- opening ------------------------------------------------------------------------------

    def add(
        self, request: GenerationRequest, listener: SessionListener, number: int, now_ms: float
    ) -> ServerSession:
        """A new session; the next step opens it in the engine."""
        name = f"s{next(self._numbers)}"
        state = SessionState(
            name,
            request.tokens,
            slo=request.slo,
            max_new=request.max_new,
            max_context=self._max_context,
            now_ms=now_ms,
            generated=request.generated,
            stop=request.stop_tokens,
            stream=self._stream,
            undrafted=request.undrafted,
            max_pending_drafts=self._settings.max_drafts,
        )
        session = ServerSession(state, request.sampling, listener, number, now_ms, last_commit_ms=now_ms)
        session.resumed = request.generated
        self._sessions[name] = session
        self._metrics.opened(request.slo)
        self._new_sessions.append(session)
        self.wake()
        return session

    def _open_new(self) -> None:
        """Defer the opening of new sessions in the engine."""
        new_sessions, self._new_sessions = self._new_sessions, []
        for session in new_sessions:
            if session.name in self._sessions:
                self._engine_thread.defer(self._opening(session), partial(self._opened, session))

    def _opening(self, session: ServerSession) -> Callable[[Engine], None]:
        owner = self._owner(session)
        prefix = self._prefix_cache.find(owner, session.state.tokens)
        if prefix is None:
            return lambda engine: open_in_engine(engine, session, owner)
        parent, length, take_over = prefix.session, prefix.length, prefix.whole
        if take_over:
            # The new session holds all that the cached one held.
            self._prefix_cache.remove(parent)
        return lambda engine: fork_in_engine(engine, session, owner, parent, length, take_over)

    def _owner(self, session: ServerSession) -> str:
        """Whose prefixes a session shares: its key's. A server without keys serves one user."""
        return session.listener.key if self._settings.api_keys else ""

    def _opened(self, session: ServerSession) -> None:
        if session.name not in self._sessions:
            # Closed while the engine's thread was opening it.
            if session.in_engine:
                self._close_in_engine(session.name)
            return
        if not session.in_engine:
            self.fail(session, "busy", "The engine holds no more sessions now.", 1_000.0)
            return
        state = session.state
        session.opened = True
        if session.reused:
            state.adopted(session.reused)
            self._metrics.reused_tokens.inc(session.reused)
        state.floor_ms = self._step_times.estimator.start().add(1, state.committed_len).p50_ms
        if self._stream and not state.undrafted:
            state.floor_ms /= 1.0 + self._settings.max_drafts

    # --- before a step ------------------------------------------------------------------------

    async def begin_step(self, now_ms: float, kv_margin: int = 0) -> dict[str, ServerSession]:
        """Open, close and evict sessions in the engine; returns the sessions that may be batched.
        ``kv_margin``: KV tokens to leave free."""
        self._remove_expired(now_ms)
        self._open_new()
        await self._engine_thread.flush_deferred()
        return await self._schedule_kv(now_ms, kv_margin)

    def expected(self, now_ms: float, end_ms: float, kv_margin: int) -> tuple[list[SessionView], int] | None:
        """What to expect of the sessions when the step under way ends, and the KV tokens that are free then;
        ``None`` if memory is short, so that someone must wait. New sessions are opened with the next step.

        ``kv_margin``: KV tokens that are not free then, though the engine may say so.
        """
        self._remove_expired(now_ms)
        self._open_new()
        expected = [expected_view(one.state, now_ms, end_ms) for one in self._sessions.values()]
        views = [view for view in expected if view is not None]
        needed = sum([view.prompt_left or 1 for view in views])
        free = self._engine_thread.engine.kv_free - kv_margin
        while needed > free:
            held = self._prefix_cache.tokens
            if not held:
                return None
            self._drop_oldest_prefix()
            free += held - self._prefix_cache.tokens
        return views, free

    def _remove_expired(self, now_ms: float) -> None:
        for name in self._prefix_cache.pop_expired(now_ms):
            self._close_in_engine(name)
        deadline = now_ms - self._settings.idle_ttl_ms
        expired = [one for one in self._sessions.values() if one.last_seen_ms < deadline]
        for session in [one for one in expired if not (one.state.in_flight or one.planned)]:
            idle_ms = now_ms - session.last_seen_ms
            self.fail(session, "session", f"No data for this session for {idle_ms:,.0f} ms.")

    async def _schedule_kv(self, now_ms: float, kv_margin: int) -> dict[str, ServerSession]:
        opened = [session for session in self._sessions.values() if session.opened]
        free = max(0, self._engine_thread.engine.kv_free - kv_margin)
        cached = self._prefix_cache.tokens
        plan = schedule_kv(opened, free, cached, now_ms, self._settings.idle_evict_ms)
        self.waiting = plan.waiting
        while cached - self._prefix_cache.tokens < plan.tokens_to_free:
            self._drop_oldest_prefix()
        for session in plan.evict:
            session.state.evicted()
            self._metrics.preempted.labels("idle" if not session.state.ready else "memory").inc()
            self._roll_back(session.name, 0)
        await self._engine_thread.flush_deferred()
        return {one.name: one for one in plan.runnable if one.name in self._sessions}

    def measure_load(self, now_ms: float) -> None:
        """Update the load level and the gauges of sessions and memory, at times."""
        if now_ms < self._next_load_ms:
            return
        self._next_load_ms = now_ms + _LOAD_EVERY_MS
        cached = [one.state.cached for one in self._sessions.values() if one.opened]
        level = load_level(slowdown(self._step_times.estimator, cached), self.load_level)
        if level != self.load_level:
            self.load_level = level
            self.load_changed()
        running = sum(1 for tokens in cached if tokens)
        metrics = self._metrics
        metrics.load.set(self.load_level)
        metrics.running.set(running)
        metrics.waiting.set(len(cached) - running + len(self._new_sessions))
        metrics.kv_usage.set(1.0 - self._engine_thread.engine.kv_free / max(1, self.kv_total))
        metrics.prefix_cache.set(self._prefix_cache.tokens)

    # --- after a step -------------------------------------------------------------------------

    def committed(
        self, session: ServerSession, commit: CommitResult, now_ms: float, verify_ms: float
    ) -> None:
        """What the next step depends on: rollbacks, and sessions that ended or are closing. The rest waits
        for :meth:`deliver`, which runs while the engine computes."""
        if commit.rollback is not None:
            self._roll_back(session.name, commit.rollback)
        if session.closing:
            if not session.state.in_flight:
                self._remove(session, session.closing, now_ms)
        elif commit.tokens:
            session.depths.add(commit.depth, commit.accepted)
            self._undelivered.append((session, commit, now_ms, verify_ms))
            if commit.finished:
                self._remove(session, commit.finished, now_ms)

    def deliver(self) -> None:
        """Hand on what was committed since the last call."""
        undelivered, self._undelivered = self._undelivered, []
        for session, commit, now_ms, verify_ms in undelivered:
            spent, since_ms = len(commit.tokens), session.last_commit_ms
            if commit.first:
                # Its length then: the next step may have begun, but has committed nothing.
                spent = commit.committed_len - session.reused
                since_ms = session.state.slo_tracker.opened_ms
            session.last_commit_ms = now_ms
            session.last_seen_ms = max(session.last_seen_ms, now_ms)
            self._metrics.commit(commit, now_ms - since_ms)
            self.spend(session.listener.key, spent, now_ms)
            try:
                session.listener.committed(session, commit, verify_ms, self.load_level)
            except Exception:
                # One connection's defect: the others' results are good.
                log.exception("the commit of a session could not be delivered")
                self._undeliverable(session, now_ms)

    def _undeliverable(self, session: ServerSession, now_ms: float) -> None:
        with contextlib.suppress(Exception):
            session.listener.failed(session, "internal", "The server failed on this session; open it again.")
        self.release(session, now_ms, "internal")

    def end_failed(self, session: ServerSession) -> None:
        """The engine cannot compute this session, or its result could not be delivered: end it."""
        session.state.cancel()
        message = "The engine failed on this session; open it again."
        self.fail(session, "internal", message, cache_prefix=False)

    async def restore(self, sessions: list[ServerSession]) -> None:
        """A step over ``sessions`` raised what no engine should. Cut their KV to what it was before, and
        check the KV of all. Raises :class:`EngineError` if the engine is lost."""
        lengths = {session.name: session.state.cached for session in sessions}

        def cut(engine: Engine) -> None:
            for name, length in lengths.items():
                if engine.cached(name) > length:
                    engine.rollback(name, length)

        try:
            await self._engine_thread.call(cut)
            await self.check_integrity(full=True)
        except Exception as err:
            raise EngineError(f"The engine is lost: {err}", "Restart the server.") from err

    async def reload(self) -> None:
        """The engine is lost: load it again. Every session stays open and prefills its committed tokens;
        cached prefixes are gone. Raises :class:`EngineError` if there is no way to load it."""
        if self.load_engine is None:
            raise EngineError("The engine is lost.", "Restart the server.")
        log.warning("the engine is lost: loading it again, %d sessions prefill", len(self._sessions))
        await self._engine_thread.replace(self.load_engine)
        while self._prefix_cache.pop_oldest() is not None:
            pass
        for session in list(self._sessions.values()):
            session.state.cancel()
            session.state.evicted()
            session.in_engine = session.opened = False
            session.reused = 0
            if session.closing:
                self._remove(session, session.closing, session.last_commit_ms)
        self._new_sessions = list(self._sessions.values())
        self.wake()

    async def probe(self) -> None:
        """Compute one token of a new session. Raises :class:`EngineError` if the engine cannot."""
        name = f"probe-{next(self._numbers)}"
        try:
            await self._engine_thread.call(lambda engine: probe_engine(engine, name))
        except Exception as err:
            raise EngineError(f"The engine is lost: {err}", "Restart the server.") from err

    # --- closing ------------------------------------------------------------------------------

    def release(self, session: ServerSession, now_ms: float, reason: str = "abort") -> None:
        """The listener ends the session; a step under way is finished first."""
        if session.name not in self._sessions:
            return
        if session.state.in_flight or session.planned:
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
        cache_prefix: bool = True,
    ) -> None:
        """End a session and tell its listener why."""
        self.deliver()
        if session.name not in self._sessions:
            return
        if not session.closing:
            try:
                session.listener.failed(session, code, message, retry_ms)
            except Exception:
                log.exception("a connection could not be told that its session ended")
        self._remove(session, code, session.last_commit_ms, cache_prefix)

    def _remove(self, session: ServerSession, reason: str, now_ms: float, cache_prefix: bool = True) -> None:
        del self._sessions[session.name]
        state = session.state
        state.abandon()
        met_slo: bool | None = state.slo_tracker.met(now_ms)
        if reason not in ("stop", "length", "context") and met_slo:
            met_slo = None  # An aborted session counts only if it had missed its SLO already.
        self._metrics.ended(state.slo, state.counters, reason, met_slo, now_ms - state.slo_tracker.opened_ms)
        self._metrics.kinds.ended(session, now_ms)
        if self.request_log is not None:
            ended = EndedRequest(state, session.depths, session.resumed, self._owner(session), reason)
            self.request_log.put(ended)
        if not session.opened:
            return  # Never opened, or being opened now: see _opened.
        evicted = [session.name]
        if cache_prefix:
            tokens = state.tokens[: state.cached]
            evicted = self._prefix_cache.insert(session.name, self._owner(session), tokens, now_ms)
        for name in evicted:
            self._close_in_engine(name)

    def _drop_oldest_prefix(self) -> None:
        if (name := self._prefix_cache.pop_oldest()) is not None:
            self._close_in_engine(name)

    def _close_in_engine(self, name: str) -> None:
        self._engine_thread.defer(lambda engine: engine.close(name))

    def _roll_back(self, name: str, length: int) -> None:
        self._engine_thread.defer(lambda engine: engine.rollback(name, length))

    async def clear_prefix_cache(self) -> None:
        while len(self._prefix_cache):
            self._drop_oldest_prefix()
        await self._engine_thread.flush_deferred()

    async def check_integrity(self, full: bool = True) -> None:
        """Compare session states and prefix cache with the engine, between two steps only.

        ``full`` checks the KV of all sessions against their tokens, which costs a forward pass over all
        of them; otherwise of one. Raises :class:`EngineError` if they differ.
        """
        await self._engine_thread.flush_deferred()
        expected = {one.name: one.state.cached for one in self._sessions.values() if one.opened}
        expected |= self._prefix_cache.lengths()
        names = sorted(expected)
        checked = names[self._audits % len(names)] if names and not full else None
        self._audits += 1
        await self._engine_thread.call(lambda engine: audit_engine(engine, expected, checked))
