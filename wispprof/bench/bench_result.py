"""What a bench found: scalar figures, the server's steps, and every request behind them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from wispprof.edge.request_stats import RequestStats
from wispprof.types import Slo

__all__ = ["BenchResult", "RequestResult", "StepSample", "summarise"]

StepSample = tuple[float, float, float]
"""Predicted median, predicted bound, measured; ms."""


@dataclass(frozen=True)
class RequestResult:
    """One request. ``lossless``: its text equals the trace's path. ``err``: why it did not finish."""

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
    """One system under one load. ``figures``: scalars, units in their names, ``nan`` where unknown."""

    policy: str
    load: dict[str, Any]
    figures: dict[str, float]
    steps: tuple[StepSample, ...] = ()
    outcomes: tuple[RequestResult, ...] = field(default=(), repr=False)
    faults: dict[str, int] = field(default_factory=dict)

    @property
    def lossless(self) -> bool:
        """Whether every finished text equals what the target alone gives."""
        return all(outcome.lossless for outcome in self.outcomes)

    def record(self, requests: bool = False) -> dict[str, Any]:
        """JSON-ready; with ``requests`` every request's statistics too."""
        document: dict[str, Any] = {
            "policy": self.policy,
            "load": self.load,
            "figures": self.figures,
            "lossless": self.lossless,
            "faults": self.faults,
            "steps": [list(step) for step in self.steps],
        }
        if requests:
            document["requests"] = [
                {
                    "device": o.device,
                    "slo": o.slo.tokens_per_s,
                    "met_slo": o.met_slo,
                    **o.stats.summary(),
                }
                for o in self.outcomes
            ]
        return document


def summarise(
    policy: str,
    load: dict[str, Any],
    outcomes: Sequence[RequestResult],
    seconds: float,
    steps: Sequence[StepSample],
    server: dict[str, float],
    wire_bytes: tuple[int, int],
) -> BenchResult:
    """Boil requests down. ``seconds``: first request to last token. ``wire_bytes``: up and down over all
    connections, hellos and pings included. ``server``: what it says of its steps, where asked over HTTP.
    """
    stats = [o.stats for o in outcomes if not o.err]
    tokens = sum(s.tokens for s in stats)
    rounds = sum(s.rounds for s in stats)
    draft_ms = sum(s.draft_ms for s in stats)
    ttft = [s.first_ms for s in stats if s.first_ms is not None]
    tpot = [s.tpot_ms for s in stats if s.tpot_ms is not None]
    good = sum(o.stats.tokens for o in outcomes if o.met_slo)
    guesses = sum(s.proactive_guesses for s in stats)
    figures: dict[str, float] = {
        "requests": float(len(outcomes)),
        "failed": float(len(outcomes) - len(stats)),
        "mismatches": float(sum(not o.lossless for o in outcomes)),
        "seconds": seconds,
        "attainment": _share(sum(o.met_slo for o in outcomes), len(outcomes)),
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
        **_of_steps(steps),
        **server,
    }
    for speed in sorted({o.slo.tokens_per_s for o in outcomes}):
        mine = [o.met_slo for o in outcomes if o.slo.tokens_per_s == speed]
        figures[f"attainment_at_{speed:g}_tokens_per_s"] = _share(sum(mine), len(mine))
    faults = Counter(o.err for o in outcomes if o.err)
    return BenchResult(policy, load, figures, tuple(steps), tuple(outcomes), dict(faults))


def _of_steps(steps: Sequence[StepSample]) -> dict[str, float]:
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
        "step_within_bound": float((actual <= bound)[bound > 0].mean())
        if known.any()
        else math.nan,
    }


def _share(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _percentile(values: Sequence[float], share: float) -> float:
    return float(np.percentile(values, share)) if values else math.nan
