"""The frames between edge and server: one msgpack array per WebSocket message. See ``docs/wire.md``.

An **epoch** keeps drafts of an abandoned continuation out of the pending drafts. The edge owns the number
and raises it with each rollback. After a contradiction (a rejected draft, or a frame that differs from
committed text) the server ignores that epoch. A stale draft can waste work but never change the text.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, TypeVar

import msgspec

from wispprof.errors import ProtocolError
from wispprof.types import GenerationRequest, TokenLogprob

if TYPE_CHECKING:
    from wispprof.sessions.session_state import CommitResult

PROTOCOL_VERSION = 3
MAX_FRAME_BYTES = 1 << 20
MAX_DRAFTS = 64

MAX_STOP_TOKENS = 256
MAX_NAME = 512

Position = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
SessionNumber = Annotated[int, msgspec.Meta(ge=-(1 << 31), lt=1 << 31)]
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 20)]
Milliseconds = Annotated[float, msgspec.Meta(ge=-1e12, le=1e12)]
Name = Annotated[str, msgspec.Meta(max_length=MAX_NAME)]
Key = Annotated[str, msgspec.Meta(max_length=4096)]
Int64 = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]


class Hello(msgspec.Struct, tag="h", array_like=True, frozen=True):
    """The edge's first frame. An empty ``target``, ``tokenizer`` or ``identity`` accepts what the server has.

    ``identity``: that of the target whose sessions this edge wants to continue.
    """

    protocol: Int64
    tokenizer: Name
    target: Name = ""
    key: Key = ""
    edge: Name = ""
    identity: Name = ""


class Welcome(msgspec.Struct, tag="w", array_like=True, frozen=True):
    """The server's answer to a valid hello.

    ``identity``, ``stop_tokens``, ``chat_template``, the sampling defaults and ``vocab_size`` (0: unknown)
    are the target's, as in :class:`~wispprof.types.ServedModel`. ``trees``: its engine verifies draft trees;
    other servers refuse them.
    """

    protocol: Int64
    target: str
    tokenizer: str
    max_context: Position
    max_drafts: Count
    stream: bool
    load_level: Count = 0
    plan: str = ""
    identity: str = ""
    stop_tokens: list[Position] = []
    chat_template: str = ""
    temperature: float = 1.0
    top_k: Position = 0
    top_p: float = 1.0
    min_p: float = 0.0
    vocab_size: Position = 0
    trees: bool = False


class OpenPart(msgspec.Struct, tag="q", array_like=True, frozen=True):
    """Leading tokens of a session that is too long for one frame. They stand before those of the
    session's further parts and of its :class:`Open`, which follow on the same connection."""

    session: SessionNumber
    tokens: list[int]


class Open(msgspec.Struct, tag="o", array_like=True, frozen=True):
    """Start or resume a session.

    ``tokens``: prompt and committed output; the last ``generated`` of them are output already
    delivered. ``max_new`` bounds the whole output. ``undrafted``: the edge sends no drafts, so the
    server may always advance the session (server-only serving). ``min_new``: output tokens before which
    no ``stop`` token is chosen. ``tokens_per_s`` 0: no speed is asked for. ``logprobs``: as in
    :class:`~wispprof.types.Sampling`.
    """

    session: SessionNumber
    tokens: list[int]
    max_new: Int64
    generated: Int64 = 0
    tokens_per_s: float = 0.0
    ttft_ms: float | None = None
    temperature: float = 0.0
    top_k: Int64 = 0
    top_p: float = 1.0
    seed: Int64 = 0
    stop: list[int] = []
    undrafted: bool = False
    min_p: float = 0.0
    min_new: Int64 = 0
    logprobs: Int64 | None = None


class Draft(msgspec.Struct, tag="d", array_like=True, frozen=True):
    """Draft tokens from position ``base`` on.

    ``acceptance_prob``: one byte per token, 255 if it is certain to be accepted given those before
    it. In round mode the frame is the whole round, even if it is empty. ``slack_ms``: time the edge
    has left, from the frame's arrival, before this round must be answered. ``parents``: empty for a chain;
    else one byte per token, 0 if it follows the text before ``base``, i + 1 if it follows token i < its own
    number of this frame.
    """

    session: SessionNumber
    epoch: Position
    base: Position
    tokens: Annotated[list[int], msgspec.Meta(max_length=MAX_DRAFTS)]
    acceptance_prob: bytes
    draft_ms: float
    slack_ms: float
    parents: Annotated[bytes, msgspec.Meta(max_length=MAX_DRAFTS)] = b""


class Commit(msgspec.Struct, tag="c", array_like=True, frozen=True):
    """New tokens of a session. They end at ``committed_len``, a position that counts the prompt.
    ``finished``: "" while the session goes on, else ``stop``, ``length`` or ``context``. ``logprobs``: one
    per token, if the session asked for them."""

    session: SessionNumber
    epoch: Position
    committed_len: Position
    tokens: list[Position]
    accepted: Count
    drafted: Count
    queue_ms: Milliseconds
    verify_ms: Milliseconds
    load_level: Count = 0
    finished: str = ""
    logprobs: list[TokenLogprob] = []


class Close(msgspec.Struct, tag="x", array_like=True, frozen=True):
    """The edge ends a session; the server releases all it holds."""

    session: SessionNumber


class Problem(msgspec.Struct, tag="p", array_like=True, frozen=True):
    """Something was refused. ``session`` is -1 if it concerns the connection, which then closes.

    Codes: ``hello``, ``key``, ``model`` (another target than asked for), ``frame``, ``session``, ``limit``,
    ``busy``, ``slo``, ``draining``, ``internal``. ``retry_ms``: when to try again. ``tokens_per_s``: the
    speed that would be admitted, 0 if speed is not the reason.
    """

    session: SessionNumber
    code: str
    message: str
    retry_ms: Milliseconds = 0.0
    tokens_per_s: float = 0.0


