"""Hello and welcome: how an edge and a server agree on protocol, key, tokenizer and target."""

from __future__ import annotations

import asyncio
import math
from typing import NoReturn

from wispprof import protocol
from wispprof.edge.connection import Connection, LinkLost, Traffic
from wispprof.edge.server_frames import HINT, MAX_DRAFTED, MAX_POSITION, retry_ms
from wispprof.errors import HandshakeRefused, ProtocolError, RuntimeFault, ServerUnreachable
from wispprof.settings.edge_settings import ClientSettings
from wispprof.types import GenerationDefaults, ServedModel

_RETRYABLE_CODES = ("busy", "draining")


class TargetChanged(RuntimeFault):
    """The server does not serve the target whose sessions are open."""


async def say_hello(
    connection: Connection, settings: ClientSettings, known: str, traffic: Traffic
) -> protocol.Welcome:
    """Send hello, return the checked welcome. ``known``: identity of the target whose sessions are open.

    Raises :class:`LinkLost` if a later attempt may succeed, :class:`TargetChanged`,
    :class:`HandshakeRefused`, or :class:`ProtocolError`.
    """
    hello = protocol.Hello(
        protocol.PROTOCOL_VERSION,
        settings.tokenizer,
        settings.target,
        settings.access.key,
        settings.name,
        known,
    )
    data = protocol.encode(hello)
    traffic.sent(len(data))
    try:
        async with asyncio.timeout(settings.hello_ms / 1000.0):
            await connection.send(data)
            data = await connection.receive()
    except TimeoutError as err:
        raise LinkLost(f"No answer to hello within {settings.hello_ms:,.0f} ms.") from err
    traffic.received(len(data))
    answer = protocol.decode_server(data)
    if isinstance(answer, protocol.Problem):
        _raise_refusal(answer, known)
    if not isinstance(answer, protocol.Welcome):
        raise ProtocolError(
            f"Expected a welcome frame, got {type(answer).__name__}.", "Is it a wispprof server?"
        )
    check_welcome(answer, settings.tokenizer)
    return answer


def _raise_refusal(problem: protocol.Problem, known: str) -> NoReturn:
    """Raise what a refused hello means; ``known``: the target's identity in it."""
    message = problem.message[:500]
    if problem.code == "model" and known:
        raise TargetChanged(message)
    if problem.code in _RETRYABLE_CODES:
        raise LinkLost(f"The server is {problem.code}: {message}", retry_ms=retry_ms(problem))
    raise refused_hello(problem)


def refused_hello(problem: protocol.Problem) -> HandshakeRefused:
    """The error that a problem at hello means. What follows its first sentence is the hint."""
    reason, end, hint = problem.message[:500].partition(". ")
    return HandshakeRefused(f"The server refused this edge: {reason}{end}".rstrip(), hint, problem.code[:40])


def check_welcome(welcome: protocol.Welcome, tokenizer: str) -> None:
    """Raise :class:`HandshakeRefused` on another protocol or tokenizer, :class:`ProtocolError` on values out
    of bounds. An empty ``tokenizer`` accepts any."""
    if welcome.protocol != protocol.PROTOCOL_VERSION:
        raise HandshakeRefused(
            f"The server speaks protocol {welcome.protocol}, this edge {protocol.PROTOCOL_VERSION}.",
            "Install the same version on both sides.",
        )
    if tokenizer and welcome.tokenizer and welcome.tokenizer != tokenizer:
        raise HandshakeRefused(
            f"The tokenizer of the server's target {welcome.target!r} ({welcome.tokenizer[:12]}…) is not "
            f"this edge's ({tokenizer[:12]}…).",
            "Use a draft model of the target's own family.",
        )
    filters = (welcome.top_p, welcome.min_p)
    if not 0 < welcome.max_context < MAX_POSITION:
        reason = f"a context of {welcome.max_context} tokens"
    elif not 0 <= welcome.max_drafts < MAX_DRAFTED:
        reason = f"{welcome.max_drafts} pending drafts"
    elif not 0 <= welcome.vocab_size < MAX_POSITION:
        reason = f"a vocabulary of {welcome.vocab_size} tokens"
    elif not all(0 <= token < (welcome.vocab_size or MAX_POSITION) for token in welcome.stop_tokens):
        reason = "a stop token outside the vocabulary"
    elif not (0 <= welcome.temperature < math.inf and 0 <= welcome.top_k < MAX_POSITION):
        reason = f"temperature {welcome.temperature} and top_k {welcome.top_k}"
    elif not (0 < filters[0] <= 1 and 0 <= filters[1] <= 1):
        reason = f"top_p {filters[0]} and min_p {filters[1]}"
    else:
        return
    raise ProtocolError(f"Invalid welcome frame: {reason}.", HINT)


def same_target(one: protocol.Welcome, other: protocol.Welcome) -> bool:
    """Whether two welcomes tell of the same target: by identity, or by name and tokenizer if neither has
    one."""
    if one.identity or other.identity:
        return one.identity == other.identity
    return (one.target, one.tokenizer) == (other.target, other.tokenizer)


def served_model(welcome: protocol.Welcome) -> ServedModel:
    """The target that a welcome describes."""
    return ServedModel(
        id=welcome.target,
        tokenizer=welcome.tokenizer,
        vocab_size=welcome.vocab_size,
        max_context=welcome.max_context,
        identity=welcome.identity,
        stop_tokens=tuple(welcome.stop_tokens),
        chat_template=welcome.chat_template,
        defaults=GenerationDefaults(welcome.temperature, welcome.top_k, welcome.top_p, welcome.min_p),
    )


def name_target(welcome: protocol.Welcome) -> str:
    """The target's name, and the start of its identity, because two targets may share a name."""
    return (
        f"{welcome.target:.100} ({welcome.identity[:12]})" if welcome.identity else f"{welcome.target:.100}"
    )


def refusal() -> HandshakeRefused:
    """The end of an answer whose target is gone."""
    return HandshakeRefused(
        "The server no longer serves the target that began this answer.", "Send the request again."
    )


def unreachable(down_ms: float, err: LinkLost) -> ServerUnreachable:
    """The end of a wait for a server."""
    return ServerUnreachable(
        f"No server for {down_ms / 1000:.1f} s. {err}".rstrip(),
        "Start one with `wispprof serve`, check the address, or wait longer (`--give-up-ms`).",
    )
