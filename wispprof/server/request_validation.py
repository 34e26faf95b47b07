"""Checks of what comes over the wire, before it touches a session. Pure."""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import Sequence

from wispprof import protocol
from wispprof.errors import HandshakeRefused, ProtocolError
from wispprof.server.session import SessionRequest
from wispprof.types import Sampling, ServedModel, Slo

__all__ = ["check_draft", "check_hello", "check_key", "request_of"]

MAX_POSITION = 1 << 31


def check_key(key: str, allowed: Sequence[str]) -> bool:
    """Whether ``key`` is one of ``allowed`` (an empty list allows all). Takes the same time for every
    wrong key, whatever it shares with a right one."""
    if not allowed:
        return True
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    good = False
    for one in allowed:
        good |= hmac.compare_digest(digest, hashlib.sha256(one.encode()).digest())
    return good


def check_hello(hello: protocol.Hello, model: ServedModel, allowed: Sequence[str]) -> None:
    """Raises :class:`HandshakeRefused` unless both sides mean the same protocol, model and tokens."""
    if hello.protocol != protocol.PROTOCOL_VERSION:
        raise HandshakeRefused(
            f"This server speaks protocol {protocol.PROTOCOL_VERSION}, the edge {hello.protocol}.",
            "Install the same wispprof version on both sides.",
        )
    if not check_key(hello.key, allowed):
        raise HandshakeRefused("The API key is not known here.", "Check the key of this server.")
    if hello.target and hello.target != model.id:
        raise HandshakeRefused(
            f"This server verifies {model.id!r}, not {hello.target!r}.",
            "Plan for that target, or connect to another server.",
        )
    if hello.tokenizer and hello.tokenizer != model.tokenizer:
        raise HandshakeRefused(
            f"The edge's tokenizer ({hello.tokenizer[:12]}…) is not the target's "
            f"({model.tokenizer[:12]}…).",
            "Use a draft model of the target's own family.",
        )


def request_of(frame: protocol.Open) -> SessionRequest:
    """An opening frame as a request. Raises :class:`ProtocolError` on values that mean nothing."""
    try:
        sampling = Sampling(frame.temperature, frame.top_k, frame.top_p, frame.seed)
        slo = Slo(frame.tokens_per_s, frame.ttft_ms)
    except ValueError as err:
        raise ProtocolError(f"Bad opening frame: {err}.", "Correct the request.") from err
    numbers = [frame.temperature, frame.top_p, frame.tokens_per_s, frame.ttft_ms or 0.0]
    if not all(math.isfinite(number) for number in numbers) or (frame.ttft_ms or 1.0) <= 0:
        raise ProtocolError(
            "Bad opening frame: sampling and SLO need finite, positive numbers.",
            "Correct the request.",
        )
    if not -(1 << 63) <= frame.seed < 1 << 63:
        raise ProtocolError("Bad opening frame: a seed has 64 bits.", "Choose a smaller seed.")
    return SessionRequest(
        tokens=tuple(frame.tokens),
        max_new=frame.max_new,
        slo=slo,
        sampling=sampling,
        generated=frame.generated,
        stop=tuple(frame.stop),
        undrafted=frame.undrafted,
    )


def check_draft(frame: protocol.Draft, vocab_size: int) -> None:
    """Raises :class:`ProtocolError` on a draft frame that no honest edge sends."""
    count = len(frame.tokens)
    if count > protocol.MAX_DRAFTS:
        err = f"{count} drafts in one frame; the limit is {protocol.MAX_DRAFTS}"
    elif len(frame.acceptance_prob) != count:
        err = f"{count} drafts with {len(frame.acceptance_prob)} acceptance bytes"
    elif not (0 <= frame.epoch < MAX_POSITION and 0 <= frame.base < MAX_POSITION):
        err = f"epoch {frame.epoch} or base {frame.base} out of range"
    elif frame.tokens and (min(frame.tokens) < 0 or max(frame.tokens) >= vocab_size):
        err = f"a token outside the vocabulary of {vocab_size}"
    else:
        return
    raise ProtocolError(f"Bad draft frame: {err}.", "Use a client of the same protocol version.")