class Ping(msgspec.Struct, tag="i", array_like=True, frozen=True):
    """Link measurement. The server answers at once with ``reply_bytes`` of payload."""

    number: Int64
    payload: bytes = b""
    reply_bytes: Int64 = 0


class Pong(msgspec.Struct, tag="j", array_like=True, frozen=True):
    """The answer to a :class:`Ping`."""

    number: Int64
    payload: bytes = b""


EdgeFrame = Hello | OpenPart | Open | Draft | Close | Ping
ServerFrame = Welcome | Commit | Problem | Pong

_F = TypeVar("_F")

_encoder = msgspec.msgpack.Encoder()
_float32 = struct.Struct(">f")
_FLOAT32 = b"\xca"  # msgpack's type byte
_from_edge: msgspec.msgpack.Decoder[EdgeFrame] = msgspec.msgpack.Decoder(EdgeFrame)
_from_server: msgspec.msgpack.Decoder[ServerFrame] = msgspec.msgpack.Decoder(ServerFrame)


def encode(frame: EdgeFrame | ServerFrame) -> bytes:
    """One frame as bytes. In drafts and commits, numbers take their shortest exact form, and trailing
    fields with default values are left out."""
    if isinstance(frame, Draft):
        body = (
            frame.session,
            frame.epoch,
            frame.base,
            frame.tokens,
            frame.acceptance_prob,
            _short(frame.draft_ms),
            _short(frame.slack_ms),
        )
        return _encoder.encode(("d", *body, frame.parents) if frame.parents else ("d", *body))
    if isinstance(frame, Commit):
        counts = (frame.session, frame.epoch, frame.committed_len, frame.tokens, frame.accepted)
        times = (frame.drafted, _short(frame.queue_ms), _short(frame.verify_ms))
        if frame.logprobs:
            return _encoder.encode(("c", *counts, *times, frame.load_level, frame.finished, frame.logprobs))
        if frame.finished:
            return _encoder.encode(("c", *counts, *times, frame.load_level, frame.finished))
        level = (frame.load_level,) if frame.load_level else ()
        return _encoder.encode(("c", *counts, *times, *level))
    return _encoder.encode(frame)


def _short(number: float) -> float | msgspec.Raw:
    """The same number as an integer or float32, if one of them is exact."""
    if -0x80000000 <= number <= 0x7FFFFFFF and (whole := int(number)) == number:
        return whole
    try:
        packed = _float32.pack(number)
    except OverflowError:
        return number
    return msgspec.Raw(_FLOAT32 + packed) if _float32.unpack(packed)[0] == number else number


def decode_edge(data: bytes) -> EdgeFrame:
    """A frame from an edge. Raises :class:`ProtocolError` if it is malformed or out of bounds."""
    return _decode(_from_edge, data)


def decode_server(data: bytes) -> ServerFrame:
    """A frame from a server. Raises :class:`ProtocolError` if it is malformed or out of bounds."""
    return _decode(_from_server, data)


def _decode(decoder: msgspec.msgpack.Decoder[_F], data: bytes) -> _F:
    if len(data) > MAX_FRAME_BYTES:
        raise ProtocolError(
            f"A frame of {len(data)} bytes exceeds the limit of {MAX_FRAME_BYTES}.",
            "Send shorter prompts or fewer drafts per frame.",
        )
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError, MemoryError) as err:
        raise ProtocolError(f"Malformed frame: {err}.", "Use a client of the same protocol version.") from err


def open_frame(request: GenerationRequest, committed: Sequence[int], undrafted: bool) -> Open:
    """The frame that opens a generation, or resumes it from its ``committed`` tokens, prompt included. The
    caller fills in ``session``."""
    sampling, prompt_tokens = request.sampling, len(request.tokens)
    return Open(
        session=0,
        tokens=list(committed),
        max_new=request.max_new,
        generated=len(committed) - prompt_tokens,
        tokens_per_s=0.0 if request.slo.best_effort else request.slo.tokens_per_s,
        ttft_ms=request.slo.ttft_ms,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=sampling.seed,
        stop=list(request.stop_tokens),
        undrafted=undrafted,
        min_p=sampling.min_p,
        min_new=max(0, sampling.min_length - prompt_tokens),
        logprobs=sampling.logprobs,
    )


def commit_frame(number: int, commit: CommitResult, verify_ms: float, load_level: int) -> Commit:
    """What an edge is told of a commit of its session ``number``."""
    return Commit(
        number,
        commit.epoch,
        commit.committed_len,
        list(commit.tokens),
        commit.accepted,
        commit.drafted,
        brief_ms(commit.queue_ms),
        brief_ms(verify_ms),
        load_level,
        commit.finished,
        list(commit.logprobs),
    )


def brief_ms(ms: float) -> float:
    """A time rounded for a frame: to whole ms from 16 ms on, below to sixteenths (exact in float32)."""
    return round(ms) if abs(ms) >= 16.0 else round(16.0 * ms) / 16.0


def parent_bytes(parents: Sequence[int]) -> bytes:
    """Parents of a tree's nodes (-1: the text before them) as :class:`Draft` carries them."""
    return bytes(parent + 1 for parent in parents)


def parents_of(frame: Draft) -> list[int]:
    """The parents that a draft frame carries, -1 for the text before it; none for a chain."""
    return [byte - 1 for byte in frame.parents]


def acceptance_byte(probability: float) -> int:
    """A probability as the byte of :class:`Draft`, 0 … 255."""
    return max(0, min(255, round(probability * 255)))
