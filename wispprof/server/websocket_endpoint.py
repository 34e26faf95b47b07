"""The WebSocket endpoint of one edge: reads its frames, holds its sessions, sends their commits.

An invalid frame costs its own connection a clear problem, and no other connection anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
import math
from collections.abc import Sequence

from starlette.websockets import WebSocket, WebSocketDisconnect

from wispprof import protocol
from wispprof.errors import HandshakeRefused, ProtocolError
from wispprof.server.admission import Refused
from wispprof.server.coalescing_loop import socket_wait_ms
from wispprof.server.session import ServerSession
from wispprof.server.verification_server import VerificationServer
from wispprof.sessions.session_state import CommitResult
from wispprof.types import GenerationRequest, Sampling, ServedModel, Slo

log = logging.getLogger("wispprof.server")

MAX_PROBLEMS = 64
"""A connection with so many invalid frames is closed."""

MAX_ENDED = 4096
"""Ended session numbers that are remembered, to tell late frames from invalid ones."""

MAX_PONG_BYTES = 1 << 16


class _CloseConnection(Exception):
    """Close the connection with this code, after the queued frames."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class WebSocketEndpoint:
    """Serves one connection until it closes, then releases its sessions."""

    def __init__(self, server: VerificationServer, socket: WebSocket) -> None:
        self.key = ""
        self._server = server
        self._socket = socket
        self._sessions: dict[int, ServerSession] = {}
        self._ended: dict[int, None] = {}
        self._outgoing: asyncio.Queue[bytes | None] = asyncio.Queue(server.settings.backlog_frames)
        self._problems = 0
        self._slow_reader = asyncio.Event()

    async def serve(self) -> None:
        await self._socket.accept()
        self._server.metrics.connections.inc()
        writer = asyncio.create_task(self._write(), name="edge writer")
        reader = asyncio.create_task(self._read(), name="edge reader")
        slow = asyncio.create_task(self._slow_reader.wait(), name="slow edge")
        code = 1000
        try:
            await asyncio.wait([reader, writer, slow], return_when=asyncio.FIRST_COMPLETED)
            if self._slow_reader.is_set():
                code = 1013
                log.warning("closing an edge with %d unread frames", self._outgoing.qsize())
            elif reader.done():
                code = _close_code(reader)
                await self._flush(writer)
        finally:
            for session in self._sessions.values():
                self._server.close(session)
            self._sessions.clear()
            for task in (reader, writer, slow):
                task.cancel()
            await asyncio.gather(reader, writer, slow, return_exceptions=True)
            self._server.metrics.connections.dec()
            with contextlib.suppress(RuntimeError, WebSocketDisconnect, OSError):
                await self._socket.close(code)

    # --- reading ------------------------------------------------------------------------------

    async def _read(self) -> None:
        await self._handshake()
        while True:
            frame = await self._receive()
            if isinstance(frame, protocol.Draft):
                self._draft(frame)
            elif isinstance(frame, protocol.Open):
                self._open(frame)
            elif isinstance(frame, protocol.Close):
                self._close(frame.session)
                self._mark_ended(frame.session)
            elif isinstance(frame, protocol.Ping):
                payload = bytes(min(max(0, frame.reply_bytes), MAX_PONG_BYTES))
                waited_ms = protocol.brief_ms(socket_wait_ms())
                self._send(protocol.Pong(frame.number, payload, waited_ms))
            else:
                self._problem(-1, "frame", "The handshake is done already; got another hello.")
                raise _CloseConnection(1002)

    async def _handshake(self) -> None:
        server = self._server
        timeout_ms = server.settings.hello_timeout_ms
        try:
            async with asyncio.timeout(timeout_ms / 1000.0):
                hello = await self._receive()
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
            self._problem(-1, "hello", str(err))
            raise _CloseConnection(1008) from err
        if server.draining:
            self._problem(-1, "draining", "The server is shutting down. Try another server.")
            raise _CloseConnection(1012)
        self.key = hello.key
        self._send(
            protocol.Welcome(
                protocol=protocol.PROTOCOL_VERSION,
                target=server.model.id,
                tokenizer=server.model.tokenizer,
                max_context=server.model.max_context,
                max_drafts=server.settings.max_drafts,
                stream=server.policy.stream,
                load_level=server.manager.load_level,
                plan=server.plan.hash if server.plan else "",
            )
        )

    async def _receive(self) -> protocol.EdgeFrame:
        message = await self._socket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1006))
        data = message.get("bytes")
        try:
            if data is None:
                raise ProtocolError("Expected a binary (msgpack) frame, got a text frame.")
            return protocol.decode_edge(data)
        except ProtocolError as err:
            self._problem(-1, "frame", str(err))
            raise _CloseConnection(1002) from err

    def _open(self, frame: protocol.Open) -> None:
        number = frame.session
        if number < 0:
            self._problem(number, "session", f"Session numbers start at 0, got {number}.")
            return
        # An edge reopens a session it lost track of: close the old one, its KV is reused.
        self._close(number)
        self._ended.pop(number, None)
        try:
            self._sessions[number] = self._server.open(session_request(frame), self, number)
        except Refused as err:
            self._mark_ended(number)
            self._send(protocol.Problem(number, err.code, str(err), err.retry_ms, err.nearest_tokens_per_s))
        except ProtocolError as err:
            self._mark_ended(number)
            self._problem(number, "frame", str(err))

    def _draft(self, frame: protocol.Draft) -> None:
        session = self._sessions.get(frame.session)
        if session is None:
            # The last drafts of a stream cross with the commit that ends it: not the edge's error.
            if frame.session not in self._ended:
                self._problem(frame.session, "session", "This session is not open. Open it first.")
            return
        try:
            check_draft(frame, self._server.model.vocab_size)
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

    def committed(
        self, session: ServerSession, commit: CommitResult, verify_ms: float, load_level: int
    ) -> None:
        if self._sessions.get(session.number) is not session:
            return
        if commit.finished:
            self._mark_ended(session.number)
        self._send(
            protocol.Commit(
                session=session.number,
                epoch=commit.epoch,
                committed_len=commit.committed_len,
                tokens=list(commit.tokens),
                accepted=commit.accepted,
                drafted=commit.drafted,
                queue_ms=protocol.brief_ms(commit.queue_ms),
                verify_ms=protocol.brief_ms(verify_ms),
                load_level=load_level,
                finished=commit.finished,
            )
        )

    def failed(self, session: ServerSession, code: str, message: str, retry_ms: float = 0.0) -> None:
        if self._sessions.get(session.number) is session:
            self._mark_ended(session.number)
            self._send(protocol.Problem(session.number, code, message, retry_ms))

    def _problem(self, session: int, code: str, message: str) -> None:
        self._server.metrics.bad_frames.labels(code).inc()
        self._problems += 1
        self._send(protocol.Problem(session, code, message))
        if self._problems >= MAX_PROBLEMS:
            self._send(protocol.Problem(-1, "frame", "Too many invalid frames on this connection."))
            raise _CloseConnection(1008)

    def _send(self, frame: protocol.ServerFrame) -> None:
        try:
            self._outgoing.put_nowait(protocol.encode(frame))
        except asyncio.QueueFull:
            self._slow_reader.set()

    async def _write(self) -> None:
        while (data := await self._outgoing.get()) is not None:
            await self._socket.send_bytes(data)

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
    return 1011


