"""What a server says of its own steps: from its handle in this process, or from its /metrics."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

from wispprof.runtime.bench.result import StepSample

if TYPE_CHECKING:
    from wispprof.runtime.server.run import RunningServer

__all__ = ["HandleWatch", "MetricsWatch", "StepWatch"]

_SUMS = re.compile(r"^wispprof:step_time(_predicted)?_seconds_(sum|count) ([0-9.e+-]+)$", re.M)


class StepWatch(Protocol):
    """Asked before and after a load."""

    async def begin(self) -> None: ...

    async def end(self) -> tuple[list[StepSample], dict[str, float]]:
        """Steps since :meth:`begin` (where they can be had one by one), and scalar figures."""


class HandleWatch:
    """Reads the step records of a server in this process (the last 1,024 of them)."""

    def __init__(self, running: RunningServer) -> None:
        self._server = running.server
        self._since_ms = 0.0

    async def begin(self) -> None:
        self._since_ms = self._server.now_ms()

    async def end(self) -> tuple[list[StepSample], dict[str, float]]:
        records = [r for r in self._server.metrics.steps if r.at_ms >= self._since_ms]
        return [(r.predicted_ms, r.bound_ms, r.actual_ms) for r in records], {}


class MetricsWatch:
    """Scrapes ``/metrics`` of the server behind a split address; only means can be had there."""

    def __init__(self, split_url: str) -> None:
        parts = urlsplit(split_url)
        scheme = "https" if parts.scheme == "wss" else "http"
        self._url = f"{scheme}://{parts.netloc}/metrics"
        self._before: dict[str, float] = {}

    async def begin(self) -> None:
        self._before = await self._scrape()

    async def end(self) -> tuple[list[StepSample], dict[str, float]]:
        after = await self._scrape()
        change = {name: value - self._before.get(name, 0.0) for name, value in after.items()}
        count = change.get("count", 0.0)
        if not count:
            return [], {}
        actual = 1000.0 * change["sum"] / count
        predicted = 1000.0 * change.get("predicted_sum", 0.0) / count
        return [], {
            "steps": count,
            "step_mean_ms": actual,
            "step_predicted_mean_ms": predicted,
            "step_mean_error": abs(predicted / actual - 1.0) if actual else 0.0,
        }

    async def _scrape(self) -> dict[str, float]:
        import httpx

        try:
            async with httpx.AsyncClient(timeout=5.0, trust_env=False) as client:
                answer = await client.get(self._url)
        except httpx.HTTPError:
            return {}  # a server behind a proxy may not show its metrics: then the figures lack
        found = _SUMS.findall(answer.text)
        return {("predicted_" if p else "") + kind: float(value) for p, kind, value in found}
