"""The WebSocket endpoint of one edge: reads its frames, holds its sessions, sends their commits.

An invalid frame costs its own connection a clear problem, and no other connection anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from starlette.websockets import WebSocket, WebSocketDisconnect

from wispprof import protocol
from wispprof.errors import HandshakeRefused, ProtocolError
from wispprof.server.admission import Refused
from wispprof.server.engine_client import EngineClient, FrontSession
from wispprof.server.frame_checks import check_draft, check_hello, session_request, welcome
from wispprof.server.http_connection import WebSocketConnection
from wispprof.server.opening_parts import OpeningParts

log = logging.getLogger("wispprof.server")

MAX_PROBLEMS = 64
"""A connection with so many invalid frames is closed."""

MAX_ENDED = 4096
"""Ended session numbers that are remembered, to tell late frames from invalid ones."""

MAX_PONG_BYTES = 1 << 16

MAX_UNREAD_BYTES = 1 << 20
"""Bytes that may wait for a slow reader; a connection with more is closed."""

MAX_KIND = 40
"""Characters of an edge's name that tell its kind."""

MAX_HELLO_BYTES = 1 << 14

_INTERNAL = 1011


class _CloseConnection(Exception):
    """Close the connection with this code, after the queued frames."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class WebSocketEndpoint:
    """Serves one connection until it closes, then releases its sessions."""

    def __init__(self, server: EngineClient, socket: WebSocket) -> None:
        self.key = ""
        self.kind = "edge"
        self._server = server
        self._socket = socket
        self._sessions: dict[int, FrontSession] = {}
        self._ended: dict[int, None] = {}
        self._outgoing: asyncio.Queue[bytes | None] = asyncio.Queue(server.settings.backlog_frames)
        self._unread_bytes = 0
        self._parts = OpeningParts(server.config.max_prompt, server.model.vocab_size)
        self._counted = False
        self._problems = 0
        self._slow_reader = asyncio.Event()
        self._connection = WebSocketConnection.of(socket.scope)

    async def serve(self) -> None:
        await self._socket.accept()
        self._server.count("connections")
        writer = asyncio.create_task(self._write(), name="edge writer")
        reader = asyncio.create_task(self._read(), name="edge reader")
        slow = asyncio.create_task(self._slow_reader.wait(), name="slow edge")
        code = 1000
        try:
            await asyncio.wait([reader, writer, slow], return_when=asyncio.FIRST_COMPLETED)
            if self._slow_reader.is_set():
                code = 1013
                log.warning(
                    "closing an edge with %d unread frames of %d bytes",
                    self._outgoing.qsize(),
                    self._unread_bytes,
                )
            elif reader.done():
                code = _close_code(reader)
                if code == _INTERNAL:
                    self._send(protocol.Problem(-1, "internal", "The server failed on this connection."))
                await self._flush(writer)
        finally:
            for session in self._sessions.values():
                self._server.close(session)
            self._sessions.clear()
            if self._counted:
                self._server.edges_by_key[self.key] -= 1
            for task in (reader, writer, slow):
                task.cancel()
            await asyncio.gather(reader, writer, slow, return_exceptions=True)
            self._server.count("connections", amount=-1.0)
            with contextlib.suppress(RuntimeError, WebSocketDisconnect, OSError):
                await self._socket.close(code)

    # --- reading ------------------------------------------------------------------------------

    async def _read(self) -> None:
        await self._handshake()
        if self._connection is not None:
            self._connection.on_message = self._take_draft
        while True:
            frame = await self._receive()
            if isinstance(frame, protocol.Draft):
                self._draft(frame)
            elif isinstance(frame, protocol.Open):
                self._open(frame)
            elif isinstance(frame, protocol.OpenPart):
                self._open_part(frame)
            elif isinstance(frame, protocol.Close):
                self._close(frame.session)
                self._parts.discard(frame.session)
                self._mark_ended(frame.session)
            elif isinstance(frame, protocol.Ping):
                payload = bytes(min(max(0, frame.reply_bytes), MAX_PONG_BYTES))
                self._send(protocol.Pong(frame.number, payload))
            else:
                self._problem(-1, "frame", "The handshake is done already; got another hello.")
                raise _CloseConnection(1002)

    async def _handshake(self) -> None:
        server = self._server
        timeout_ms = server.settings.hello_timeout_ms
        try:
            async with asyncio.timeout(timeout_ms / 1000.0):
                hello = await self._receive(MAX_HELLO_BYTES)
        except TimeoutError:
            message = f"No hello received for {timeout_ms:,.0f} ms. Send hello first."
            self._problem(-1, "hello", message)
            raise _CloseConnection(1008) from None
        try:
            if not isinstance(hello, protocol.Hello):
                raise HandshakeRefused("The first frame must be hello.", "Send hello first.")
            check_hello(hello, server.model, server.settings.api_keys)
        except HandshakeRefused as err:
            # The message may quote the edge's own, long text.
            log.warning("refused an edge at hello: %.300s", err)
            self._problem(-1, err.code, str(err))
            raise _CloseConnection(1008) from err
        if server.draining:
            self._problem(-1, "draining", "The server is shutting down. Try another server.")
            raise _CloseConnection(1012)
        self.key = hello.key
        self.kind = hello.edge[:MAX_KIND] or "edge"
        self._count_connection()
        self._send(welcome(server))

    def _count_connection(self) -> None:
        server, most = self._server, self._server.settings.connections_per_key
        if not server.settings.api_keys:
            return
        if server.edges_by_key[self.key] >= most:
            message = f"This key has {most} connections, which is its limit. Close some first."
            self._send(protocol.Problem(-1, "busy", message, 1_000.0))
            raise _CloseConnection(1013)
        server.edges_by_key[self.key] += 1
        self._counted = True

    async def _receive(self, max_bytes: int = protocol.MAX_FRAME_BYTES) -> protocol.EdgeFrame:
        message = await self._socket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1006))
        data = message.get("bytes")
        try:
            if data is None:
                raise ProtocolError("Expected a binary (msgpack) frame, got a text frame.")
            if max_bytes < len(data) <= protocol.MAX_FRAME_BYTES:
                raise ProtocolError(f"A hello of {len(data)} bytes exceeds the limit of {max_bytes}.")
            return protocol.decode_edge(data)
        except ProtocolError as err:
            self._problem(-1, "frame", str(err))
            raise _CloseConnection(1002) from err

    def _take_draft(self, data: bytes) -> bool:
        """Pass a valid draft frame of an open session on, which nearly every message is."""
        try:
            frame = protocol.decode_edge(data)
            if (
                not isinstance(frame, protocol.Draft)
                or (session := self._sessions.get(frame.session)) is None
            ):
                return False
            check_draft(frame, self._server.model.vocab_size, self._server.config.trees)
        except ProtocolError:
            return False
        self._server.draft(session, frame)
        return True

    def _open(self, frame: protocol.Open) -> None:
        number = frame.session
        if number < 0:
            self._problem(number, "session", f"Session numbers start at 0, got {number}.")
            return
        # An edge reopens a session it lost track of: close the old one, its KV is reused.
        self._close(number)
        self._ended.pop(number, None)
        tokens = self._parts.take(number, frame.tokens)
        if tokens is None:
            self._mark_ended(number)
            return
        try:
            request = session_request(frame, tokens)
        except ProtocolError as err:
            self._refused(number, err)
        else:
            self._sessions[number] = self._server.open(request, self, number)

    def _open_part(self, frame: protocol.OpenPart) -> None:
        if frame.session < 0:
            self._problem(frame.session, "session", f"Session numbers start at 0, got {frame.session}.")
            return
        try:
            self._parts.add(frame.session, frame.tokens)
        except (Refused, ProtocolError) as err:
            self._refused(frame.session, err)

    def _refused(self, number: int, err: Refused | ProtocolError) -> None:
        self._mark_ended(number)
        if isinstance(err, Refused):
            self._send(protocol.Problem(number, err.code, str(err), err.retry_ms, err.nearest_tokens_per_s))
        else:
            self._problem(number, "frame", str(err))

    def _draft(self, frame: protocol.Draft) -> None:
        session = self._sessions.get(frame.session)
        if session is None:
            # The last drafts of a stream cross with the commit that ends it: not the edge's error.
            if frame.session not in self._ended:
                self._problem(frame.session, "session", "This session is not open. Open it first.")
            return
        try:
            check_draft(frame, self._server.model.vocab_size, self._server.config.trees)
        except ProtocolError as err:
            self._problem(frame.session, "frame", str(err))
            return
        self._server.draft(session, frame)

    def _close(self, number: int) -> None:
        session = self._sessions.pop(number, None)
        if session is not None:
            self._server.close(session)

    def _mark_ended(self, number: int) -> None:
        self._sessions.pop(number, None)
        self._ended[number] = None
        if len(self._ended) > MAX_ENDED:
            del self._ended[next(iter(self._ended))]

    # --- writing ------------------------------------------------------------------------------

    def committed(self, session: FrontSession, frame: protocol.Commit) -> None:
        if self._sessions.get(session.number) is not session:
            return
        if frame.finished:
            self._mark_ended(session.number)
        self._send(frame)

    def failed(self, session: FrontSession, problem: Refused) -> None:
        if self._sessions.get(session.number) is session:
            self._refused(session.number, problem)

    def _problem(self, session: int, code: str, message: str) -> None:
        self._server.count("bad_frames", code)
        self._problems += 1
        self._send(protocol.Problem(session, code, message))
        if self._problems >= MAX_PROBLEMS:
            self._send(protocol.Problem(-1, "frame", "Too many invalid frames on this connection."))
            raise _CloseConnection(1008)

    def _send(self, frame: protocol.ServerFrame) -> None:
        data = protocol.encode(frame)
        connection = self._connection
        if not self._unread_bytes and connection is not None and connection.send_now(data):
            return
        if self._unread_bytes > MAX_UNREAD_BYTES or self._outgoing.full():
            self._slow_reader.set()
            return
        self._unread_bytes += len(data)
        self._outgoing.put_nowait(data)

    async def _write(self) -> None:
        """Send the frames that a slow reader makes wait."""
        while (data := await self._outgoing.get()) is not None:
            await self._socket.send_bytes(data)
            self._unread_bytes -= len(data)

    async def _flush(self, writer: asyncio.Task[None]) -> None:
        """Let the queued frames leave, a problem above all, within a second."""
        with contextlib.suppress(asyncio.QueueFull):
            self._outgoing.put_nowait(None)
        await asyncio.wait([writer], timeout=1.0)


def _close_code(reader: asyncio.Task[None]) -> int:
    err = reader.exception()
    if isinstance(err, _CloseConnection):
        return err.code
    if isinstance(err, WebSocketDisconnect):
        return 1000
    log.error("an edge's connection failed", exc_info=err)
    return _INTERNAL
