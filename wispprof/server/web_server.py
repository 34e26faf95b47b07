"""The web server of both endpoints: uvicorn, with its own accepting, limits and TLS errors."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from wispprof import protocol
from wispprof.errors import WispprofError
from wispprof.server.http_connection import (
    ConnectionLimits,
    Connections,
    ConnectionSlot,
    HttpConnection,
    WebSocketConnection,
)

log = logging.getLogger("wispprof.server")

# A frame just over the protocol's limit gets a problem frame, not a cut connection.
_MAX_MESSAGE_BYTES = protocol.MAX_FRAME_BYTES + (64 << 10)
_RESERVED_DESCRIPTORS = 64
_ACCEPT_PAUSE_S = 0.1
_HANDSHAKE_S = 10.0


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises :class:`WispprofError` if host and port cannot be bound."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except socket.gaierror as err:
        raise WispprofError(f"There is no host {host!r}.", "Check --host.") from err
    except OSError as err:
        if err.errno == errno.EADDRINUSE:
            raise WispprofError(
                f"Port {port} on {host} is in use.",
                "Stop what listens there, or give another --port.",
            ) from err
        raise WispprofError(f"Cannot listen on {host}:{port}: {err.strerror}.") from err


def server_tls(certificate: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """The TLS context of a server; ``None`` without a certificate. Raises :class:`WispprofError` if the files
    are not a certificate chain and its key."""
    if certificate is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(certificate, key)
    except (ssl.SSLError, OSError) as err:
        raise WispprofError(
            f"{certificate} and {key} are not a certificate chain and its private key ({err}).",
            "Give both as PEM, the chain to --tls-cert and the key to --tls-key.",
        ) from err
    return context


def raise_descriptor_limit() -> None:
    """Let this process open as many files as it may. Does nothing where there is no such limit (Windows)."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def within_descriptors(limits: ConnectionLimits) -> ConnectionLimits:
    """The limits, with no more connections than this process's open files allow."""
    try:
        import resource
    except ImportError:
        return limits
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return limits
    return replace(limits, max_connections=max(8, min(limits.max_connections, soft - _RESERVED_DESCRIPTORS)))


@contextlib.contextmanager
def handling_signals(on_signal: Callable[[], None]) -> Iterator[None]:
    """Within, SIGINT and SIGTERM call ``on_signal`` on the running event loop."""
    loop = asyncio.get_running_loop()
    signals = (signal.SIGINT, signal.SIGTERM)
    previous = {one: signal.getsignal(one) for one in signals}
    for one in signals:
        # loop.add_signal_handler does not exist on Windows.
        signal.signal(one, lambda *_: loop.call_soon_threadsafe(on_signal))
    try:
        yield
    finally:
        for one, handler in previous.items():
            signal.signal(one, handler)


class WebServer(uvicorn.Server):
    """Serves ``app`` on a listening socket until :meth:`request_exit`.

    ``on_signal``: called on SIGINT and SIGTERM, which otherwise are not handled here. ``websockets``: whether
    the application takes any. ``on_drop``: see :class:`~wispprof.server.http_connection.Connections`.
    """

    def __init__(
        self,
        app: ASGIApp,
        listener: socket.socket,
        limits: ConnectionLimits | None = None,
        *,
        tls: ssl.SSLContext | None = None,
        websockets: bool = False,
        on_signal: Callable[[], None] | None = None,
        on_drop: Callable[[str], None] = lambda reason: None,
    ) -> None:
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            ws=WebSocketConnection if websockets else "none",
            ws_max_size=_MAX_MESSAGE_BYTES,
            ws_per_message_deflate=False,
            timeout_graceful_shutdown=5,
            server_header=False,
        )
        super().__init__(config)
        self.connections = Connections(within_descriptors(limits or ConnectionLimits()), on_drop)
        self._listener = listener
        self._tls = tls
        self._on_signal = on_signal
        self._exit = asyncio.Event()
        self._accepting: asyncio.Task[None] | None = None
        self._handshakes: set[asyncio.Task[None]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.servers = []
        self._listener.setblocking(False)
        self._accepting = asyncio.create_task(self._accept(), name="accept")
        self.started = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._accepting is not None:
            for task in (self._accepting, *self._handshakes):
                task.cancel()
            await asyncio.gather(self._accepting, *self._handshakes, return_exceptions=True)
        self._listener.close()
        await super().shutdown(sockets)

    async def main_loop(self) -> None:
        # uvicorn polls should_exit ten times a second; an in-process server must end at once.
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._exit.wait(), 0.1)

    def request_exit(self) -> None:
        """Close connections and end."""
        self.should_exit = True
        self._exit.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        with contextlib.nullcontext() if self._on_signal is None else handling_signals(self._on_signal):
            yield

    # --- accepting ---

    async def _accept(self) -> None:
        """One connection at a time, so that the limits hold in a burst, too: asyncio's own server accepts all
        that wait, and writes a traceback for each once descriptors run out."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, peer = await loop.sock_accept(self._listener)
            except ConnectionError:
                continue
            except OSError as err:
                log.warning("cannot accept connections now: %s", err.strerror)
                self.connections.evict()
                await asyncio.sleep(_ACCEPT_PAUSE_S)
                continue
            slot = self.connections.admit(str(peer[0]))
            if slot is None:
                accepted.close()
            else:
                task = asyncio.create_task(self._connect(accepted, slot), name="connect")
                slot.abort = task.cancel
                self._handshakes.add(task)
                task.add_done_callback(self._handshakes.discard)
            await asyncio.sleep(0)

    async def _connect(self, accepted: socket.socket, slot: ConnectionSlot) -> None:
        def protocol_of() -> HttpConnection:
            return HttpConnection(
                slot,
                self.connections,
                config=self.config,
                server_state=self.server_state,
                app_state=self.lifespan.state,
            )

        handshake: dict[str, Any] = {"ssl": self._tls}
        if self._tls is not None:
            handshake["ssl_handshake_timeout"] = _HANDSHAKE_S
        try:
            accepted.setblocking(False)
            with contextlib.suppress(OSError):
                accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await asyncio.get_running_loop().connect_accepted_socket(protocol_of, accepted, **handshake)
        except (OSError, asyncio.CancelledError) as err:
            log.debug("a connection ended before it was ready: %s", err)
            accepted.close()
            self.connections.release(slot)
