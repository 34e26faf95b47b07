"""Connections from an edge to a server: what the client needs of one, and the WebSocket kind.

A :class:`Connection` carries whole frames in order. Emulated links and in-process servers stand behind
the same four methods, so the client never knows what it talks through.
"""

from __future__ import annotations

import contextlib
import ssl as tls
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit, urlunsplit

from wispprof.errors import RuntimeFault, WispprofError
from wispprof.protocol import MAX_FRAME_BYTES

SPLIT_PATH = "/v1/split"


class LinkLost(RuntimeFault):
    """The connection ended, or could not be made.

    ``final``: trying again is of no use. ``retry_ms``: the server asked not to come back sooner.
    """

    def __init__(self, message: str, hint: str = "", final: bool = False, retry_ms: float = 0.0) -> None:
        super().__init__(message, hint)
        self.final = final
        self.retry_ms = retry_ms


@dataclass(slots=True)
class Traffic:
    """Bytes on the wire, WebSocket headers included, TCP and TLS not."""

    up_bytes: int = 0
    down_bytes: int = 0
    up_frames: int = 0
    down_frames: int = 0

    def sent(self, payload: int) -> int:
        """Count a frame of the client (RFC 6455: masked, so 4 bytes of key); returns its bytes."""
        size = payload + _header(payload) + 4
        self.up_bytes += size
        self.up_frames += 1
        return size

    def received(self, payload: int) -> int:
        """Count a frame of the server; returns its bytes."""
        size = payload + _header(payload)
        self.down_bytes += size
        self.down_frames += 1
        return size

    def add(self, other: Traffic) -> None:
        """Count another connection's traffic too."""
        self.up_bytes += other.up_bytes
        self.down_bytes += other.down_bytes
        self.up_frames += other.up_frames
        self.down_frames += other.down_frames


def _header(payload: int) -> int:
    return 2 if payload < 126 else 4 if payload < 65536 else 10


class Connection(Protocol):
    """Whole frames, in order. Every method raises :class:`LinkLost` once the link is gone."""

    async def send(self, data: bytes) -> None: ...

    async def receive(self) -> bytes: ...

    async def close(self) -> None:
        """End it; never raises."""


ConnectionFactory = Callable[[], Awaitable[Connection]]
"""Makes a fresh connection, or raises :class:`LinkLost`."""


class _WebSocket:
    def __init__(self, socket: object) -> None:
        from websockets.asyncio.client import ClientConnection

        assert isinstance(socket, ClientConnection)
        self._socket = socket

    async def send(self, data: bytes) -> None:
        from websockets.exceptions import ConnectionClosed

        try:
            await self._socket.send(data)
        except ConnectionClosed as err:
            raise LinkLost(f"The server's connection ended: {err}.") from err

    async def receive(self) -> bytes:
        from websockets.exceptions import ConnectionClosed

        try:
            data = await self._socket.recv(decode=False)
        except ConnectionClosed as err:
            raise LinkLost(f"The server's connection ended: {err}.") from err
        return bytes(data)

    async def close(self) -> None:
        with contextlib.suppress(OSError):
            await self._socket.close()


def server_url(text: str) -> str:
    """A server's address as people write it, as a WebSocket URL.

    ``host:8200``, ``http://host:8200`` and ``ws://host:8200/v1/split`` all mean the same door.
    Raises :class:`LinkLost` where it is no address.
    """
    given = text if "://" in text else f"ws://{text}"
    parts = urlsplit(given)
    scheme = {"http": "ws", "https": "wss"}.get(parts.scheme, parts.scheme)
    if scheme not in ("ws", "wss") or not parts.hostname:
        raise LinkLost(f"{text!r} is no server address.", "Use HOST:PORT or wss://HOST:PORT.", True)
    path = parts.path if parts.path not in ("", "/") else SPLIT_PATH
    return urlunsplit((scheme, parts.netloc, path, parts.query, ""))


def ssl_context(ca_file: Path | None) -> tls.SSLContext | None:
    """Trust in servers that the authorities of ``ca_file`` (PEM) vouch for; ``None`` is the system's own.

    Raises :class:`WispprofError` where the file is no such thing.
    """
    if ca_file is None:
        return None
    try:
        return tls.create_default_context(cafile=ca_file)
    except OSError as err:  # an unreadable file, or (SSLError) one that holds no certificate
        raise WispprofError(
            f"{ca_file} is no certificate authority: {err.strerror or err}.",
            "Give --ca-file a PEM file.",
        ) from err


def websocket_connections(
    url: str, *, timeout_ms: float = 5000.0, ssl: tls.SSLContext | None = None
) -> ConnectionFactory:
    """Dial a server (see :func:`server_url` for addresses). ``ssl`` replaces the system's trust for ``wss://``.

    Keep-alive is the client's business (its pings also measure the link), compression is off: token ids
    do not compress, and every frame would pay for the attempt.
    """

    url = server_url(url)
    secure = url.startswith("wss:")
    ssl_context = (ssl or tls.create_default_context()) if secure else None

    async def connect() -> Connection:
        from websockets.asyncio.client import connect
        from websockets.exceptions import (
            InvalidMessage,
            InvalidStatus,
            InvalidURI,
            WebSocketException,
        )

        try:
            socket = await connect(
                url,
                open_timeout=timeout_ms / 1000.0,
                close_timeout=1.0,
                ping_interval=None,
                compression=None,
                max_size=MAX_FRAME_BYTES,
                ssl=ssl_context,
                proxy=None,
            )
        except InvalidURI as err:
            raise LinkLost(
                f"{url!r} is no server address.", "Use ws://HOST:PORT or wss://HOST:PORT.", True
            ) from err
        except tls.SSLError as err:
            raise LinkLost(
                f"TLS with {url} failed: {err.reason}.",
                "Check the certificate, or name its authority's with --ca-file.",
                True,
            ) from err
        except InvalidStatus as err:
            raise LinkLost(
                f"{url} answered HTTP {err.response.status_code} instead of a WebSocket.",
                "Check the address: it must be one of `wispprof serve`.",
            ) from err
        except InvalidMessage as err:
            raise LinkLost(
                f"{url} is not a WebSocket server.",
                "Check the address." if secure else "If the server uses TLS, connect to wss://HOST:PORT.",
            ) from err
        except (OSError, TimeoutError, WebSocketException) as err:
            raise LinkLost(f"No server answers at {url}: {err or type(err).__name__}.") from err
        return _WebSocket(socket)

    return connect
