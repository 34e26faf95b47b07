"""Checks of what an edge sends that need the model or the keys, and what is made of its frames."""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import Sequence
from operator import gt

from wispprof import protocol
from wispprof.errors import HandshakeRefused, ProtocolError
from wispprof.server.engine_client import EngineClient
from wispprof.types import GenerationRequest, Sampling, ServedModel, Slo

MAX_LOGPROBS = 20
"""Most tokens that a request may ask log-probabilities of, as in the OpenAI API."""


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
        if not hello.key:
            raise HandshakeRefused(
                "This server needs an API key.",
                "Give --key, or set WISPPROF_KEY.",
                "key",
            )
        raise HandshakeRefused("Invalid API key.", "Use a key of this server.", "key")
    if hello.target and hello.target != model.id:
        raise HandshakeRefused(
            f"This server verifies {model.id!r}, not {hello.target!r}.",
            "Plan for that target, or connect to another server.",
            "model",
        )
    if hello.identity and hello.identity != model.identity:
        raise HandshakeRefused(
            f"This server's {model.id!r} is not the model that began your sessions: its weights, dtype or "
            f"noise version differ ({model.identity[:12] or 'unknown'}, not {hello.identity[:12]}).",
            "Connect to a server of that model, or start the edge anew.",
            "model",
        )
    if hello.tokenizer and hello.tokenizer != model.tokenizer:
        raise HandshakeRefused(
            f"The edge's tokenizer ({hello.tokenizer[:12]}…) is not the target's ({model.tokenizer[:12]}…).",
            "Use a draft model of the target's own family.",
        )


def welcome(server: EngineClient) -> protocol.Welcome:
    """The answer to a valid hello: the target, and how this server serves it."""
    model, defaults = server.model, server.model.defaults
    return protocol.Welcome(
        protocol=protocol.PROTOCOL_VERSION,
        target=model.id,
        tokenizer=model.tokenizer,
        max_context=model.max_context,
        max_drafts=server.settings.max_drafts,
        stream=server.config.stream,
        load_level=server.load_level,
        plan=server.config.plan,
        identity=model.identity,
        stop_tokens=list(model.stop_tokens),
        chat_template=model.chat_template,
        temperature=defaults.temperature,
        top_k=defaults.top_k,
        top_p=defaults.top_p,
        min_p=defaults.min_p,
        vocab_size=model.vocab_size,
        trees=server.config.trees,
    )


def session_request(frame: protocol.Open, tokens: tuple[int, ...] = ()) -> GenerationRequest:
    """The request of an opening frame; ``tokens``: all of them, if parts came before it.

    Raises :class:`ProtocolError` on invalid sampling, SLO or stop tokens.
    """
    tokens = tokens or tuple(frame.tokens)
    stop = tuple(frame.stop)
    try:
        if len(stop) > protocol.MAX_STOP_TOKENS:
            raise ValueError(f"at most {protocol.MAX_STOP_TOKENS} stop tokens are allowed, got {len(stop)}")
        if frame.min_new < 0 or frame.top_k >= 1 << 31:
            raise ValueError(f"min_new {frame.min_new} or top_k {frame.top_k} is out of range")
        if frame.logprobs is not None and not 0 <= frame.logprobs <= MAX_LOGPROBS:
            raise ValueError(f"logprobs must lie between 0 and {MAX_LOGPROBS}, got {frame.logprobs}")
        sampling = Sampling(
            frame.temperature,
            frame.top_k,
            frame.top_p,
            frame.seed,
            frame.min_p,
            len(tokens) - frame.generated + frame.min_new if frame.min_new else 0,
            stop if frame.min_new else (),
            frame.logprobs,
        )
        slo = Slo.of(frame.tokens_per_s, frame.ttft_ms)
    except ValueError as err:
        raise ProtocolError(f"Invalid opening frame: {err}.", "Correct the request.") from err
    return GenerationRequest(
        tokens=tokens,
        max_new=frame.max_new,
        slo=slo,
        sampling=sampling,
        generated=frame.generated,
        stop_tokens=stop,
        undrafted=frame.undrafted,
    )


def check_draft(frame: protocol.Draft, vocab_size: int, trees: bool = False) -> None:
    """Raise :class:`ProtocolError` on drafts that no correct edge sends. ``trees``: the engine verifies
    them."""
    tokens, probs, parents = frame.tokens, frame.acceptance_prob, frame.parents
    if len(probs) != len(tokens):
        reason = f"{len(tokens)} drafts with {len(probs)} acceptance bytes"
    elif tokens and (min(tokens) < 0 or max(tokens) >= vocab_size):
        reason = f"a token outside the vocabulary of {vocab_size}"
    elif not 0.0 <= frame.draft_ms < math.inf:
        reason = f"{frame.draft_ms} ms of drafting"
    elif parents and not trees:
        reason = "a tree, but this server's engine verifies chains"
    elif parents and (len(parents) != len(tokens) or any(map(gt, parents, range(len(parents))))):
        reason = f"parents {list(parents)} of {len(tokens)} drafts"
    else:
        return
    raise ProtocolError(f"Invalid draft frame: {reason}.", "Use a client of the same protocol version.")
