"""HTTP connections with limits: how many there are, and how long a request may take to arrive.

The deadlines follow Apache's mod_reqtimeout: a fixed time, and more while data arrives at a least rate.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections import Counter
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

MIN_BYTES_PER_S = 16_384
MAX_UNWANTED_BYTES = 1 << 20
"""Of a body that was answered before it ended: so many bytes are read and forgotten."""

_LINGER_S = 1.0
_BINARY = 0x82
"""First byte of a whole binary message (RFC 6455, section 5.2)."""

_EXTENSION = "wispprof.connection"
_REQUEST_TIMEOUT = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """``max_connections`` in all, ``per_address`` of one address beyond loopback. ``request_s``: time for the
    head of a request, and likewise for its body. ``write_s``: time that a client may read nothing."""

    max_connections: int = 1024
    per_address: int = 256
    request_s: float = 10.0
    write_s: float = 60.0


@dataclass(eq=False, slots=True)
class ConnectionSlot:
    """An accepted connection; ``abort`` ends it at once."""

    address: str
    abort: Callable[[], object] = lambda: None


class Connections:
    """The open connections of one web server.

    A new one beyond the limit takes the place of the oldest that waits for a request. ``on_drop`` is called
    with the reason whenever a limit closes a connection: ``full``, ``address``, ``evicted``, ``timeout``.
    """

    def __init__(
        self, limits: ConnectionLimits, on_drop: Callable[[str], None] = lambda reason: None
    ) -> None:
        self.limits = limits
        self.on_drop = on_drop
        self._open: set[ConnectionSlot] = set()
        self._waiting: dict[ConnectionSlot, None] = {}
        self._by_address: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._open)

    def admit(self, address: str) -> ConnectionSlot | None:
        """A slot for a connection from there; ``None`` if it must be closed."""
        limits = self.limits
        if self._by_address[address] >= limits.per_address and not _is_loopback(address):
            self.on_drop("address")
            return None
        if len(self._open) >= limits.max_connections and not self.evict():
            self.on_drop("full")
            return None
        slot = ConnectionSlot(address)
        self._open.add(slot)
        self._waiting[slot] = None
        self._by_address[address] += 1
        return slot

    def evict(self) -> bool:
        """Close the connection that has waited longest for a request; false if none waits."""
        for slot in self._waiting:
            self.on_drop("evicted")
            self.release(slot)
            slot.abort()
            return True
        return False

    def waiting(self, slot: ConnectionSlot, waits: bool) -> None:
        """Whether the connection waits for a request."""
        if not waits:
            self._waiting.pop(slot, None)
        elif slot in self._open and slot not in self._waiting:
            self._waiting[slot] = None

    def release(self, slot: ConnectionSlot) -> None:
        """The connection is closed."""
        if slot not in self._open:
            return
        self._open.discard(slot)
        self._waiting.pop(slot, None)
        self._by_address[slot.address] -= 1
        if not self._by_address[slot.address]:
            del self._by_address[slot.address]


class HttpConnection(H11Protocol):
    """uvicorn's HTTP protocol under :class:`ConnectionLimits`."""

    def __init__(self, slot: ConnectionSlot, connections: Connections, **parts: Any) -> None:
        super().__init__(**parts)
        self._slot = slot
        self._connections = connections
        self._phase = ""
        self._phase_bytes = 0
        self._phase_end_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._slot.abort = transport.abort
        self._update_phase()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_timers()
        self._connections.release(self._slot)
        super().connection_lost(exc)
        # After a reset uvicorn leaves this timer, and with it all that belongs to the connection.
        self._unset_keepalive_if_required()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._phase_bytes += len(data)
        self._update_phase()
        if self._phase == "unwanted" and self._phase_bytes > MAX_UNWANTED_BYTES:
            self.flow.pause_reading()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._update_phase()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        self._cancel_timers()
        self._phase = "websocket"
        self._connections.waiting(self._slot, False)
        super().handle_websocket_upgrade(event)
        successor = self.transport.get_protocol()
        if isinstance(successor, WebSocketConnection):
            successor.on_lost = lambda: self._connections.release(self._slot)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(self._connections.limits.write_s, self._drop)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()

    # --- deadlines ---

    def _update_phase(self) -> None:
        """Follow the request: ``head``, ``body``, ``answer``, or ``unwanted``: a body already answered."""
        if self._phase == "websocket":
            return
        theirs = self.conn.their_state
        if theirs is h11.IDLE:
            phase = "head"
        elif theirs is not h11.SEND_BODY:
            phase = "answer"
        else:
            phase = "unwanted" if self.cycle is not None and self.cycle.response_complete else "body"
        if phase == self._phase:
            return
        self._phase, self._phase_bytes = phase, 0
        self._connections.waiting(self._slot, phase in ("head", "unwanted"))
        if phase == "answer":
            return
        if phase == "unwanted" and self.cycle is not None:
            self.cycle.body = bytearray()
        allowed_s = _LINGER_S if phase == "unwanted" else self._connections.limits.request_s
        self._phase_end_s = self.loop.time() + allowed_s
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(allowed_s, self._check_deadline)

    def _check_deadline(self) -> None:
        self._timer = None
        if self._phase not in ("head", "body", "unwanted") or self.transport.is_closing():
            return
        extra_s = self._phase_bytes / MIN_BYTES_PER_S if self._phase == "body" else 0.0
        left_s = self._phase_end_s + extra_s - self.loop.time()
        if left_s > 0.001:
            self._timer = self.loop.call_later(left_s, self._check_deadline)
            return
        if self._phase_bytes and self._phase != "unwanted":
            self.transport.write(_REQUEST_TIMEOUT)
        self._drop()

    def _drop(self) -> None:
        self._connections.on_drop("timeout")
        self.transport.close()
        # A client that reads nothing must not keep the connection.
        self.loop.call_later(_LINGER_S, self.transport.abort)

    def _cancel_timers(self) -> None:
        for timer in (self._timer, self._stalled):
            if timer is not None:
                timer.cancel()


