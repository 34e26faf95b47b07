"""What a server says of its own steps: from its handle in this process, or from its /metrics."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from wispprof.bench.bench_result import StepSample

if TYPE_CHECKING:
    from ssl import SSLContext

    import httpx

    from wispprof.server.process import RunningServer

__all__ = ["HandleWatch", "MetricsWatch", "StepWatch"]

_SUMS = re.compile(r"^wispprof:step_time(_predicted)?_seconds_(sum|count) ([0-9.e+-]+)$", re.M)

_NOTHING_YET = 1 << 62
"""A number that no step has."""


class StepWatch(Protocol):
    """Asked before and after a load."""

    async def begin(self) -> None: ...

    async def end(self) -> tuple[list[StepSample], dict[str, float]]:
        """Steps since :meth:`begin` (where they can be had one by one), and scalar figures."""


class HandleWatch:
    """Reads the step records of a server in this process, as many as it still holds."""

    def __init__(self, running: RunningServer) -> None:
        self._server = running.server
        self._since_ms = 0.0

    async def begin(self) -> None:
        self._since_ms = self._server.now_ms()

    async def end(self) -> tuple[list[StepSample], dict[str, float]]:
        records = [r for r in self._server.metrics.steps if r.at_ms >= self._since_ms]
        return [(r.predicted_ms, r.bound_ms, r.actual_ms) for r in records], {}


class MetricsWatch:
    """Asks the server behind a split address: for the sums at ``/metrics``, and for its steps one by one at
    ``/steps``, where it shows them and still holds them all. ``ssl`` replaces the system's trust."""

    def __init__(self, split_url: str, ssl: SSLContext | None = None) -> None:
        parts = urlsplit(split_url)
        scheme = "https" if parts.scheme == "wss" else "http"
        self._url = f"{scheme}://{parts.netloc}"
        self._trust: SSLContext | bool = True if ssl is None else ssl
        self._next: int | None = None
        self._before: dict[str, float] = {}

    async def begin(self) -> None:
        self._before = await self._sums()
        seen = await self._steps(_NOTHING_YET)
        self._next = None if seen is None else int(seen["next"])

    async def end(self) -> tuple[list[StepSample], dict[str, float]]:
        means = self._means(await self._sums())
        found = None if self._next is None else await self._steps(self._next)
        if found is None or found["first"] != self._next:
            return [], means
        steps = found["steps"]
        return [(s["predicted_ms"], s["bound_ms"], s["actual_ms"]) for s in steps], means

    def _means(self, after: dict[str, float]) -> dict[str, float]:
        change = {name: value - self._before.get(name, 0.0) for name, value in after.items()}
        count = change.get("count", 0.0)
        if not count:
            return {}
        actual = 1000.0 * change["sum"] / count
        predicted = 1000.0 * change.get("predicted_sum", 0.0) / count
        return {
            "steps": count,
            "step_mean_ms": actual,
            "step_predicted_mean_ms": predicted,
            "step_mean_error": abs(predicted / actual - 1.0) if actual else 0.0,
        }

    async def _steps(self, since: int) -> dict[str, Any] | None:
        answer = await self._get(f"/steps?since={since}")
        try:
            return None if answer is None else dict(answer.json())
        except ValueError:
            return None

    async def _sums(self) -> dict[str, float]:
        answer = await self._get("/metrics")
        found = [] if answer is None else _SUMS.findall(answer.text)
        return {("predicted_" if p else "") + kind: float(value) for p, kind, value in found}

    async def _get(self, path: str) -> httpx.Response | None:
        """``None`` where a server behind a proxy does not show this: then the figures lack."""
        import httpx

        try:
            async with httpx.AsyncClient(
                timeout=5.0, trust_env=False, verify=self._trust
            ) as client:
                answer = await client.get(self._url + path)
        except httpx.HTTPError:
            return None
        return answer if answer.is_success else None
