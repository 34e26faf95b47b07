"""A step under way, and the one that is prepared to follow it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from wispprof.artifacts.plan import BatchRow
from wispprof.policies import StepPlan
from wispprof.policies.interface import ScheduledItem
from wispprof.server.engine_thread import DeferredOps, EngineThread
from wispprof.server.session import ServerSession
from wispprof.sessions.plan_ahead import Continuation, KnownInput, TreeContinuation, next_input
from wispprof.types import BatchShape, StepInput, VerifyResult

log = logging.getLogger("wispprof.server")

_EMPTY = BatchShape(())

Results = asyncio.Future[tuple[list[VerifyResult], float]]


@dataclass(slots=True, eq=False)
class RunningStep:
    """A step of ``sessions``, each with its input. ``row``: the plan's row that limits it. ``shape`` and its
    predicted times are known soon after it began. ``prepared``: what may follow; ``following``: what does."""

    plan: StepPlan
    row: BatchRow | None
    sessions: list[ServerSession]
    inputs: list[StepInput]
    started_ms: float
    results: Results
    shape: BatchShape = _EMPTY
    p50_ms: float = 0.0
    bound_ms: float = 0.0
    prepared: PreparedStep | None = None
    following: RunningStep | None = None

    def follow(self, results: list[VerifyResult]) -> RunningStep | None:
        """Called in the engine's thread when this step is done."""
        if self.prepared is not None:
            try:
                self.following = self.prepared.begin(results)
            except Exception:
                log.exception("a prepared step could not begin")
        return self.following


class _Opening:
    """The first prompt chunk of a session that the engine opens just before."""

    __slots__ = ("_prefill", "_session")

    def __init__(self, session: ServerSession, item: ScheduledItem) -> None:
        self._session = session
        self._prefill = item.prefill

    def after(self, result: VerifyResult | None) -> StepInput | None:
        """The chunk after the tokens that came from a cached prefix; ``None`` if it was not opened."""
        session = self._session
        if not session.in_engine or self._prefill < 1:
            return None
        tokens, start = session.state.tokens, session.reused
        fed = tokens[start : start + self._prefill]
        return StepInput(session.name, fed, 0, start + len(fed) == len(tokens))


@dataclass(slots=True, eq=False)
class PreparedStep:
    """A step that begins in the engine's thread as soon as the one before it is done.

    Made on the event loop. From then on the engine's thread reads it; only :meth:`renew` changes it. ``ops``:
    deferred operations that come before it. ``taken``: the engine's thread has run them.
    """

    plan: StepPlan
    row: BatchRow | None
    results: Results
    ops: DeferredOps
    engine_thread: EngineThread
    now_ms: Callable[[], float]
    taken: bool = False
    _items: dict[str, tuple[ServerSession, ScheduledItem]] = field(default_factory=dict)
    _inputs: dict[str, KnownInput | Continuation | TreeContinuation | _Opening] = field(default_factory=dict)

    def add(self, session: ServerSession, item: ScheduledItem) -> None:
        """Let a session take part, if it can. It is not closed before this step is done."""
        new = not session.opened
        given = _Opening(session, item) if new else next_input(session.state, item)
        if given is not None:
            session.planned = True
            self._items[session.name] = session, item
            self._inputs[session.name] = given

    def renew(self, session: ServerSession) -> None:
        """Drafts of a planned session have changed."""
        item = self._items.get(session.name)
        if item is not None and session.opened and (given := next_input(session.state, item[1])) is not None:
            self._inputs[session.name] = given

    @property
    def sessions(self) -> list[ServerSession]:
        return [session for session, _ in self._items.values()]

    def begin(self, results: list[VerifyResult]) -> RunningStep | None:
        """The step after these results; ``None`` if no session can take part. In the engine's thread."""
        self.taken = True
        self.engine_thread.run_operations(self.ops)
        of = {result.session: result for result in results}
        sessions, inputs = [], []
        for name, (session, _) in self._items.items():
            step_input = None if session.closing else self._inputs[name].after(of.get(name))
            if step_input is not None:
                sessions.append(session)
                inputs.append(step_input)
        if not inputs:
            return None
        return RunningStep(self.plan, self.row, sessions, inputs, self.now_ms(), self.results)