class WebSocketConnection(WebSocketsSansIOProtocol):
    """uvicorn's WebSocket protocol, with a short way past ASGI for the frames of a stream.

    ``on_lost`` is called when the connection is closed. The application finds the connection in its scope
    (:meth:`of`). ``on_message``: offered each binary message as it arrives; one that it does not take goes
    the long way.
    """

    on_lost: Callable[[], None] = staticmethod(lambda: None)
    on_message: Callable[[bytes], bool] = staticmethod(lambda data: False)

    @staticmethod
    def of(scope: MutableMapping[str, Any]) -> WebSocketConnection | None:
        """The connection of a scope; ``None`` under another web server."""
        found: WebSocketConnection | None = scope.get("extensions", {}).get(_EXTENSION)
        return found

    def handle_connect(self, event: Any) -> None:
        super().handle_connect(event)
        if hasattr(self, "scope"):
            self.scope["extensions"][_EXTENSION] = cast(Any, self)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.on_lost()

    def send_receive_event_to_app(self) -> None:
        # A message never overtakes one that waits.
        if self.curr_msg_data_type == "bytes" and self.queue.empty() and not self.close_sent:
            data = self.frames[0] if len(self.frames) == 1 else b"".join(self.frames)
            if self.on_message(data):
                self.frames = []
                return
        super().send_receive_event_to_app()

    def send_now(self, data: bytes) -> bool:
        """Write a binary message at once; false if it must wait for its reader, or cannot be sent."""
        if not (self.handshake_complete and self.writable.is_set()):
            return False
        if self.close_sent or self.disconnected or self.transport.is_closing():
            return False
        size = len(data)
        if size < 126:
            head = bytes((_BINARY, size))
        elif size < 1 << 16:
            head = bytes((_BINARY, 126)) + size.to_bytes(2, "big")
        else:
            head = bytes((_BINARY, 127)) + size.to_bytes(8, "big")
        self.transport.write(head + data)
        return True


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
