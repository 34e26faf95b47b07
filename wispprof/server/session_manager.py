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
        self._lives: dict[str, ServerSession] = {}
        most_kept = settings.kept_sessions if worker.engine.capabilities.fork else 0
        self._kept = PrefixCache(most_kept, settings.keep_ttl_ms)
        self._arriving: list[ServerSession] = []
        self._names = 0
        self._audits = 0
        self._kv_total = worker.engine.kv_free
        self._load_until_ms = -1.0
        self.load_level = 0
        self.waiting = 0
        self.wake: Callable[[], None] = lambda: None
        self.spend: Callable[[str, int, float], None] = lambda key, tokens, now_ms: None

    def __len__(self) -> int:
        return len(self._lives)

    @property
    def kv_total(self) -> int:
        """Cache tokens of the empty engine."""
        return self._kv_total

    @property
    def lives(self) -> Iterable[ServerSession]:
        return self._lives.values()

    def get(self, name: str) -> ServerSession | None:
        return self._lives.get(name)

    # --- coming -------------------------------------------------------------------------------

    def enter(
        self, request: SessionRequest, owner: SessionListener, number: int, now_ms: float
    ) -> ServerSession:
        """A new session, reusing the longest prefix that a kept cache holds."""
        self._names += 1
        name = f"s{self._names}"
        ledger = SessionState(
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
        live = ServerSession(ledger, request.sampling, owner, number, now_ms, last_commit_ms=now_ms)
        self._lives[name] = live
        self._arriving.append(live)
        self.wake()
        return live

    def _open_in_engine(self, live: ServerSession) -> None:
        """Queue what opens a session in the engine."""
        prefix = self._kept.find(live.ledger.tokens)
        if prefix is None:
            self._worker.deferred_op(lambda engine: _open(engine, live))
            return
        parent, length = prefix.session, prefix.length
        take_over = prefix.whole
        if take_over:
            # The child holds all that the parent held: keeping both would waste memory.
            self._kept.forget(parent)
        self._worker.deferred_op(lambda engine: _fork(engine, live, parent, length, take_over))

    # --- a step's needs -----------------------------------------------------------------------

    async def begin_step(self, now_ms: float, margin: int = 0) -> dict[str, ServerSession]:
        """Work off what happened since the last step; returns the sessions that may take part."""
        self._sweep(now_ms)
        arriving, self._arriving = self._arriving, []
        for live in arriving:
            if live.name in self._lives:
                self._open_in_engine(live)
        await self._worker.flush_deferred()
        for live in arriving:
            self._settled(live)
        runnable = await self._arrange(now_ms, margin)
        self._measure_load(now_ms)
        return runnable

    def _settled(self, live: ServerSession) -> None:
        if live.name not in self._lives:
            # Its owner left while the engine's thread was opening it.
            if live.held:
                self._close_in_engine(live.name)
            return
        if not live.held:
            self.fail(live, "busy", "The engine holds no more sessions now.", 1_000.0)
            return
        live.opened = True
        if live.reused:
            live.ledger.adopted(live.reused)
            self._metrics.reused_tokens.inc(live.reused)
        live.ledger.floor_ms = (
            self._clock.estimator.start().add(1, live.ledger.committed_len).p50_ms
        )
        if self._stream and not live.ledger.undrafted:
            live.ledger.floor_ms /= 1.0 + self._settings.max_drafts

    async def _arrange(self, now_ms: float, margin: int) -> dict[str, ServerSession]:
        lives = [live for live in self._lives.values() if live.opened]
        free = max(0, self._worker.engine.kv_free - margin)
        plan = schedule_kv(lives, free, self._kept.tokens, now_ms, self._settings.idle_evict_ms)
        self.waiting = plan.waiting
        short = plan.short
        while short > 0:
            before = self._kept.tokens
            self._drop_oldest_kept()
            short -= before - self._kept.tokens
        for live in plan.evict:
            live.ledger.evicted()
            self._metrics.preempted.labels("idle" if not live.ledger.ready else "memory").inc()
            self._roll_back(live.name, 0)
        await self._worker.flush_deferred()
        return {live.name: live for live in plan.runnable if live.name in self._lives}

    def _drop_oldest_kept(self) -> None:
        name = self._kept.oldest()
        if name is not None:
            self._close_in_engine(name)

    def _measure_load(self, now_ms: float) -> None:
        if now_ms < self._load_until_ms:
            return
        self._load_until_ms = now_ms + _LOAD_EVERY_MS
        decoding = [live.ledger.cached for live in self._lives.values() if live.opened]
        self.load_level = load_level(slowdown(self._clock.estimator, decoding), self.load_level)
        metrics = self._metrics
        metrics.load.set(self.load_level)
        metrics.running.set(sum(1 for cached in decoding if cached))
        metrics.waiting.set(sum(1 for cached in decoding if not cached) + len(self._arriving))
        metrics.kv_usage.set(1.0 - self._worker.engine.kv_free / max(1, self._kv_total))
        metrics.kv_kept.set(self._kept.tokens)

    # --- a step's results ---------------------------------------------------------------------

    def committed(
        self, live: ServerSession, done: CommitResult, now_ms: float, verify_ms: float
    ) -> None:
        """Tell the owner, and let the session go where it ended or its owner has left."""
        if done.rollback is not None:
            self._roll_back(live.name, done.rollback)
        if live.closing:
            self._leave(live, live.closing, now_ms)
            return
        if not done.tokens:
            return
        prompt = live.ledger.committed_len - len(done.tokens) - live.reused if done.first else 0
        self.spend(live.owner.key, len(done.tokens) + prompt, now_ms)
        since = live.ledger.slo_tracker.opened_ms if done.first else live.last_commit_ms
        live.last_commit_ms = now_ms
        live.last_seen_ms = max(live.last_seen_ms, now_ms)
        self._metrics.commit(done, now_ms - since, done.first)
        live.owner.committed(live, done, verify_ms, self.load_level)
        if done.finished and live.name in self._lives:
            self._leave(live, done.finished, now_ms)

    def failed_step(self, members: list[ServerSession]) -> None:
        """The engine failed in the middle of a step: nobody in it can be trusted any more."""
        for live in members:
            live.ledger.cancel()
            self.fail(live, "internal", "The engine failed; open the session again.", keep=False)

    # --- leaving ------------------------------------------------------------------------------

    def leave(self, live: ServerSession, now_ms: float, reason: str = "abort") -> None:
        """The owner is done with the session, or gone."""
        if live.name not in self._lives:
            return
        if live.ledger.in_flight:
            live.closing = reason
        else:
            self._leave(live, reason, now_ms)
        self.wake()

    def fail(
        self,
        live: ServerSession,
        code: str,
        message: str,
        retry_ms: float = 0.0,
        keep: bool = True,
    ) -> None:
        """End a session against its owner's wish, and say why."""
        if live.name not in self._lives:
            return
        if not live.closing:
            live.owner.failed(live, code, message, retry_ms)
        self._leave(live, code, live.last_commit_ms, keep=keep)

    def _leave(self, live: ServerSession, reason: str, now_ms: float, keep: bool = True) -> None:
        del self._lives[live.name]
        ledger = live.ledger
        ledger.abandon()
        # An aborted session says nothing about the promise, unless it was broken already.
        kept: bool | None = ledger.slo_tracker.kept(now_ms)
        if reason not in ("stop", "length", "context") and kept:
            kept = None
        self._metrics.ended(
            ledger.slo,
            ledger.counters,
            reason,
            kept,
            max(0.0, now_ms - ledger.slo_tracker.opened_ms),
        )
        if not live.opened:
            return  # never opened, or being opened right now: see _settled
        if not keep:
            self._close_in_engine(live.name)
            return
        for name in self._kept.keep(live.name, ledger.tokens[: ledger.cached], now_ms):
            self._close_in_engine(name)

    def _sweep(self, now_ms: float) -> None:
        for name in self._kept.expired(now_ms):
            self._close_in_engine(name)
        deadline = now_ms - self._settings.idle_ttl_ms
        silent = [one for one in self._lives.values() if one.last_seen_ms < deadline]
        for live in silent:
            self.fail(live, "session", "Nothing was heard of this session for too long.")

    def _close_in_engine(self, name: str) -> None:
        self._worker.deferred_op(lambda engine: engine.close(name))

    def _roll_back(self, name: str, length: int) -> None:
        self._worker.deferred_op(lambda engine: engine.rollback(name, length))

    # --- the books ----------------------------------------------------------------------------

    async def forget_kept(self) -> None:
        """Release all kept caches."""
        while len(self._kept):
            self._drop_oldest_kept()
        await self._worker.flush_deferred()

    async def check_integrity(self, full: bool = True) -> None:
        """Ledgers, kept caches and engine must agree to the token; call it between steps only.

        ``full`` compares every cache with its tokens, which costs a forward pass over all of them;
        otherwise one cache is. Raises :class:`EngineError` where something is off.
        """
        await self._worker.flush_deferred()
        expected = {live.name: live.ledger.cached for live in self._lives.values() if live.opened}
        expected |= self._kept.lengths()
        names = sorted(expected)
        one = names[self._audits % len(names)] if names and not full else None
        self._audits += 1
        await self._worker.call(lambda engine: _audit(engine, expected, one))


def _open(engine: Engine, live: ServerSession) -> None:
    engine.open(live.name, live.sampling, live.ledger.tokens)
    live.held = True


def _fork(engine: Engine, live: ServerSession, parent: str, length: int, take_over: bool) -> None:
    try:
        engine.fork(parent, live.name, length, live.sampling)
        live.held = True
        live.reused = length
    except OutOfKvMemory:
        _open(engine, live)
    finally:
        if take_over:
            engine.close(parent)


def _audit(engine: Engine, expected: dict[str, int], one: str | None) -> None:
    engine.check_integrity(one)
    engine.audit(expected)
