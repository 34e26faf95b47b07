"""Connections from an edge to a server: the interface that the client uses, and its WebSocket implementation.

Emulated links and in-process servers implement the same interface.
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
    """The connection ended or could not be established.

    ``final``: another attempt cannot help. ``retry_ms``: time to the next attempt, as the server asked.
    """

    def __init__(self, message: str, hint: str = "", final: bool = False, retry_ms: float = 0.0) -> None:
        super().__init__(message, hint)
        self.final = final
        self.retry_ms = retry_ms


@dataclass(slots=True)
class Traffic:
    """Bytes on the wire, with WebSocket headers and without TCP and TLS."""

    up_bytes: int = 0
    down_bytes: int = 0
    up_frames: int = 0
    down_frames: int = 0

    def sent(self, payload: int) -> int:
        """Count a frame of the client, masked with a 4-byte key (RFC 6455); returns its size."""
        size = payload + _header(payload) + 4
        self.up_bytes += size
        self.up_frames += 1
        return size

    def received(self, payload: int) -> int:
        """Count a frame of the server; returns its size."""
        size = payload + _header(payload)
        self.down_bytes += size
        self.down_frames += 1
        return size

    def add(self, other: Traffic) -> None:
        """Add the traffic of another connection."""
        self.up_bytes += other.up_bytes
        self.down_bytes += other.down_bytes
        self.up_frames += other.up_frames
        self.down_frames += other.down_frames


def _header(payload: int) -> int:
    return 2 if payload < 126 else 4 if payload < 65536 else 10


class RttMeter:
    """Smoothed round trip in ms: mean, mean deviation and minimum (RFC 6298, gains 1/8 and 1/4).

    All start from ``guess_ms`` until the first sample.
    """

    def __init__(self, guess_ms: float = 30.0) -> None:
        self.mean_ms = guess_ms
        self.spread_ms = guess_ms / 2.0
        self.least_ms = guess_ms
        self.samples = 0

    def add(self, sample_ms: float) -> None:
        """Add one measured round trip."""
        if self.samples == 0:
            self.mean_ms, self.spread_ms, self.least_ms = sample_ms, sample_ms / 2.0, sample_ms
        else:
            self.spread_ms += (abs(sample_ms - self.mean_ms) - self.spread_ms) / 4.0
            self.mean_ms += (sample_ms - self.mean_ms) / 8.0
            self.least_ms = min(self.least_ms, sample_ms)
        self.samples += 1


class Connection(Protocol):
    """Carries whole frames in order. Raises :class:`LinkLost` when the link is lost."""

    async def send(self, data: bytes) -> None: ...

    async def receive(self) -> bytes: ...

    async def close(self) -> None:
        """Close the connection; never raises."""


ConnectionFactory = Callable[[], Awaitable[Connection]]
"""Opens a new connection or raises :class:`LinkLost`."""


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
            raise LinkLost(f"The connection ended: {err}.") from err

    async def receive(self) -> bytes:
        from websockets.exceptions import ConnectionClosed

        try:
            data = await self._socket.recv(decode=False)
        except ConnectionClosed as err:
            raise LinkLost(f"The connection ended: {err}.") from err
        return bytes(data)

    async def close(self) -> None:
        with contextlib.suppress(OSError):
            await self._socket.close()


def server_url(text: str) -> str:
    """WebSocket URL of a server address: ``host:8200``, ``http://host:8200`` or ``ws://host:8200/v1/split``.

    Raises :class:`LinkLost` if ``text`` is not an address.
    """
    given = text if "://" in text else f"ws://{text}"
    parts = urlsplit(given)
    scheme = {"http": "ws", "https": "wss"}.get(parts.scheme, parts.scheme)
    if scheme not in ("ws", "wss") or not parts.hostname:
        raise LinkLost(f"{text!r} is not a server address.", "Use HOST:PORT or wss://HOST:PORT.", True)
    path = parts.path if parts.path not in ("", "/") else SPLIT_PATH
    return urlunsplit((scheme, parts.netloc, path, parts.query, ""))


def ssl_context(ca_file: Path | None) -> tls.SSLContext | None:
    """TLS context that trusts the authorities of ``ca_file`` (PEM); ``None`` without a file.

    Raises :class:`WispprofError` if the file has no certificate.
    """
    if ca_file is None:
        return None
    try:
        return tls.create_default_context(cafile=ca_file)
    except OSError as err:  # unreadable, or (SSLError) without a certificate
        raise WispprofError(
            f"{ca_file} is not a certificate authority: {err.strerror or err}.",
            "Give --ca-file a PEM file.",
        ) from err


def websocket_connections(
    url: str, *, timeout_ms: float = 5000.0, ssl: tls.SSLContext | None = None
) -> ConnectionFactory:
    """Connections to a server; ``url`` as in :func:`server_url`. ``ssl``: context for ``wss://``, by
    default that of the system's authorities.

    The client sends its own pings to measure the link. Compression is off because token ids do not compress.
    """
    url = server_url(url)
    secure = url.startswith("wss:")
    ssl_context = (ssl or tls.create_default_context()) if secure else None

    was_connected = False

    async def connect() -> Connection:
        from websockets.asyncio.client import connect
        from websockets.exceptions import (
            InvalidMessage,
            InvalidStatus,
            InvalidURI,
            WebSocketException,
        )

        nonlocal was_connected
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
                f"{url!r} is not a server address.", "Use ws://HOST:PORT or wss://HOST:PORT.", True
            ) from err
        except tls.SSLError as err:
            raise LinkLost(
                f"TLS with {url} failed: {err.reason}.",
                "Check the certificate, or give that of its authority with --ca-file.",
                True,
            ) from err
        except InvalidStatus as err:
            status = err.response.status_code
            if was_connected or status == 503:  # the server or a proxy before it: going away, or starting
                raise LinkLost(f"{url} takes no connections now (HTTP {status}).") from err
            raise LinkLost(
                f"{url} answered HTTP {status} instead of a WebSocket.",
                "Check that the address is that of `wispprof serve`.",
            ) from err
        except InvalidMessage as err:
            if was_connected:
                raise LinkLost(f"{url} closed the connection before it answered.") from err
            raise LinkLost(
                f"{url} did not answer as a WebSocket server.",
                "Check the address." if secure else "If the server uses TLS, use wss://HOST:PORT.",
            ) from err
        except (OSError, TimeoutError, WebSocketException) as err:
            raise LinkLost(f"No server answers at {url}: {err or type(err).__name__}.") from err
        was_connected = True
        return _WebSocket(socket)

    return connect
