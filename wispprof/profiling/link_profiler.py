"""profile-link: round trip, jitter and bandwidth to a server, in the frames that serving uses."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from wispprof.artifacts import LinkProfile, LinkRow, ModelRecord
from wispprof.errors import HandshakeRefused, ProtocolError, ServerUnreachable
from wispprof.profiling.profile_run import begin_manifest, finalize_profile
from wispprof.profiling.sweep import Progress, SweepResult
from wispprof.profiling.workload import round_ms
from wispprof.settings.profiler_settings import LinkProfilerSettings, SweepSettings

if TYPE_CHECKING:
    from wispprof.edge.connection import Connection, ConnectionFactory

__all__ = ["link_rows", "link_summary", "profile_link"]


def profile_link(
    settings: LinkProfilerSettings,
    progress: Progress | None = None,
    *,
    connect: ConnectionFactory | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> LinkProfile:
    """Measure the link to a server that is running. ``connect`` replaces the WebSocket (for tests).

    Raises :class:`ServerUnreachable`, :class:`HandshakeRefused`, :class:`ProtocolError`.
    """
    return asyncio.run(_profile(settings, progress, connect, clock))


async def _profile(
    settings: LinkProfilerSettings,
    progress: Progress | None,
    connect: ConnectionFactory | None,
    clock: Callable[[], float],
) -> LinkProfile:
    from wispprof.edge.connection import ssl_context, websocket_connections

    begin = clock()
    link = await (
        connect or websocket_connections(settings.server, ssl=ssl_context(settings.access.ca_file))
    )()
    try:
        welcome = await _greet(link, settings)
        model = ModelRecord(
            welcome.target, tokenizer_hash=welcome.tokenizer, max_context=welcome.max_context
        )
        manifest = begin_manifest(
            "link",
            model,
            SweepSettings(max_samples=settings.count, min_samples=min(6, settings.count)),
            engine={"server": settings.server, "protocol": welcome.protocol},
            measure={"sizes": list(settings.sizes)},
        )
        rows = await link_rows(link, settings, progress, clock)
    finally:
        await link.close()
    result = SweepResult(rows, clock() - begin, 0.0)
    return cast(
        LinkProfile, finalize_profile(manifest, result, settings.output, None, link_summary(rows))
    )


async def _greet(link: Connection, settings: LinkProfilerSettings) -> Any:
    from wispprof import protocol

    hello = protocol.Hello(
        protocol.PROTOCOL_VERSION, "", key=settings.access.key, edge="profile-link"
    )
    await link.send(protocol.encode(hello))
    answer = await _answer(link, settings)
    if isinstance(answer, protocol.Problem):
        raise HandshakeRefused(f"The server refused: {answer.message}", "")
    if not isinstance(answer, protocol.Welcome):
        raise ProtocolError("The server did not answer the greeting.", "Is it a wispprof server?")
    return answer


async def link_rows(
    link: Connection,
    settings: LinkProfilerSettings,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[LinkRow, ...]:
    """Exchange frames: small ones for the round trip, then larger ones up and down in turn."""
    from wispprof import protocol

    plan = [("rtt", 0)]
    plan += [(kind, size) for size in settings.sizes for kind in ("uplink", "downlink")]
    samples: dict[tuple[str, int], list[float]] = {entry: [] for entry in plan}
    rounds, number = settings.warmup + settings.count, 0
    for index in range(rounds):
        # Kinds take turns, so that a passing disturbance does not fall on one of them alone.
        for kind, size in plan:
            number += 1
            up, down = (size if kind == "uplink" else 0), (size if kind == "downlink" else 0)
            frame = protocol.encode(protocol.Ping(number, bytes(up), down))
            begin = clock()
            await link.send(frame)
            answer = await _answer(link, settings)
            elapsed = (clock() - begin) * 1000
            if not isinstance(answer, protocol.Pong) or answer.number != number:
                raise ProtocolError(
                    f"The server answered a ping with {type(answer).__name__}.",
                    "Use a server of the same version.",
                )
            if len(answer.payload) != down:
                raise ProtocolError(
                    f"The server sent {len(answer.payload)} bytes where {down} were asked for.",
                    "Use smaller sizes or a server of the same version.",
                )
            if index >= settings.warmup:
                samples[kind, size].append(round_ms(max(0.0, elapsed - answer.socket_wait_ms)))
        if progress is not None:
            progress(index + 1, rounds, "exchanging frames")
    return tuple(
        LinkRow(f"{kind} {size}" if size else kind, kind, size, tuple(taken), order=order)
        for order, ((kind, size), taken) in enumerate(samples.items())
    )


async def _answer(link: Connection, settings: LinkProfilerSettings) -> Any:
    from wispprof import protocol

    try:
        data = await asyncio.wait_for(link.receive(), settings.timeout_s)
    except TimeoutError:
        raise ServerUnreachable(
            f"{settings.server} did not answer within {settings.timeout_s:.0f} s.",
            "Check that the server runs and the link is up.",
        ) from None
    return protocol.decode_server(data)


def link_summary(rows: Sequence[LinkRow]) -> dict[str, Any]:
    """``rtt_ms`` (median), ``rtt_p95_ms``, ``jitter_ms`` (mean change from one exchange to the next,
    as RFC 3550 means it, unsmoothed), and bandwidth each way from the slope between sizes."""
    [rtt] = [row for row in rows if row.kind == "rtt"]
    steps = [abs(b - a) for a, b in zip(rtt.samples_ms, rtt.samples_ms[1:], strict=False)]
    found: dict[str, Any] = {
        "rtt_ms": round(rtt.median_ms, 4),
        "rtt_p95_ms": round(sorted(rtt.samples_ms)[int(0.95 * (len(rtt.samples_ms) - 1))], 4),
        "jitter_ms": round(statistics.fmean(steps), 4) if steps else 0.0,
    }
    for kind in ("uplink", "downlink"):
        ordered = sorted((r for r in rows if r.kind == kind), key=lambda row: row.payload_bytes)
        if not ordered:
            continue
        # The fastest exchange of each size: queueing and other traffic only add.
        large, base_ms, base_bytes = ordered[-1], min(rtt.samples_ms), 0
        if len(ordered) > 1:
            base_ms, base_bytes = min(ordered[0].samples_ms), ordered[0].payload_bytes
        extra_ms = min(large.samples_ms) - base_ms
        # A slope lost in the spread of the round trip says only that the link is faster than can be told.
        if extra_ms > max(0.1 * rtt.median_ms, 0.5 * (rtt.median_ms - min(rtt.samples_ms))):
            megabits = (large.payload_bytes - base_bytes) * 8 / 1e6 / (extra_ms / 1000)
            found[f"{kind}_mbit_per_s"] = round(megabits, 2)
    return found
