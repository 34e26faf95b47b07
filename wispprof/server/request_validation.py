"""Checks of edge frames that need the server's model or keys. Pure."""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import Sequence

from wispprof import protocol
from wispprof.errors import HandshakeRefused, ProtocolError
from wispprof.server.session import SessionRequest
from wispprof.types import Sampling, ServedModel, Slo


def check_key(key: str, allowed: Sequence[str]) -> bool:
    """Whether ``key`` is one of ``allowed``; an empty list allows all. Takes constant time."""
    if not allowed:
        return True
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    valid = False
    for one in allowed:
        valid |= hmac.compare_digest(digest, hashlib.sha256(one.encode()).digest())
    return valid


def check_hello(hello: protocol.Hello, model: ServedModel, allowed: Sequence[str]) -> None:
    """Raise :class:`HandshakeRefused` unless protocol, key, target and tokenizer match."""
    if hello.protocol != protocol.PROTOCOL_VERSION:
        raise HandshakeRefused(
            f"This server speaks protocol {protocol.PROTOCOL_VERSION}, the edge {hello.protocol}.",
            "Install the same wispprof version on both sides.",
        )
    if not check_key(hello.key, allowed):
        raise HandshakeRefused("Invalid API key.", "Use a key of this server.")
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


def session_request(frame: protocol.Open) -> SessionRequest:
    """The request of an opening frame. Raises :class:`ProtocolError` on invalid sampling or SLO."""
    try:
        sampling = Sampling(frame.temperature, frame.top_k, frame.top_p, frame.seed)
        slo = Slo(frame.tokens_per_s, frame.ttft_ms)
        numbers = (frame.temperature, frame.top_p, frame.tokens_per_s, frame.ttft_ms or 0.0)
        if not all(map(math.isfinite, numbers)) or (frame.ttft_ms or 1.0) <= 0:
            raise ValueError("sampling and SLO need finite, positive numbers")
    except ValueError as err:
        raise ProtocolError(f"Invalid opening frame: {err}.", "Correct the request.") from err
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
    """Raise :class:`ProtocolError` on drafts that no correct edge sends."""
    tokens, probs = frame.tokens, frame.acceptance_prob
    if len(probs) != len(tokens):
        reason = f"{len(tokens)} drafts with {len(probs)} acceptance bytes"
    elif tokens and (min(tokens) < 0 or max(tokens) >= vocab_size):
        reason = f"a token outside the vocabulary of {vocab_size}"
    else:
        return
    raise ProtocolError(
        f"Invalid draft frame: {reason}.", "Use a client of the same protocol version."
    )
