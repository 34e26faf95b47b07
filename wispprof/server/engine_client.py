"""A front's end of the channel: opens sessions in the engine process and hands on what it answers."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from wispprof import protocol
from wispprof.openai_api import ChatTokenizer
from wispprof.server.admission import Refused
from wispprof.server.channel import (
    SPACING_S,
    BatchWriter,
    DirectWriter,
    FrontConfig,
    FrontReady,
    MetricCount,
    Outbox,
    Page,
    Query,
    ServerStatus,
    SessionClosing,
    SessionCommit,
    SessionDrafts,
    SessionFailed,
    SessionOpening,
    SessionReused,
    Stop,
    ToEngine,
    to_front,
)
from wispprof.server.engine_host import EngineHost, front_config
from wispprof.server.plain_settings import read_settings
from wispprof.types import GenerationRequest

if TYPE_CHECKING:
    from wispprof.server.verification_server import VerificationServer


class FrontListener(Protocol):
    """The WebSocket connection or HTTP request that opened a session. ``key``: its API key. ``kind``: the
    name that an edge gave at hello, or ``api``."""

    key: str
    kind: str

    def committed(self, session: FrontSession, frame: protocol.Commit) -> None: ...

    def failed(self, session: FrontSession, problem: Refused) -> None:
        """The session was refused or has failed; nothing of it is left."""


@dataclass(slots=True, eq=False)
class FrontSession:
    """A session of a front. ``number`` is the listener's name for it, ``handle`` the channel's.
    ``reused``: prompt tokens that came from a cached prefix, known with the first commit."""

    handle: int
    number: int
    listener: FrontListener
    reused: int = 0


MAX_HELD = 50_000
"""Messages that wait for an engine process that restarts; with more of them new sessions are refused."""

_RESTARTS = Refused("draining", "The engine restarts; the session can go on soon.", retry_ms=250.0)


class EngineClient:
    """What the endpoints of a front know of the server.

    ``tokenizer``: for the OpenAI API, which is off without it. ``on_stop``: called when the engine process
    wants this front to end. ``restarting``: the engine process is gone, and the next has not come yet.
    """

    def __init__(
        self,
        config: FrontConfig,
        writer: BatchWriter,
        tokenizer: ChatTokenizer | None,
        spacing_s: float = SPACING_S,
    ) -> None:
        self.config = config
        self.settings = read_settings(config.settings)
        self.model = config.model
        self.tokenizer = tokenizer
        self.draining = False
        self.load_level = 0
        self.restarting = False
        self.edges_by_key: Counter[str] = Counter()
        self.on_stop: Callable[[], None] = lambda: None
        self._outbox: Outbox[ToEngine] = Outbox(writer, spacing_s)
        self._handles = itertools.count()
        self._sessions: dict[int, FrontSession] = {}
        self._queries: dict[int, asyncio.Future[Page]] = {}
        self._connections = 0.0

    @classmethod
    def within(cls, server: VerificationServer) -> EngineClient:
        """A front of ``server`` within its own process and event loop."""
        host = EngineHost(server)
        client = cls(front_config(server), DirectWriter(host.receive), server.tokenizer, 0.0)
        host.connect(DirectWriter(client.receive))
        return client

    def ready(self) -> None:
        """Connections are accepted now."""
        self._outbox.put(FrontReady())

    def lost(self) -> None:
        """The engine process is gone, and its sessions with it: their listeners are told to open them again.
        What is asked for meanwhile waits for the next engine process."""
        self.restarting = True
        self._outbox.connect(None)
        self._outbox.clear()
        sessions, self._sessions = self._sessions, {}
        for session in sessions.values():
            session.listener.failed(session, _RESTARTS)
        for number, answer in self._queries.items():
            if not answer.done():
                answer.set_result(_restarting(number))

    def end(self) -> None:
        """Send what is held, and let go of the server: what still refers to this front (FastAPI keeps the
        endpoints of past applications) must not keep a model in memory."""
        self._outbox.flush()
        self._outbox.connect(None)

    def back(self, writer: BatchWriter) -> None:
        """Another engine process took the place of the lost one."""
        self.restarting = self.draining = False
        self.load_level = 0
        if self._connections:
            self._outbox.put(MetricCount("connections", "", self._connections))
        self._outbox.connect(writer)

    def open(self, request: GenerationRequest, listener: FrontListener, number: int = 0) -> FrontSession:
        """A new session. If it is refused, its listener's ``failed`` says so."""
        session = FrontSession(next(self._handles), number, listener)
        if self.restarting and len(self._outbox) >= MAX_HELD:
            asyncio.get_running_loop().call_soon(listener.failed, session, _RESTARTS)
            return session
        self._outbox.put(SessionOpening(session.handle, number, listener.key, request, listener.kind))
        self._sessions[session.handle] = session
        return session

    def draft(self, session: FrontSession, frame: protocol.Draft) -> None:
        """A checked draft frame of its session."""
        self._outbox.put(SessionDrafts(session.handle, frame))

    def close(self, session: FrontSession, reason: str = "abort") -> None:
        """End a session; its listener hears no more of it."""
        if self._sessions.pop(session.handle, None) is not None:
            self._outbox.put(SessionClosing(session.handle, reason))

    def count(self, metric: str, label: str = "", amount: float = 1.0) -> None:
        """Add to a metric of the server."""
        if metric == "connections":
            self._connections += amount
            if self.restarting:
                return  # The next engine process is told the sum.
        self._outbox.put(MetricCount(metric, label, amount))

    async def query(self, page: str, argument: int = 0) -> Page:
        """A page of the engine process."""
        number = next(self._handles)
        if self.restarting:
            return _restarting(number)
        answer: asyncio.Future[Page] = asyncio.get_running_loop().create_future()
        self._queries[number] = answer
        try:
            self._outbox.put(Query(number, page, argument))
            return await answer
        finally:
            del self._queries[number]

    def receive(self, data: bytes) -> None:
        """A batch arrived."""
        sessions = self._sessions
        for message in to_front.decode(data):
            if isinstance(message, SessionCommit):
                frame = message.frame
                session = (sessions.pop if frame.finished else sessions.get)(message.handle, None)
                if session is not None:
                    session.listener.committed(session, frame)
            elif isinstance(message, SessionFailed):
                session = sessions.pop(message.handle, None)
                if session is not None:
                    session.listener.failed(session, _refused(message))
            elif isinstance(message, SessionReused):
                if message.handle in sessions:
                    sessions[message.handle].reused = message.tokens
            elif isinstance(message, ServerStatus):
                self.draining, self.load_level = message.draining, message.load_level
            elif isinstance(message, Page):
                waiting = self._queries.get(message.number)
                if waiting is not None and not waiting.done():
                    waiting.set_result(message)
            elif isinstance(message, Stop):
                self.on_stop()


def _restarting(number: int) -> Page:
    return Page(number, 503, b'{"status": "restarting", "ready": false}')


def _refused(message: SessionFailed) -> Refused:
    return Refused(
        message.code,
        message.message,
        retry_ms=message.retry_ms,
        nearest_tokens_per_s=message.tokens_per_s,
    )
