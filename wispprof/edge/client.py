"""One edge's connection to a server: hello, many sessions on one link, and reconnecting after a loss.

The client owns the link, not the text of a session. A session registers a :class:`GenerationListener`.
After a reconnect the client asks each listener for its opening frame (prompt and committed tokens) and sends
it again; resuming takes nothing else. Everything runs on one event loop, so calls to a listener cannot
interleave.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from types import TracebackType
from typing import Protocol

from wispprof import protocol
from wispprof.edge.connection import Connection, ConnectionFactory, LinkLost, Traffic
from wispprof.errors import HandshakeRefused, ProtocolError, RuntimeFault, ServerUnreachable
from wispprof.settings.edge_settings import ClientSettings


class RttMeter:
    """Smoothed round trip as TCP keeps it (RFC 6298: gains 1/8 and 1/4). ``guess_ms`` until measured."""

    def __init__(self, guess_ms: float = 30.0) -> None:
        self.mean_ms = guess_ms
        self.spread_ms = guess_ms / 2.0
        self.least_ms = guess_ms
        self.samples = 0

    def add(self, sample_ms: float) -> None:
        """Take in one measured round trip."""
        if self.samples == 0:
            self.mean_ms, self.spread_ms, self.least_ms = sample_ms, sample_ms / 2.0, sample_ms
        else:
            self.spread_ms += (abs(sample_ms - self.mean_ms) - self.spread_ms) / 4.0
            self.mean_ms += (sample_ms - self.mean_ms) / 8.0
            self.least_ms = min(self.least_ms, sample_ms)
        self.samples += 1


_RETRYABLE_CODES = ("busy", "draining")


class GenerationListener(Protocol):
    """A session as the client sees it. Calls come from the event loop, one at a time.

    ``traffic`` counts the session's own frames.
    """

    traffic: Traffic

    def opening(self) -> protocol.Open:
        """The frame that opens or resumes it now (its ``session`` number is filled in)."""

    def committed(self, commit: protocol.Commit) -> None: ...

    def refused(self, problem: protocol.Problem) -> None:
        """The server refused something of this session; it may be reopened."""

    def reopened(self) -> None:
        """The opening frame just left over a new link: what the server knew of drafts is gone."""

    def lost(self) -> None:
        """The link is down; the client is trying to restore it."""

    def failed(self, err: RuntimeFault) -> None:
        """The link will not come back."""


class EdgeClient:
    """Connects to a server and stays connected while it is in use as ``async with`` context.

    Entering connects and raises :class:`HandshakeRefused` or :class:`ServerUnreachable` (the latter
    only when the first session is opened, if the settings say ``offline_ok``). Later losses
    are healed in the background; listeners get :meth:`GenerationListener.failed` once the client gives up.
    """

    def __init__(self, connect: ConnectionFactory, settings: ClientSettings | None = None) -> None:
        self.settings = settings = settings or ClientSettings()
        self.traffic = Traffic()
        self.rtt = RttMeter(settings.rtt_guess_ms)
        self.reconnects = 0
        self.welcome: protocol.Welcome | None = None
        self.load_level = 0
        self._connection_factory = connect
        self._listeners: dict[int, GenerationListener] = {}
        self._next = 0
        self._outgoing: asyncio.Queue[bytes] = asyncio.Queue()
        self._up = False
        self._fault: RuntimeFault | None = None
        self._task: asyncio.Task[None] | None = None
        self._last_received_s = 0.0
        self._pinged: dict[int, float] = {}
        self._pings = 0
        self._random = random.Random()

    # --- life ---

    async def __aenter__(self) -> EdgeClient:
        try:
            connection = await self._connect(asyncio.get_running_loop().time())
        except ServerUnreachable as err:
            if not self.settings.offline_ok:
                raise
            self._fault = err
            return self
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
        for number in list(self._listeners):
            self._listeners.pop(number).failed(RuntimeFault("The edge client was closed."))

    @property
    def up(self) -> bool:
        """Whether the link is up now."""
        return self._up

    # --- sessions ---

    def open(self, listener: GenerationListener) -> int:
        """Register a session and open it; returns its number.

        Raises the fault that ended the connection, if healing it has been given up.
        """
        if self._fault is not None:
            raise self._fault
        number = self._next
        self._next += 1
        self._listeners[number] = listener
        if self._up:
            self._send_opening(number, listener)
        return number

    def reopen(self, number: int) -> None:
        """Open a session anew from its committed tokens, over the link that is up (else later)."""
        listener = self._listeners.get(number)
        if listener is not None and self._up:
            self._send_opening(number, listener)
            listener.reopened()

    def close(self, number: int, *, tell: bool = True) -> None:
        """Forget a session; with ``tell`` the server releases what it holds for it."""
        listener = self._listeners.pop(number, None)
        if listener is not None and tell:
            self._post(protocol.Close(number), listener.traffic)

    def draft(self, frame: protocol.Draft) -> bool:
        """Send a draft frame; returns whether a link was up to send it on."""
        listener = self._listeners.get(frame.session)
        return listener is not None and self._post(frame, listener.traffic)

    def _send_opening(self, number: int, listener: GenerationListener) -> None:
        import msgspec

        self._post(msgspec.structs.replace(listener.opening(), session=number), listener.traffic)

    def _post(self, frame: protocol.EdgeFrame, traffic: Traffic | None = None) -> bool:
        if not self._up:
            return False
        data = protocol.encode(frame)
        self._outgoing.put_nowait(data)
        self.traffic.sent(len(data))
        if traffic is not None:
            traffic.sent(len(data))
        return True

    # --- the link ---

    async def _connect(self, since: float) -> Connection:
        """Connect and say hello, with back-off; gives up ``give_up_ms`` after ``since``."""
        settings, loop = self.settings, asyncio.get_running_loop()
        attempt = 0
        while True:
            try:
                return await self._hello()
            except LinkLost as err:
                if err.final:
                    raise
                gone_ms = (loop.time() - since) * 1000.0
                pause_ms = max(self._pause_ms(attempt), err.retry_ms)
                attempt += 1
                if gone_ms + pause_ms > settings.give_up_ms:
                    raise ServerUnreachable(
                        f"No server for {gone_ms / 1000:.1f} s. {err}".rstrip(),
                        "Start one with `wispprof serve`, or check the address.",
                    ) from err
                await asyncio.sleep(pause_ms / 1000.0)

    def _pause_ms(self, attempt: int) -> float:
        settings = self.settings
        wait_ms = min(settings.backoff_max_ms, settings.backoff_ms * 2.0 ** min(attempt, 16))
        return wait_ms * (1.0 + settings.backoff_jitter * (2.0 * self._random.random() - 1.0))

    async def _hello(self) -> Connection:
        settings, loop = self.settings, asyncio.get_running_loop()
        connection = await self._connection_factory()
        try:
            hello = protocol.encode(
                protocol.Hello(
                    protocol.PROTOCOL_VERSION,
                    settings.tokenizer,
                    settings.target,
                    settings.access.key,
                    settings.name,
                )
            )
            asked = loop.time()
            self.traffic.sent(len(hello))
            await connection.send(hello)
            async with asyncio.timeout(settings.hello_ms / 1000.0):
                data = await connection.receive()
            self.traffic.received(len(data))
            answer = protocol.decode_server(data)
            if isinstance(answer, protocol.Problem):
                self._refused_at_hello(answer)
            if not isinstance(answer, protocol.Welcome):
                raise ProtocolError(
                    "The server answered hello with something else.", "Is it a wispprof server?"
                )
            if answer.protocol != protocol.PROTOCOL_VERSION:
                raise HandshakeRefused(
                    f"The server speaks protocol {answer.protocol}, this edge {protocol.PROTOCOL_VERSION}.",
                    "Install the same version on both sides.",
                )
        except TimeoutError as err:
            await connection.close()
            raise LinkLost("The server did not answer hello in time.") from err
        except BaseException:
            await connection.close()
            raise
        self.rtt.add((loop.time() - asked) * 1000.0)
        self.welcome = answer
        self.load_level = answer.load_level
        return connection

    @staticmethod
    def _refused_at_hello(problem: protocol.Problem) -> None:
        if problem.code in _RETRYABLE_CODES:
            raise LinkLost(f"The server is {problem.code}: {problem.message}", retry_ms=problem.retry_ms)
        raise HandshakeRefused(f"The server refused this edge: {problem.message}")

    async def _run_link(self, connection: Connection) -> None:
        """Serve one connection after the other until the client ends or healing is given up."""
        loop = asyncio.get_running_loop()
        short_lived = 0
        while True:
            born = loop.time()
            self._outgoing = asyncio.Queue()
            self._pinged.clear()
            self._last_received_s = loop.time()
            self._up = True
            for number, listener in list(self._listeners.items()):
                self._send_opening(number, listener)
                listener.reopened()
            try:
                await self._serve(connection)
            finally:
                self._up = False
                await connection.close()
            for listener in list(self._listeners.values()):
                listener.lost()
            gone = loop.time()
            lived_ms = (gone - born) * 1000.0
            short_lived = short_lived + 1 if lived_ms < self.settings.backoff_max_ms else 0
            # Never at once: a restarted server meets all its edges, a broken one must not be hammered.
            await asyncio.sleep(self._pause_ms(short_lived) / 1000.0)
            try:
                connection = await self._connect(gone)
            except RuntimeFault as err:
                self._fault = err
                for number in list(self._listeners):
                    self._listeners.pop(number).failed(err)
                return
            self.reconnects += 1

    async def _serve(self, connection: Connection) -> None:
        """Pump frames both ways until the link is lost or one of the pumps meets a fault."""
        pumps = [
            asyncio.create_task(self._write(connection), name="edge writer"),
            asyncio.create_task(self._read(connection), name="edge reader"),
            asyncio.create_task(self._ping(), name="edge pings"),
        ]
        try:
            done, _ = await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            for pump in done:
                err = pump.exception()
                if err is not None and not isinstance(err, LinkLost | ProtocolError):
                    raise err
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

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
        if isinstance(frame, protocol.Commit):
            self.load_level = frame.load_level
            listener = self._listeners.get(frame.session)
            if listener is not None:
                listener.traffic.down_bytes += size
                listener.traffic.down_frames += 1
                listener.committed(frame)
        elif isinstance(frame, protocol.Pong):
            sent = self._pinged.pop(frame.number, None)
            if sent is not None:
                took_ms = (asyncio.get_running_loop().time() - sent) * 1000.0
                self.rtt.add(max(0.0, took_ms - frame.socket_wait_ms))
        elif isinstance(frame, protocol.Problem):
            if frame.session < 0:
                raise LinkLost(f"The server ended the connection: {frame.message}")
            listener = self._listeners.get(frame.session)
            if listener is not None:
                listener.refused(frame)

    async def _ping(self) -> None:
        settings, loop = self.settings, asyncio.get_running_loop()
        while True:
            if self._listeners or not self._pings:
                self._pinged[self._pings] = loop.time()
                self._post(protocol.Ping(self._pings))
                self._pings += 1
            await asyncio.sleep(settings.ping_ms / 1000.0)
            oldest = min(self._pinged.values(), default=None)
            silent_since = max(self._last_received_s, oldest) if oldest is not None else None
            if silent_since is not None and (loop.time() - silent_since) * 1000.0 > settings.dead_ms:
                raise LinkLost("The link delivers nothing any more.")
