"""The engine process's end of the channel to one front."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from wispprof import __version__, protocol
from wispprof.server.admission import Refused
from wispprof.server.channel import (
    BatchWriter,
    FrontConfig,
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
    ToFront,
    to_engine,
)
from wispprof.server.plain_settings import plain_settings
from wispprof.server.server_state import server_state
from wispprof.server.session import ServerSession
from wispprof.sessions.session_state import CommitResult

if TYPE_CHECKING:
    from wispprof.server.verification_server import VerificationServer

log = logging.getLogger("wispprof.server")


class EngineHost:
    """Serves the sessions of one front. ``accepts``: the front accepts connections."""

    def __init__(self, server: VerificationServer) -> None:
        self.server = server
        self.outbox: Outbox[ToFront]
        self.accepts = False
        self.sessions: dict[int, ServerSession] = {}
        self._connections = 0.0
        self._status = ServerStatus(False, 0)

    def connect(self, writer: BatchWriter) -> None:
        """Batches to the front go to ``writer`` from now on."""
        self.outbox = Outbox(writer)
        self.server.hosts.append(self)
        self.update_status()

    def receive(self, data: bytes) -> None:
        """A batch arrived."""
        server, sessions = self.server, self.sessions
        for message in to_engine.decode(data):
            if isinstance(message, SessionDrafts):
                session = sessions.get(message.handle)
                if session is not None:
                    server.draft(session, message.frame)
            elif isinstance(message, SessionOpening):
                self._open(message)
            elif isinstance(message, SessionClosing):
                session = sessions.pop(message.handle, None)
                if session is not None:
                    server.close(session, message.reason)
            elif isinstance(message, MetricCount):
                self._count(message)
            elif isinstance(message, Query):
                self.outbox.put(self._answer(message))
            else:
                self.accepts = True

    def lost(self) -> None:
        """The front is gone, and its connections with it."""
        server = self.server
        if self in server.hosts:
            server.hosts.remove(self)
        self.accepts = False
        sessions, self.sessions = self.sessions, {}
        for session in sessions.values():
            server.close(session)
        server.metrics.connections.dec(self._connections)
        self._connections = 0.0

    def update_status(self) -> None:
        """Tell the front what has changed."""
        status = ServerStatus(self.server.draining, self.server.manager.load_level)
        if status != self._status:
            self._status = status
            self.outbox.put(status)

    def stop(self) -> None:
        self.outbox.put(Stop())
        self.outbox.flush()

    def _open(self, message: SessionOpening) -> None:
        listener = _HostedSession(self, message.handle, message.key, message.kind)
        try:
            session = self.server.open(message.request, listener, message.number)
        except Refused as err:
            failed = SessionFailed(message.handle, err.code, str(err), err.retry_ms, err.nearest_tokens_per_s)
            self.outbox.put(failed)
        else:
            self.sessions[message.handle] = session

    def _count(self, message: MetricCount) -> None:
        metric = getattr(self.server.metrics, message.metric)
        (metric.labels(message.label) if message.label else metric).inc(message.amount)
        if message.metric == "connections":
            self._connections += message.amount

    def _answer(self, query: Query) -> Page:
        server = self.server
        if query.page == "metrics":
            return Page(query.number, 200, server.metrics_text())
        if query.page == "dashboard":
            return Page(query.number, 200, server_state(server, query.argument))
        status = 200
        body: dict[str, Any]
        if query.page == "health":
            body = {"status": server.state, "version": __version__}
            if server.failure:
                body["reason"] = server.failure
                status = 503
        elif query.page == "ready":
            status = 200 if server.ready else 503
            body = {
                "ready": server.ready,
                "status": server.state,
                "target": server.model.id,
                "identity": server.model.identity,
                "policy": server.policy.name,
                "load_level": server.manager.load_level,
                "sessions": len(server.manager),
            }
        elif query.page == "step":
            first, records = server.metrics.steps_since(query.argument)
            held = bool(records) and first == query.argument
            status = 200 if held else 404
            body = {"step": first, **asdict(records[0])} if held else {"first": first}
        else:
            first, records = server.metrics.steps_since(query.argument)
            steps = [asdict(record) for record in records]
            body = {"first": first, "next": server.metrics.steps_seen, "steps": steps}
        return Page(query.number, status, json.dumps(body).encode())


class _HostedSession:
    """The listener of one session of a front."""

    __slots__ = ("_handle", "_host", "key", "kind")

    def __init__(self, host: EngineHost, handle: int, key: str, kind: str) -> None:
        self.key = key
        self.kind = kind
        self._host = host
        self._handle = handle

    def committed(
        self, session: ServerSession, commit: CommitResult, verify_ms: float, load_level: int
    ) -> None:
        host, handle = self._host, self._handle
        if handle not in host.sessions:
            return
        if commit.first and session.reused:
            host.outbox.put(SessionReused(handle, session.reused))
        frame = protocol.commit_frame(session.number, commit, verify_ms, load_level)
        host.outbox.put(SessionCommit(handle, frame))
        if commit.finished:
            del host.sessions[handle]

    def failed(self, session: ServerSession, code: str, message: str, retry_ms: float = 0.0) -> None:
        host, handle = self._host, self._handle
        if host.sessions.pop(handle, None) is not None:
            host.outbox.put(SessionFailed(handle, code, message, retry_ms, 0.0))


def front_config(server: VerificationServer, tokenizer: str = "") -> FrontConfig:
    """The first message to a front of ``server``."""
    return FrontConfig(
        plain_settings(server.settings),
        server.model,
        server.policy.stream,
        server.plan.hash if server.plan else "",
        server.admission.max_prompt,
        tokenizer,
        server.trees,
    )
