"""The channel between a front, which holds connections, and the engine process, which holds sessions.

Both directions carry batches of messages in order, each batch one msgpack array. A front that runs within the
engine process uses the same messages in the same batches.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import msgspec

from wispprof import protocol
from wispprof.types import GenerationRequest, ServedModel

SPACING_S = 0.001
"""Least time between two batches of a front: the engine process wakes up for each."""

FULL_BATCH = 32
"""So many messages of the engine process leave at once: a front writes them while the next are made."""

_LENGTH_BYTES = 4

# --- front to engine ------------------------------------------------------------------------------


class SessionOpening(msgspec.Struct, tag="o", array_like=True, frozen=True):
    """Open a session under ``handle``, the front's own name for it. ``number``: its edge's; ``kind``: what
    kind of client, for the page of the server."""

    handle: int
    number: int
    key: str
    request: GenerationRequest
    kind: str = ""


class SessionDrafts(msgspec.Struct, tag="d", array_like=True, frozen=True):
    """A checked draft frame."""

    handle: int
    frame: protocol.Draft


class SessionClosing(msgspec.Struct, tag="x", array_like=True, frozen=True):
    """The client ends the session; ``reason`` is ``stop`` if it has all it wants."""

    handle: int
    reason: str


class MetricCount(msgspec.Struct, tag="m", array_like=True, frozen=True):
    """Add ``amount`` to a metric of the server, under ``label`` if it has labels."""

    metric: str
    label: str
    amount: float


class FrontReady(msgspec.Struct, tag="r", array_like=True, frozen=True):
    """The front accepts connections."""


class Query(msgspec.Struct, tag="q", array_like=True, frozen=True):
    """Ask for a page: ``health``, ``ready``, ``metrics``, ``steps``, ``step`` or ``dashboard``."""

    number: int
    page: str
    argument: int


# --- engine to front ------------------------------------------------------------------------------


class FrontConfig(msgspec.Struct, tag="f", array_like=True, frozen=True):
    """What a front must know, its first message. ``settings``: a ``ServerSettings`` in plain types.
    ``tokenizer``: folder of the tokenizer, empty without one. ``trees``: the engine verifies draft trees."""

    settings: dict[str, Any]
    model: ServedModel
    stream: bool
    plan: str
    max_prompt: int
    tokenizer: str = ""
    trees: bool = False


class ServerStatus(msgspec.Struct, tag="t", array_like=True, frozen=True):
    """Sent when it changes."""

    draining: bool
    load_level: int


class SessionReused(msgspec.Struct, tag="u", array_like=True, frozen=True):
    """So many prompt tokens came from a cached prefix."""

    handle: int
    tokens: int


class SessionCommit(msgspec.Struct, tag="c", array_like=True, frozen=True):
    """New tokens of a session. If the frame says ``finished``, the session is gone."""

    handle: int
    frame: protocol.Commit


class SessionFailed(msgspec.Struct, tag="p", array_like=True, frozen=True):
    """The session was refused or has failed; it is gone. Fields as of :class:`~wispprof.protocol.Problem`."""

    handle: int
    code: str
    message: str
    retry_ms: float
    tokens_per_s: float


class Page(msgspec.Struct, tag="a", array_like=True, frozen=True):
    """What query ``number`` asked for."""

    number: int
    status: int
    body: bytes


class Stop(msgspec.Struct, tag="s", array_like=True, frozen=True):
    """Close all connections and end."""


ToEngine = SessionOpening | SessionDrafts | SessionClosing | MetricCount | Query | FrontReady
ToFront = FrontConfig | ServerStatus | SessionReused | SessionCommit | SessionFailed | Page | Stop

_encode = msgspec.msgpack.Encoder().encode
_ARRAY_32 = b"\xdd"
to_engine: msgspec.msgpack.Decoder[list[ToEngine]] = msgspec.msgpack.Decoder(list[ToEngine])
to_front: msgspec.msgpack.Decoder[list[ToFront]] = msgspec.msgpack.Decoder(list[ToFront])

M = TypeVar("M")


# --- batches --------------------------------------------------------------------------------------


class BatchWriter(Protocol):
    """Where batches go."""

    def write(self, data: bytes) -> None: ...


def encode_batch(messages: Sequence[ToEngine | ToFront]) -> bytes:
    return _batch([_encode(message) for message in messages])


def _batch(messages: list[bytes]) -> bytes:
    """Encoded messages as one msgpack array."""
    return _ARRAY_32 + len(messages).to_bytes(4, "big") + b"".join(messages)


class Outbox(Generic[M]):
    """Messages to one end of the channel. They leave together, ``spacing_s`` after the last batch, or with
    the event loop's next turn and as soon as a batch is full. A message is encoded as it comes: one that
    cannot be costs its sender an exception and no other message of its batch anything."""

    def __init__(self, writer: BatchWriter | None, spacing_s: float = 0.0) -> None:
        self._writer = writer
        self._spacing_s = spacing_s
        self._messages: list[bytes] = []
        self._not_before_s = 0.0

    def __len__(self) -> int:
        return len(self._messages)

    def connect(self, writer: BatchWriter | None) -> None:
        """Messages go to another writer; with ``None`` they wait for the next."""
        self._writer = writer
        self.flush()

    def clear(self) -> None:
        """Drop what is held."""
        self._messages.clear()

    def put(self, message: M) -> None:
        data = _encode(message)
        if not self._messages:
            loop = asyncio.get_running_loop()
            if loop.time() >= self._not_before_s:
                loop.call_soon(self.flush)
            else:
                loop.call_at(self._not_before_s, self.flush)
        self._messages.append(data)
        if len(self._messages) == FULL_BATCH and not self._spacing_s:
            self.flush()

    def flush(self) -> None:
        """Send what is held now."""
        if self._messages and self._writer is not None:
            messages, self._messages = self._messages, []
            if self._spacing_s:
                self._not_before_s = asyncio.get_running_loop().time() + self._spacing_s
            self._writer.write(_batch(messages))


class DirectWriter:
    """The other end is in this process: batches arrive with the event loop's next turn."""

    def __init__(self, receive: Callable[[bytes], None]) -> None:
        self._receive = receive

    def write(self, data: bytes) -> None:
        asyncio.get_running_loop().call_soon(self._receive, data)


class SocketWriter(asyncio.Protocol):
    """One end of a socket: each batch after its length."""

    def __init__(
        self,
        receive: Callable[[bytes], None],
        lost: Callable[[], None],
        made: Callable[[], None] = lambda: None,
    ) -> None:
        self.on_batch = receive
        self._on_lost = lost
        self._on_made = made
        self._data = bytearray()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        self._on_made()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._on_lost()

    def write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(len(data).to_bytes(_LENGTH_BYTES, "big") + data)

    def data_received(self, data: bytes) -> None:
        held = self._data
        held += data
        at = 0
        while len(held) - at >= _LENGTH_BYTES:
            start = at + _LENGTH_BYTES
            end = start + int.from_bytes(held[at:start], "big")
            if end > len(held):
                break
            self.on_batch(bytes(held[start:end]))
            at = end
        del held[:at]

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()
