"""Prometheus metrics of an edge. Names in base units (seconds, bytes), as Prometheus asks."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from wispprof.edge.client import EdgeClient
from wispprof.edge.edge_runtime import Reply
from wispprof.edge.request_stats import RequestStats
from wispprof.types import TokenChunk

_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class EdgeMetrics:
    """Counters of one edge, in a registry of their own."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()

        def counter(name: str, text: str) -> Counter:
            return Counter(f"wispprof_edge_{name}", text, registry=registry)

        self.requests = Counter(
            "wispprof_edge_requests", "Finished requests.", ["finished"], registry=registry
        )
        self.tokens = counter("tokens", "Committed tokens.")
        self.unverified = counter("unverified_tokens", "Tokens of the draft alone.")
        self.drafted = counter("drafted_tokens", "Tokens drafted.")
        self.accepted = counter("accepted_tokens", "Drafts verified and kept.")
        self.draft_seconds = counter("draft_seconds", "Time spent drafting.")
        self.wasted_seconds = counter("wasted_draft_seconds", "Of it, after a first rejection.")
        self.energy = counter("energy_joules", "Used by the device while requests ran.")
        self.guesses = counter("proactive_guesses", "Guesses at the target's own token.")
        self.hits = counter("proactive_hits", "Guesses that were right.")
        self.ttft = Histogram(
            "wispprof_edge_ttft_seconds", "First token.", buckets=_SECONDS, registry=registry
        )
        self.tpot = Histogram(
            "wispprof_edge_tpot_seconds",
            "Mean time per later token.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.rtt = Gauge("wispprof_edge_rtt_seconds", "Smoothed round trip.", registry=registry)
        self.up = Gauge("wispprof_edge_link_up", "1 while connected.", registry=registry)
        self.reconnects = Gauge("wispprof_edge_reconnects", "Links restored.", registry=registry)
        self.sent = Gauge("wispprof_edge_sent_bytes", "Sent over links.", registry=registry)
        self.received = Gauge("wispprof_edge_received_bytes", "Received over links.", registry=registry)

    async def watch(self, reply: Reply, stream: AsyncGenerator[TokenChunk]) -> AsyncGenerator[TokenChunk]:
        """The tokens of ``stream``; ``reply`` is counted when it ends, however it ends."""
        try:
            async with aclosing(stream):
                async for chunk in stream:
                    yield chunk
        finally:
            self._count(reply.stats, reply.finished or "aborted")

    def _count(self, stats: RequestStats, finished: str) -> None:
        self.requests.labels(finished).inc()
        self.tokens.inc(stats.tokens)
        self.unverified.inc(stats.draft_only)
        self.drafted.inc(stats.drafted)
        self.accepted.inc(stats.accepted)
        self.draft_seconds.inc(stats.draft_ms / 1000.0)
        self.wasted_seconds.inc(stats.wasted_ms / 1000.0)
        self.guesses.inc(stats.proactive_guesses)
        self.hits.inc(stats.proactive_hits)
        self.energy.inc(stats.energy_j or 0.0)
        if stats.ttft_ms is not None:
            self.ttft.observe(stats.ttft_ms / 1000.0)
        if stats.tpot_ms is not None:
            self.tpot.observe(stats.tpot_ms / 1000.0)

    def link(self, client: EdgeClient) -> None:
        """Bring the link's gauges up to date."""
        self.rtt.set(client.rtt.mean_ms / 1000.0)
        self.up.set(client.up)
        self.reconnects.set(client.reconnects)
        self.sent.set(client.traffic.up_bytes)
        self.received.set(client.traffic.down_bytes)

    def text(self) -> bytes:
        """What /metrics answers."""
        return generate_latest(self._registry)