# --- checks of frames that need the model or the keys ---------------------------------------------


def check_key(key: str, allowed: Sequence[str]) -> bool:
    """Whether ``key`` is one of ``allowed``; an empty list allows all. Takes constant time."""
    if not allowed:
        return True
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    valid = False
    for one in allowed:
        valid |= hmac.compare_digest(digest, hashlib.sha256(one.encode()).digest())
    return valid


def check_hello(hello: protocol.Hello, model: ServedModel, allowed: Sequence[str]) -> None:
    """Raise :class:`HandshakeRefused` unless protocol, key, target and tokenizer match."""
    if hello.protocol != protocol.PROTOCOL_VERSION:
        raise HandshakeRefused(
            f"This server speaks protocol {protocol.PROTOCOL_VERSION}, the edge {hello.protocol}.",
            "Install the same wispprof version on both sides.",
        )
    if not check_key(hello.key, allowed):
        raise HandshakeRefused("Invalid API key.", "Use a key of this server.")
    if hello.target and hello.target != model.id:
        raise HandshakeRefused(
            f"This server verifies {model.id!r}, not {hello.target!r}.",
            "Plan for that target, or connect to another server.",
        )
    if hello.tokenizer and hello.tokenizer != model.tokenizer:
        raise HandshakeRefused(
            f"The edge's tokenizer ({hello.tokenizer[:12]}…) is not the target's ({model.tokenizer[:12]}…).",
            "Use a draft model of the target's own family.",
        )


def session_request(frame: protocol.Open) -> GenerationRequest:
    """The request of an opening frame. Raises :class:`ProtocolError` on invalid sampling or SLO."""
    try:
        sampling = Sampling(frame.temperature, frame.top_k, frame.top_p, frame.seed)
        slo = Slo.of(frame.tokens_per_s, frame.ttft_ms)
        numbers = (frame.temperature, frame.top_p, frame.tokens_per_s, frame.ttft_ms or 0.0)
        if not all(map(math.isfinite, numbers)) or (frame.ttft_ms or 1.0) <= 0:
            raise ValueError("sampling and SLO need finite, positive numbers")
    except ValueError as err:
        raise ProtocolError(f"Invalid opening frame: {err}.", "Correct the request.") from err
    return GenerationRequest(
        tokens=tuple(frame.tokens),
        max_new=frame.max_new,
        slo=slo,
        sampling=sampling,
        generated=frame.generated,
        stop_tokens=tuple(frame.stop),
        undrafted=frame.undrafted,
    )


def check_draft(frame: protocol.Draft, vocab_size: int) -> None:
    """Raise :class:`ProtocolError` on drafts that no correct edge sends."""
    tokens, probs = frame.tokens, frame.acceptance_prob
    if len(probs) != len(tokens):
        reason = f"{len(tokens)} drafts with {len(probs)} acceptance bytes"
    elif tokens and (min(tokens) < 0 or max(tokens) >= vocab_size):
        reason = f"a token outside the vocabulary of {vocab_size}"
    else:
        return
    raise ProtocolError(f"Invalid draft frame: {reason}.", "Use a client of the same protocol version.")
