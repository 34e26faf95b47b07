"""The frames between edge and server: msgpack arrays, one per WebSocket message.

Sessions are numbered by the edge and belong to their connection. After a lost link the edge opens
again with every token it has seen committed; whatever KV the server still holds for that prefix is
reused, so resuming needs no message of its own.

Epochs keep drafts of an abandoned path out of the tail. The edge owns the number and raises it each
time it rolls drafts back. When the server sees a contradiction (a rejected draft, or a frame whose
overlap differs from committed text) it ignores that epoch from then on; the edge will see the same
contradiction in the commit, roll back, and go on under the next number. A stale draft could never
change the text, only waste rows.

Most frames carry a token or two, so what is fixed costs most. In the two frames that do the work, numbers
travel in the shortest msgpack form that is exact, fields at the end that say nothing are left out, and
times are as precise as anybody needs them (:func:`brief_ms`): one draft takes 17 bytes, a commit of one
token 16.
"""

from __future__ import annotations

import struct
from typing import TypeVar

import msgspec

from wispprof.errors import ProtocolError

PROTOCOL_VERSION = 1
MAX_FRAME_BYTES = 1 << 20
MAX_DRAFTS = 64


class Hello(msgspec.Struct, tag="h", array_like=True, frozen=True):
    """First frame of the edge. Empty ``target`` or ``tokenizer`` accepts whatever the server has."""

    protocol: int
    tokenizer: str
    target: str = ""
    key: str = ""
    edge: str = ""


class Welcome(msgspec.Struct, tag="w", array_like=True, frozen=True):
    """The server's answer to a good hello."""

    protocol: int
    target: str
    tokenizer: str
    max_context: int
    max_drafts: int
    stream: bool
    load_level: int = 0
    plan: str = ""


class Open(msgspec.Struct, tag="o", array_like=True, frozen=True):
    """Start or resume a session. ``tokens`` = prompt and everything committed so far; the last
    ``generated`` of them are output already delivered. ``max_new`` bounds the whole output,
    ``generated`` included."""

    session: int
    tokens: list[int]
    max_new: int
    generated: int = 0
    tokens_per_s: float = 1.0
    ttft_ms: float | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: list[int] = []
    undrafted: bool = False
    """The edge will send no drafts: the server may always advance this session (server-only)."""


class Draft(msgspec.Struct, tag="d", array_like=True, frozen=True):
    """Draft tokens at ``base …``. ``acceptance_prob``: one byte per token, 255 = certain to be accepted
    given those before it. In round mode the frame is the whole round, even when empty."""

    session: int
    epoch: int
    base: int
    tokens: list[int]
    acceptance_prob: bytes
    draft_ms: float
    slack_ms: float


class Commit(msgspec.Struct, tag="c", array_like=True, frozen=True):
    """New tokens of a session: ``tokens`` end at ``committed_len`` (positions, prompt included).
    ``finished``: "" while it goes on, else ``stop``, ``length`` or ``context``."""

    session: int
    epoch: int
    committed_len: int
    tokens: list[int]
    accepted: int
    drafted: int
    queue_ms: float
    verify_ms: float
    load_level: int = 0
    finished: str = ""


class Close(msgspec.Struct, tag="x", array_like=True, frozen=True):
    """The edge is done with a session; everything it held is released."""

    session: int


class Problem(msgspec.Struct, tag="p", array_like=True, frozen=True):
    """Something was refused. ``session`` is -1 where it concerns the connection, which then closes.
    Codes: ``hello``, ``frame``, ``session``, ``limit``, ``busy`` (see ``retry_ms``), ``slo``
    (``tokens_per_s``: the speed that could be promised, 0 where speed is not the matter),
    ``draining``, ``internal``."""

    session: int
    code: str
    message: str
    retry_ms: float = 0.0
    tokens_per_s: float = 0.0


class Ping(msgspec.Struct, tag="i", array_like=True, frozen=True):
    """Link measurement: the server answers at once with ``reply_bytes`` of payload."""

    number: int
    payload: bytes = b""
    reply_bytes: int = 0


class Pong(msgspec.Struct, tag="j", array_like=True, frozen=True):
    """``socket_wait_ms``: how long the ping probably lay unread, which is no part of the link's round trip."""

    number: int
    payload: bytes = b""
    socket_wait_ms: float = 0.0


EdgeFrame = Hello | Open | Draft | Close | Ping
ServerFrame = Welcome | Commit | Problem | Pong

_F = TypeVar("_F")

_encoder = msgspec.msgpack.Encoder()
_float32 = struct.Struct(">f")
_FLOAT32 = b"\xca"  # msgpack's type byte
_from_edge: msgspec.msgpack.Decoder[EdgeFrame] = msgspec.msgpack.Decoder(EdgeFrame)
_from_server: msgspec.msgpack.Decoder[ServerFrame] = msgspec.msgpack.Decoder(ServerFrame)


def encode(frame: EdgeFrame | ServerFrame) -> bytes:
    """One frame as bytes."""
    if isinstance(frame, Draft):
        spent, slack = _short(frame.draft_ms), _short(frame.slack_ms)
        body = (
            frame.session,
            frame.epoch,
            frame.base,
            frame.tokens,
            frame.acceptance_prob,
            spent,
            slack,
        )
        return _encoder.encode(("d", *body))
    if isinstance(frame, Commit):
        counts = (frame.session, frame.epoch, frame.committed_len, frame.tokens, frame.accepted)
        times = (frame.drafted, _short(frame.queue_ms), _short(frame.verify_ms))
        if frame.finished:
            return _encoder.encode(("c", *counts, *times, frame.load_level, frame.finished))
        level = (frame.load_level,) if frame.load_level else ()
        return _encoder.encode(("c", *counts, *times, *level))
    return _encoder.encode(frame)


def _short(number: float) -> float | msgspec.Raw:
    """The same number as integer or float32, where one of them is exact."""
    if -0x80000000 <= number <= 0x7FFFFFFF and (whole := int(number)) == number:
        return whole
    try:
        packed = _float32.pack(number)
    except OverflowError:
        return number
    return msgspec.Raw(_FLOAT32 + packed) if _float32.unpack(packed)[0] == number else number


def decode_edge(data: bytes) -> EdgeFrame:
    """Decode what an edge sent; raises :class:`ProtocolError` on anything malformed."""
    return _decode(_from_edge, data)


def decode_server(data: bytes) -> ServerFrame:
    """Decode what a server sent; raises :class:`ProtocolError` on anything malformed."""
    return _decode(_from_server, data)


def _decode(decoder: msgspec.msgpack.Decoder[_F], data: bytes) -> _F:
    if len(data) > MAX_FRAME_BYTES:
        raise ProtocolError(
            f"A frame of {len(data)} bytes exceeds the limit of {MAX_FRAME_BYTES}.",
            "Send shorter prompts or fewer drafts per frame.",
        )
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, msgspec.ValidationError) as err:
        raise ProtocolError(
            f"Malformed frame: {err}.", "Use a client of the same protocol version."
        ) from err


def brief_ms(ms: float) -> float:
    """A time for a frame: whole milliseconds from 16 ms on, sixteenths (exact in float32) below."""
    return round(ms) if abs(ms) >= 16.0 else round(16.0 * ms) / 16.0


def acceptance_byte(probability: float) -> int:
    """Probability to its wire byte, 0…255."""
    return max(0, min(255, round(probability * 255)))
