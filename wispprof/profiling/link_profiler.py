"""profile-link: round trip, jitter and bandwidth to a server, in the frames of the protocol."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from wispprof.artifacts import LinkProfile, LinkRow
from wispprof.errors import ProtocolError, ServerUnreachable
from wispprof.profiling.profile_run import begin_manifest, finalize_profile
from wispprof.profiling.sweep import SweepResult
from wispprof.profiling.workload import round_ms
from wispprof.settings.profiler_settings import LinkProfilerSettings, SweepSettings
from wispprof.settings.shared_settings import ServerAccess
from wispprof.types import ModelInfo, Progress

if TYPE_CHECKING:
    from wispprof import protocol
    from wispprof.edge.connection import Connection, ConnectionFactory


@dataclass
class ServerClient:
    """A greeted connection to ``wispprof serve``. ``timeout_s``: longest wait for a frame."""

    server: str
    link: Connection
    timeout_s: float
    welcome: protocol.Welcome = field(init=False)

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        server: str,
        access: ServerAccess,
        edge: str,
        timeout_s: float,
        connect: ConnectionFactory | None = None,
    ) -> AsyncIterator[ServerClient]:
        """Connect, say hello as ``edge`` and close at the end. ``connect`` replaces the WebSocket.

        Raises :class:`ServerUnreachable`, :class:`HandshakeRefused`, :class:`ProtocolError`.
        """
        from wispprof import protocol
        from wispprof.edge.connection import ssl_context, websocket_connections
        from wispprof.edge.handshake import refused_hello

        if connect is None:
            connect = websocket_connections(server, ssl=ssl_context(access.ca_file))
        link = await connect()
        try:
            hello = protocol.Hello(protocol.PROTOCOL_VERSION, "", key=access.key, edge=edge)
            client = cls(server, link, timeout_s)
            await client.send(hello)
            answer = await client.receive()
            if isinstance(answer, protocol.Problem):
                raise refused_hello(answer)
            if not isinstance(answer, protocol.Welcome):
                raise ProtocolError("The server did not answer the greeting.", "Is it a wispprof server?")
            client.welcome = answer
            yield client
        finally:
            await link.close()

    async def send(self, frame: Any) -> None:
        from wispprof import protocol

        await self.link.send(protocol.encode(frame))

    async def receive(self) -> Any:
        from wispprof import protocol

        try:
            data = await asyncio.wait_for(self.link.receive(), self.timeout_s)
        except TimeoutError:
            raise ServerUnreachable(
                f"No answer from {self.server} for {self.timeout_s:.0f} s.",
                "Check that the server runs, is not overloaded, and the link is up.",
            ) from None
        return protocol.decode_server(data)

    async def ping(self, number: int, up: int, down: int, clock: Callable[[], float]) -> float:
        """Milliseconds of one exchange of ``up`` bytes for ``down``; raises :class:`ProtocolError`."""
        from wispprof import protocol

        frame = protocol.encode(protocol.Ping(number, bytes(up), down))
        begin = clock()
        await self.link.send(frame)
        answer = await self.receive()
        elapsed_ms = (clock() - begin) * 1000.0
        if not isinstance(answer, protocol.Pong) or answer.number != number:
            raise ProtocolError(
                f"The server answered a ping with {type(answer).__name__}.",
                "Use a server of the same version.",
            )
        if len(answer.payload) != down:
            raise ProtocolError(
                f"The server sent {len(answer.payload)} bytes instead of {down}.",
                "Use smaller sizes or a server of the same version.",
            )
        return elapsed_ms


def profile_link(
    settings: LinkProfilerSettings,
    progress: Progress | None = None,
    *,
    connect: ConnectionFactory | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> LinkProfile:
    """Measure the link to a running server. ``connect`` replaces the WebSocket (for tests).

    Raises :class:`ServerUnreachable`, :class:`HandshakeRefused`, :class:`ProtocolError`.
    """
    return asyncio.run(_profile(settings, progress, connect, clock))


async def _profile(
    settings: LinkProfilerSettings,
    progress: Progress | None,
    connect: ConnectionFactory | None,
    clock: Callable[[], float],
) -> LinkProfile:
    begin = clock()
    async with ServerClient.open(
        settings.server, settings.access, "profile-link", settings.timeout_s, connect
    ) as client:
        welcome = client.welcome
        manifest = begin_manifest(
            "link",
            ModelInfo(welcome.target, tokenizer_hash=welcome.tokenizer, max_context=welcome.max_context),
            SweepSettings(max_samples=settings.count, min_samples=min(6, settings.count)),
            engine={"server": settings.server, "protocol": welcome.protocol},
            measure={"sizes": list(settings.sizes)},
        )
        rows = await _link_rows(client, settings, progress, clock)
    result = SweepResult(rows, clock() - begin, None)
    profile = finalize_profile(manifest, result, settings.output, None, link_summary(rows))
    return cast(LinkProfile, profile)


async def _link_rows(
    client: ServerClient,
    settings: LinkProfilerSettings,
    progress: Progress | None,
    clock: Callable[[], float],
) -> tuple[LinkRow, ...]:
    """Exchange small frames for the round trip, and larger ones up and down."""

    plan = [("rtt", 0)]
    plan += [(kind, size) for size in settings.sizes for kind in ("uplink", "downlink")]
    samples: dict[tuple[str, int], list[float]] = {entry: [] for entry in plan}
    rounds, number = settings.warmup + settings.count, 0
    for index in range(rounds):
        # Kinds alternate, so that a short disturbance affects all of them.
        for kind, size in plan:
            number += 1
            up, down = (size if kind == "uplink" else 0), (size if kind == "downlink" else 0)
            elapsed = await client.ping(number, up, down, clock)
            if index >= settings.warmup:
                samples[kind, size].append(round_ms(elapsed))
        if progress is not None:
            progress(index + 1, rounds, "exchanging frames")
    return tuple(
        LinkRow(f"{kind} {size}" if size else kind, kind, size, tuple(taken), order=order)
        for order, ((kind, size), taken) in enumerate(samples.items())
    )


def link_summary(rows: Sequence[LinkRow]) -> dict[str, Any]:
    """``rtt_ms`` (median), ``rtt_p95_ms``, ``jitter_ms`` (mean change between successive exchanges, as in
    RFC 3550 without smoothing), and the bandwidth each way from the slope between sizes."""
    [rtt] = [row for row in rows if row.kind == "rtt"]
    changes = [abs(b - a) for a, b in zip(rtt.samples_ms, rtt.samples_ms[1:], strict=False)]
    found: dict[str, Any] = {
        "rtt_ms": round(rtt.median_ms, 4),
        "rtt_p95_ms": round(sorted(rtt.samples_ms)[int(0.95 * (len(rtt.samples_ms) - 1))], 4),
        "jitter_ms": round(statistics.fmean(changes), 4) if changes else 0.0,
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
        # A slope within the spread of the round trip: the link is too fast to measure its bandwidth.
        if extra_ms > max(0.1 * rtt.median_ms, 0.5 * (rtt.median_ms - min(rtt.samples_ms))):
            megabits = (large.payload_bytes - base_bytes) * 8 / 1e6 / (extra_ms / 1000)
            found[f"{kind}_mbit_per_s"] = round(megabits, 2)
    return found
