"""Results of a benchmark: scalar figures, every request, and the step times that the server reports."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

import numpy as np

from wispprof.edge.request_stats import RequestStats
from wispprof.types import Slo

if TYPE_CHECKING:
    from ssl import SSLContext

    import httpx

    from wispprof.server.process import RunningServer

StepSample = tuple[float, float, float]
"""(predicted median, predicted bound, measured) of a step, in ms."""

_SUMS = re.compile(r"^wispprof:step_time(_predicted)?_seconds_(sum|count) ([0-9.e+-]+)$", re.M)

_BEYOND_LAST_STEP = 1 << 62


@dataclass(frozen=True)
class RequestResult:
    """One request. ``lossless``: its output equals the trace's path. ``err``: message if it failed."""

    device: int
    slo: Slo
    stats: RequestStats
    lossless: bool
    err: str = ""

    @property
    def met_slo(self) -> bool:
        return not self.err and self.stats.met_slo(self.slo)


@dataclass(frozen=True)
class BenchResult:
    """One system under one load. ``figures``: scalars with units in their names; ``nan`` if unknown.

    ``errors``: number of failed requests by message.
    """

    policy: str
    load: dict[str, Any]
    figures: dict[str, float]
    steps: tuple[StepSample, ...] = ()
    results: tuple[RequestResult, ...] = field(default=(), repr=False)
    errors: dict[str, int] = field(default_factory=dict)

    @property
    def lossless(self) -> bool:
        """Whether every output equals the target's own."""
        return all(result.lossless for result in self.results)

    def record(self, requests: bool = False) -> dict[str, Any]:
        """JSON-ready; ``requests`` includes the statistics of every request."""
        document: dict[str, Any] = {
            "policy": self.policy,
            "load": self.load,
            "figures": self.figures,
            "lossless": self.lossless,
            "errors": self.errors,
            "steps": [list(step) for step in self.steps],
        }
        if requests:
            document["requests"] = [
                {"device": r.device, "slo": r.slo.tokens_per_s, "met_slo": r.met_slo, **r.stats.summary()}
                for r in self.results
            ]
        return document


def summarise(
    policy: str,
    load: dict[str, Any],
    results: Sequence[RequestResult],
    seconds: float,
    steps: Sequence[StepSample],
    server: dict[str, float],
    wire_bytes: tuple[int, int],
) -> BenchResult:
    """Aggregate requests into figures. ``seconds``: first request to last token. ``wire_bytes``: sent and
    received over all connections, hellos and pings included. ``server``: step figures from its /metrics.
    """
    stats = [r.stats for r in results if not r.err]
    tokens = sum(s.tokens for s in stats)
    rounds = sum(s.rounds for s in stats)
    draft_ms = sum(s.draft_ms for s in stats)
    ttft = [s.first_ms for s in stats if s.first_ms is not None]
    tpot = [s.tpot_ms for s in stats if s.tpot_ms is not None]
    good = sum(r.stats.tokens for r in results if r.met_slo)
    guesses = sum(s.proactive_guesses for s in stats)
    figures: dict[str, float] = {
        "requests": float(len(results)),
        "failed": float(len(results) - len(stats)),
        "mismatches": float(sum(not r.lossless for r in results)),
        "seconds": seconds,
        "attainment": _share(sum(r.met_slo for r in results), len(results)),
        "goodput_tokens_per_s": _share(good, seconds),
        "tokens_per_s": _share(tokens, seconds),
        "ttft_p50_ms": _percentile(ttft, 50),
        "ttft_p95_ms": _percentile(ttft, 95),
        "tpot_p50_ms": _percentile(tpot, 50),
        "tpot_p95_ms": _percentile(tpot, 95),
        "tpot_p99_ms": _percentile(tpot, 99),
        "accepted_per_round": _share(sum(s.accepted for s in stats), rounds),
        "acceptance": _share(sum(s.accepted for s in stats), sum(s.verified_drafts for s in stats)),
        "drafted_per_token": _share(sum(s.drafted for s in stats), tokens),
        "wasted_ms": sum(s.wasted_ms for s in stats),
        "wasted_share": _share(sum(s.wasted_ms for s in stats), draft_ms),
        "proactive_hit_rate": _share(sum(s.proactive_hits for s in stats), guesses),
        "queue_ms": _share(sum(s.queue_ms for s in stats), rounds),
        "verify_ms": _share(sum(s.verify_ms for s in stats), rounds),
        "up_bytes_per_token": _share(wire_bytes[0], tokens),
        "down_bytes_per_token": _share(wire_bytes[1], tokens),
        **_step_figures(steps),
        **server,
    }
    for speed in sorted({r.slo.tokens_per_s for r in results}):
        met = [r.met_slo for r in results if r.slo.tokens_per_s == speed]
        figures[f"attainment_at_{speed:g}_tokens_per_s"] = _share(sum(met), len(met))
    errors = Counter(r.err for r in results if r.err)
    return BenchResult(policy, load, figures, tuple(steps), tuple(results), dict(errors))


