"""One edge's connection to a server: handshake, many sessions on one link, and reconnecting after a loss.

The client owns the link, not the text of a session. A session registers a :class:`GenerationListener`.
After a reconnect the client asks each listener for its opening frame (prompt and committed tokens) and sends
it again; this resumes the session. All calls come from one event loop, so they cannot interleave.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
from collections.abc import Iterable
from types import TracebackType
from typing import Protocol

from wispprof import protocol
from wispprof.edge import handshake, server_frames
from wispprof.edge.connection import Connection, ConnectionFactory, LinkLost, RttMeter, Traffic
from wispprof.edge.opening_frames import opening_frames
from wispprof.errors import ProtocolError, RuntimeFault
from wispprof.settings.edge_settings import ClientSettings
from wispprof.types import ServedModel

log = logging.getLogger("wispprof.edge")


class GenerationListener(Protocol):
    """Callbacks of one session, called on the event loop. ``traffic`` counts the session's own frames."""

    traffic: Traffic

    def opening(self) -> protocol.Open:
        """The frame that opens or resumes the session; the client fills in ``session``."""

    def committed(self, commit: protocol.Commit) -> None: ...

    def refused(self, problem: protocol.Problem) -> None:
        """The server refused something of this session; it may be reopened."""

    def reopened(self) -> None:
        """The opening frame was sent again; the server has none of the earlier drafts."""

    def lost(self) -> None:
        """The link is down; the client reconnects."""

    def failed(self, err: RuntimeFault) -> None:
        """The session ended: no server for too long, another target, or a fault. It is forgotten."""


class EdgeClient:
    """Connects to a server and stays connected inside ``async with``.

    Entering raises :class:`HandshakeRefused`, or :class:`~wispprof.errors.ServerUnreachable` after
    ``give_up_ms``; with ``offline_ok`` the latter fails sessions instead. The client restores a lost link for
    as long as it runs. After ``give_up_ms`` without a server, open sessions fail; one that is opened later
    fails if one more attempt does. If the server then serves another target, open sessions fail.

    ``target_changes``: reconnects that found another target. ``bad_frames``: invalid frames received.
    """

    def __init__(self, connect: ConnectionFactory, settings: ClientSettings | None = None) -> None:
        self.settings = settings = settings or ClientSettings()
        self.traffic = Traffic()
        self.rtt = RttMeter(settings.rtt_guess_ms)
        self.reconnects = 0
        self.target_changes = 0
        self.bad_frames = 0
        self.welcome: protocol.Welcome | None = None
        self._identity = ""
        self.target: ServedModel | None = None
        self.load_level = 0
        self.fault: RuntimeFault | None = None
        self._connection_factory = connect
        self._listeners: dict[int, GenerationListener] = {}
        self._next = 0
        self._outgoing: asyncio.Queue[bytes] = asyncio.Queue()
        self._up = False
        self._task: asyncio.Task[None] | None = None
        self._opened = asyncio.Event()
        self._last_received_s = 0.0
        self._draining_until_s = 0.0
        self._ping_sent_s: dict[int, float] = {}
        self._pings = 0
        self._random = random.Random()

    # --- lifetime ---

    async def __aenter__(self) -> EdgeClient:
        connection = await self._connect()
        self._task = asyncio.create_task(self._run_link(connection), name="edge link")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        err: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None
        self._fail(list(self._listeners), RuntimeFault("The edge client was closed."))

    @property
    def up(self) -> bool:
        """Whether the link is up now. While it is not, :attr:`fault` says why sessions fail; ``None``: they
        still wait."""
        return self._up

    @property
    def draining(self) -> bool:
        """Whether this server refused a session because it shuts down: sessions wait for the next one."""
        return self._up and asyncio.get_running_loop().time() < self._draining_until_s

    # --- sessions ---

    def open(self, listener: GenerationListener) -> int:
        """Register a session and open it, if need be once the link is restored; returns its number.

        Raises :class:`SettingsError` if the opening frame has a value that no frame can hold.
        """
        if self._task is None:
            raise RuntimeFault("The edge client is closed.", "Use it inside `async with`.")
        number = self._next
        frames = opening_frames(number, listener.opening()) if self._up else []
        self._next += 1
        self._listeners[number] = listener
        self._post_all(frames, listener)
        self._opened.set()
        return number

    def reopen(self, number: int) -> None:
        """Open a session again from its committed tokens; if the link is down, once it is restored."""
        listener = self._listeners.get(number)
        if listener is not None and self._up:
            self._reopen(number, listener)

    def close(self, number: int, *, tell: bool = True) -> None:
        """Forget a session; with ``tell`` the server releases what it holds for it."""
        listener = self._listeners.pop(number, None)
        if listener is not None and tell:
            self._post(protocol.encode(protocol.Close(number)), listener.traffic)

    def draft(self, frame: protocol.Draft) -> bool:
        """Send a draft frame; returns whether a link was up to send it on."""
        listener = self._listeners.get(frame.session)
        return listener is not None and self._post(protocol.encode(frame), listener.traffic)

    def _reopen(self, number: int, listener: GenerationListener) -> None:
        try:
            self._post_all(opening_frames(number, listener.opening()), listener)
            listener.reopened()
        except Exception as err:
            self._fail([number], _internal(err))

    def _fail(self, numbers: Iterable[int], err: RuntimeFault) -> None:
        for number in numbers:
            listener = self._listeners.pop(number, None)
            if listener is not None:
                listener.failed(err)

    def _post_all(self, frames: Iterable[bytes], listener: GenerationListener) -> None:
        for data in frames:
            self._post(data, listener.traffic)

    def _post(self, data: bytes, traffic: Traffic | None = None) -> bool:
        if not self._up:
            return False
        self._outgoing.put_nowait(data)
        self.traffic.sent(len(data))
        if traffic is not None:
            traffic.sent(len(data))
        return True

    # --- connecting ---

    async def _connect(self) -> Connection | None:
        """The first connection; ``None`` if there is no server and the settings allow that."""
        loop = asyncio.get_running_loop()
        begun_s, attempt = loop.time(), 0
        while True:
            try:
                return await self._hello()
            except LinkLost as err:
                if err.final:
                    raise
                down_ms = (loop.time() - begun_s) * 1000.0
                fault = handshake.unreachable(down_ms, err)
                if self.settings.offline_ok:
                    self.fault = fault
                    return None
                pause_ms = self._pause_left_ms(attempt, err.retry_ms, down_ms)
                if pause_ms is None:
                    raise fault from err
                attempt += 1
                if attempt == 1:
                    give_up_s = self.settings.give_up_ms / 1000.0
                    log.warning("no server yet: trying for %.0f s (%s)", give_up_s, err)
            await asyncio.sleep(pause_ms / 1000.0)

    async def _reconnect(self, lost_s: float, pause_ms: float) -> Connection:
        """A new connection, however long that takes; fails sessions meanwhile as :class:`EdgeClient` says."""
        loop, settings = asyncio.get_running_loop(), self.settings
        attempt, minimum_ms = 0, pause_ms
        log.warning("no link to the server: connecting")
        while True:
            await self._pause(pause_ms, minimum_ms)
            self._opened.clear()
            waiting = list(self._listeners)
            try:
                connection = await self._hello()
            except handshake.TargetChanged as err:
                log.warning("%.500s", err)
                self._fail(list(self._listeners), handshake.refusal())
                self._identity = ""  # or new sessions, one after the other, would ask for it for ever
                pause_ms = minimum_ms = self._pause_ms(0)
                continue
            except Exception as err:
                fault = err if isinstance(err, RuntimeFault) else LinkLost(f"Cannot connect: {err!r:.200}")
                retry_ms = fault.retry_ms if isinstance(fault, LinkLost) else 0.0
                down_ms = (loop.time() - lost_s) * 1000.0
                pause_left_ms = self._pause_left_ms(attempt, retry_ms, down_ms)
                pause_ms = pause_left_ms or max(self._pause_ms(attempt), retry_ms)
                minimum_ms = max(min(pause_ms, settings.backoff_ms), retry_ms)
                attempt += 1
                failing = self.fault is not None
                if not isinstance(fault, LinkLost) or fault.final:
                    self.fault = fault
                elif failing or pause_left_ms is None:
                    self.fault = handshake.unreachable(down_ms, fault)
                if self.fault is not None:
                    if not failing:
                        log.warning("requests fail until a server answers: %.500s", self.fault)
                    self._fail(waiting, self.fault)
            else:
                self.fault = None
                log.warning("the link to the server is up, after %.1f s", loop.time() - lost_s)
                return connection

    async def _pause(self, pause_ms: float, minimum_ms: float) -> None:
        """Wait for ``pause_ms``, but after ``minimum_ms`` no longer than until a session is opened."""
        await asyncio.sleep(minimum_ms / 1000.0)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, pause_ms - minimum_ms) / 1000.0):
                await self._opened.wait()

    def _pause_ms(self, attempt: int) -> float:
        settings = self.settings
        wait_ms = min(settings.backoff_max_ms, settings.backoff_ms * 2.0 ** min(attempt, 16))
        return wait_ms * (1.0 + settings.backoff_jitter * (2.0 * self._random.random() - 1.0))

    def _pause_left_ms(self, attempt: int, retry_ms: float, down_ms: float) -> float | None:
        """The next pause; the last attempt is at ``give_up_ms``. ``None`` if none is left."""
        left_ms = self.settings.give_up_ms - down_ms
        if left_ms < max(1.0, retry_ms):
            return None
        return max(min(self._pause_ms(attempt), left_ms), retry_ms)

    async def _hello(self) -> Connection:
        """Connect and exchange hello and welcome."""
        settings, loop = self.settings, asyncio.get_running_loop()
        known = self._identity if self._listeners else ""
        connection = await self._connection_factory()
        sent_s = loop.time()
        try:
            welcome = await handshake.say_hello(connection, settings, known, self.traffic)
        except BaseException as err:
            self.bad_frames += isinstance(err, ProtocolError)
            await connection.close()
            raise
        self.rtt.add((loop.time() - sent_s) * 1000.0)
        self._welcomed(welcome)
        return connection

    def _welcomed(self, welcome: protocol.Welcome) -> None:
        if self.welcome is not None and not handshake.same_target(self.welcome, welcome):
            self.target_changes += 1
            log.warning("the server serves %s now", handshake.name_target(welcome))
            self._fail(list(self._listeners), handshake.refusal())
        self.welcome, self._identity = welcome, welcome.identity
        self._draining_until_s = 0.0
        self.target = handshake.served_model(welcome)
        self.load_level = server_frames.load_level(welcome.load_level)

    # --- the link ---

    async def _run_link(self, connection: Connection | None) -> None:
        """Run one connection after the other until the client is closed."""
        loop = asyncio.get_running_loop()
        short_lived = 0
        lost_s, pause_ms = loop.time(), self._pause_ms(0)
        while True:
            if connection is None:
                connection = await self._reconnect(lost_s, pause_ms)
                self.reconnects += 1
            up_s = self._last_received_s = loop.time()
            self._outgoing = asyncio.Queue()
            self._ping_sent_s.clear()
            self._up = True
            for number, listener in list(self._listeners.items()):
                self._reopen(number, listener)
            try:
                await self._serve(connection)
            finally:
                self._up = False
                await connection.close()
                connection = None
            for listener in list(self._listeners.values()):
                listener.lost()
            lost_s = loop.time()
            lived_ms = (lost_s - up_s) * 1000.0
            short_lived = short_lived + 1 if lived_ms < self.settings.backoff_max_ms else 0
            # All edges of a restarted server reconnect at once; the random pause spreads them.
            pause_ms = self._pause_ms(short_lived)

    async def _serve(self, connection: Connection) -> None:
        """Send and receive frames until the link is lost or a frame is invalid."""
        tasks = [
            asyncio.create_task(self._write(connection), name="edge writer"),
            asyncio.create_task(self._read(connection), name="edge reader"),
            asyncio.create_task(self._ping(), name="edge pings"),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for err in (task.exception() for task in done):
                self.bad_frames += isinstance(err, ProtocolError)
                if not isinstance(err, LinkLost):
                    log.warning("closing the connection: %s: %.300s", type(err).__name__, err)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _write(self, connection: Connection) -> None:
        while True:
            await connection.send(await self._outgoing.get())

    async def _read(self, connection: Connection) -> None:
        loop = asyncio.get_running_loop()
        while True:
            data = await connection.receive()
            self._last_received_s = loop.time()
            size = self.traffic.received(len(data))
            self._dispatch(protocol.decode_server(data), size)

    def _dispatch(self, frame: protocol.ServerFrame, size: int) -> None:
        if isinstance(frame, protocol.Pong):
            sent_s = self._ping_sent_s.pop(frame.number, None)
            if sent_s is not None:
                self.rtt.add((asyncio.get_running_loop().time() - sent_s) * 1000.0)
            return
        if not isinstance(frame, protocol.Commit | protocol.Problem):
            raise ProtocolError(f"Got a second {type(frame).__name__} frame.")
        if isinstance(frame, protocol.Problem) and frame.session < 0:
            raise LinkLost(f"The server ended the connection: {frame.message:.500}")
        listener = self._listeners.get(frame.session)
        if listener is None:  # its last frames cross with the edge's close
            return
        listener.traffic.down_bytes += size
        listener.traffic.down_frames += 1
        try:
            if isinstance(frame, protocol.Commit):
                self.load_level = server_frames.load_level(frame.load_level)
                listener.committed(frame)
            else:
                if frame.code == "draining" and not frame.retry_ms:
                    now_s = asyncio.get_running_loop().time()
                    self._draining_until_s = now_s + self.settings.give_up_ms / 1000.0
                listener.refused(frame)
        except Exception as err:
            self.bad_frames += isinstance(err, ProtocolError)
            self._post(protocol.encode(protocol.Close(frame.session)))
            self._fail([frame.session], err if isinstance(err, RuntimeFault) else _internal(err))

    async def _ping(self) -> None:
        settings, loop = self.settings, asyncio.get_running_loop()
        sent_s = -math.inf
        while True:
            # An idle link is measured less often, but a dead one is noticed.
            if self._listeners or (loop.time() - sent_s) * 1000.0 >= settings.dead_ms:
                sent_s = self._ping_sent_s[self._pings] = loop.time()
                self._post(protocol.encode(protocol.Ping(self._pings)))
                self._pings += 1
            await asyncio.sleep(settings.ping_ms / 1000.0)
            oldest_s = min(self._ping_sent_s.values(), default=math.inf)
            silent_ms = (loop.time() - max(self._last_received_s, oldest_s)) * 1000.0
            if silent_ms > settings.dead_ms:
                raise LinkLost(f"No data received for {silent_ms:,.0f} ms.")


def _internal(err: Exception) -> RuntimeFault:
    log.error("a session failed: %s: %.300s", type(err).__name__, err)
    return RuntimeFault(f"Internal error of the edge: {type(err).__name__}: {err}")