def pool_results(turns: Sequence[BenchResult]) -> BenchResult:
    """The results of one system in several turns under one load, as one result.

    Rates are over the turns' time together. Figures that only the server gave are means over the turns.
    """
    results = [result for turn in turns for result in turn.results]
    steps = [step for turn in turns for step in turn.steps]
    seconds = sum(turn.figures["seconds"] for turn in turns)

    def wire_bytes(name: str) -> int:
        sent = (turn.figures[name] * turn.figures["tokens_per_s"] * turn.figures["seconds"] for turn in turns)
        return round(sum(count for count in sent if math.isfinite(count)))

    traffic = wire_bytes("up_bytes_per_token"), wire_bytes("down_bytes_per_token")
    pooled = summarise(turns[0].policy, turns[0].load, results, seconds, steps, {}, traffic)
    for name in turns[0].figures.keys() - pooled.figures.keys():
        values = [turn.figures[name] for turn in turns if name in turn.figures]
        pooled.figures[name] = sum(values) / len(values)
    return pooled


def _step_figures(steps: Sequence[StepSample]) -> dict[str, float]:
    if not steps:
        return {}
    table = np.asarray(steps, dtype=float)
    predicted, bound, actual = table[:, 0], table[:, 1], table[:, 2]
    known = (predicted > 0) & (actual > 0)
    error = np.abs(predicted[known] / actual[known] - 1.0)
    return {
        "steps": float(len(steps)),
        "step_p50_ms": float(np.median(actual)),
        "step_predicted_p50_ms": float(np.median(predicted)),
        "step_error": float(np.median(error)) if known.any() else math.nan,
        "step_within_bound": float((actual <= bound)[bound > 0].mean()) if known.any() else math.nan,
    }


def _share(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _percentile(values: Sequence[float], share: float) -> float:
    return float(np.percentile(values, share)) if values else math.nan


# --- step times that the server reports ---


class StepWatch(Protocol):
    """Collects a server's step times during a benchmark."""

    async def begin(self) -> None: ...

    async def end(self) -> tuple[list[StepSample], dict[str, float]]:
        """Steps since :meth:`begin` (empty if the server does not list them), and scalar figures."""


class HandleWatch:
    """Reads the step records of a server in this process."""

    def __init__(self, running: RunningServer) -> None:
        self._server = running.server
        self._since_ms = 0.0

    async def begin(self) -> None:
        self._since_ms = self._server.now_ms()

    async def end(self) -> tuple[list[StepSample], dict[str, float]]:
        records = [r for r in self._server.metrics.steps if r.at_ms >= self._since_ms]
        return [(r.predicted_ms, r.bound_ms, r.actual_ms) for r in records], {}


class MetricsWatch:
    """Reads step-time sums from a server's ``/metrics`` and, if available, single steps from its ``/steps``.

    ``ssl``: context for ``https://``; by default the system's certificate authorities. ``key``: API key,
    which a server beyond loopback asks for.
    """

    def __init__(self, split_url: str, ssl: SSLContext | None = None, key: str = "") -> None:
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        parts = urlsplit(split_url)
        scheme = "https" if parts.scheme == "wss" else "http"
        self._url = f"{scheme}://{parts.netloc}"
        self._verify: SSLContext | bool = True if ssl is None else ssl
        self._next: int | None = None
        self._before: dict[str, float] = {}

    async def begin(self) -> None:
        self._before = await self._sums()
        answer = await self._steps(_BEYOND_LAST_STEP)
        self._next = None if answer is None else int(answer["next"])

    async def end(self) -> tuple[list[StepSample], dict[str, float]]:
        means = self._means(await self._sums())
        answer = None if self._next is None else await self._steps(self._next)
        if answer is None or answer["first"] != self._next:  # the server no longer holds them all
            return [], means
        steps = answer["steps"]
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
        """``None`` if the server does not expose ``path``, for example behind a proxy."""
        import httpx

        try:
            verify = self._verify
            async with httpx.AsyncClient(timeout=5.0, trust_env=False, verify=verify) as client:
                answer = await client.get(self._url + path, headers=self._headers)
        except httpx.HTTPError:
            return None
        return answer if answer.is_success else None
