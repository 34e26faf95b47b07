"""Metrics of a run: SLO attainment per session; goodput, latency and waste per fleet.

A token counts when it reaches the edge.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from wispprof.types import Slo

_LEAST_TOKENS = 8
"""A running session is judged from this many tokens on."""


@dataclass(slots=True)
class SessionRecord:
    """One generation as its user saw it."""

    device: int
    number: int
    slo: Slo
    arrival_ms: float
    prompt_tokens: int
    output_tokens: int
    client: str = ""
    admitted_ms: float = math.nan
    first_ms: float = math.nan
    last_ms: float = math.nan
    tokens: int = 0
    done: bool = False
    refused: bool = False

    @property
    def ttft_ms(self) -> float:
        return self.first_ms - self.arrival_ms

    @property
    def tpot_ms(self) -> float:
        """Mean time of a token after the first; NaN before there are two."""
        return (self.last_ms - self.first_ms) / (self.tokens - 1) if self.tokens > 1 else math.nan

    def missed_by(self, now_ms: float) -> str:
        """Why the SLO was missed: ``kv`` (refused, or most of the first token's time went by before the
        cache had space), ``ttft``, or ``speed``."""
        if self.refused or math.isnan(self.admitted_ms):
            return "kv"
        first_ms = now_ms if math.isnan(self.first_ms) else self.first_ms
        limit = self.slo.ttft_ms
        if math.isnan(self.first_ms) or (limit is not None and first_ms - self.arrival_ms > limit):
            return "kv" if self.admitted_ms - self.arrival_ms > (first_ms - self.arrival_ms) / 2 else "ttft"
        return "speed"

    def surely_missed(self, now_ms: float) -> bool:
        """Whether the SLO is missed whatever comes later."""
        slo, first_ms = self.slo, self.first_ms
        if self.refused:
            return True
        if slo.ttft_ms is not None and (now_ms if math.isnan(first_ms) else first_ms) > (
            self.arrival_ms + slo.ttft_ms
        ):
            return True
        last_ms = self.last_ms if self.done else now_ms
        tokens = self.tokens if self.done else self.output_tokens
        return last_ms - first_ms > (tokens - 1) * slo.tpot_ms * (1 + 1e-9)  # false before the first token

    def slo_met(self, now_ms: float) -> bool | None:
        """Whether the session met its SLO; ``None`` if it has too few tokens to judge and does not lag."""
        slo = self.slo
        if self.refused:
            return False
        if math.isnan(self.first_ms):
            limit = slo.ttft_ms if slo.ttft_ms is not None else math.inf
            # Without a TTFT: no token in the time that the SLO allows for the whole output is a miss.
            limit = min(limit, self.output_tokens * slo.tpot_ms)
            return False if now_ms - self.arrival_ms > limit else None
        if slo.ttft_ms is not None and self.ttft_ms > slo.ttft_ms:
            return False
        if not self.done:
            if now_ms - self.first_ms > (self.tokens + _LEAST_TOKENS) * slo.tpot_ms:
                return False  # too late to catch up
            if self.tokens < _LEAST_TOKENS:
                return None
        return self.last_ms - self.first_ms <= (self.tokens - 1) * slo.tpot_ms * (1 + 1e-9)


@dataclass(slots=True)
class Counters:
    """Sums over the counted part of a run (after warm-up)."""

    steps: int = 0
    step_ms: float = 0.0
    predicted_ms: float = 0.0
    busy_ms: float = 0.0
    rows: int = 0
    prefill_rows: int = 0
    committed: int = 0
    rounds: int = 0
    verified: int = 0
    accepted: int = 0
    drafted: int = 0
    drafting_ms: float = 0.0
    wasted_ms: float = 0.0
    wasted_tokens: int = 0
    proactive: int = 0
    proactive_hits: int = 0
    queue_ms: float = 0.0
    up_bytes: int = 0
    down_bytes: int = 0
    preemptions: int = 0
    reused_tokens: int = 0
    draft_j: float = 0.0
    idle_j: float = 0.0


@dataclass(frozen=True)
class Report:
    """A run in figures. Rates are per second of counted time; percentiles are p50, p95, p99.

    ``attainment``: share of judged sessions that met their SLO; NaN if none was judged. ``goodput``: tokens/s
    of sessions that met it. ``accepted_per_round``: drafts accepted per verify item of a drafting
    session (the committed tokens are one more). ``wasted_share``: of drafting time. ``judged_by_client``: by
    the client's name, (sessions that met their SLO, judged). ``missed_by``: sessions by
    :meth:`SessionRecord.missed_by`.
    """

    system: str
    seconds: float
    sessions: int
    attainment: float
    goodput: float
    throughput: float
    ttft_ms: tuple[float, float, float]
    tpot_ms: tuple[float, float, float]
    mean_step_ms: float
    mean_items: float
    utilisation: float
    accepted_per_round: float
    acceptance: float
    wasted_share: float
    drafted_per_token: float
    proactive_hit_rate: float
    mean_queue_ms: float
    bytes_up_per_token: float
    bytes_down_per_token: float
    device_j_per_token: float
    attainment_by_slo: dict[str, float] = field(default_factory=dict)
    judged_by_client: dict[str, tuple[int, int]] = field(default_factory=dict)
    missed_by: dict[str, int] = field(default_factory=dict)
    counters: Counters = field(default_factory=Counters)
    events: int = 0

    @property
    def violations(self) -> float:
        """Share of judged sessions that missed their SLO; NaN if none was judged."""
        return 1.0 - self.attainment


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """p50, p95 and p99; NaN without values."""
    if not values:
        return math.nan, math.nan, math.nan
    p50, p95, p99 = np.percentile(np.asarray(values), [50, 95, 99]).tolist()
    return p50, p95, p99


def summarise(
    system: str,
    records: Sequence[SessionRecord],
    counters: Counters,
    window_tokens: dict[tuple[int, int], int],
    start_ms: float,
    end_ms: float,
    events: int,
) -> Report:
    """The report of a run. ``window_tokens``: by (device, number), tokens delivered in the counted time."""
    judged: list[tuple[SessionRecord, bool]] = []
    for record in records:
        if record.arrival_ms < start_ms and record.done and record.last_ms < start_ms:
            continue
        verdict = record.slo_met(end_ms)
        if verdict is not None:
            judged.append((record, verdict))
    seconds = (end_ms - start_ms) / 1000.0
    good_keys = {(r.device, r.number) for r, slo_met in judged if slo_met}
    good = sum(tokens for key, tokens in window_tokens.items() if key in good_keys)
    total = sum(window_tokens.values())
    classes: dict[str, list[bool]] = {}
    clients: dict[str, tuple[int, int]] = {}
    for record, slo_met in judged:
        classes.setdefault(f"{record.slo.tokens_per_s:g}", []).append(slo_met)
        met, of = clients.get(record.client, (0, 0))
        clients[record.client] = (met + slo_met, of + 1)
    c = counters
    return Report(
        system=system,
        seconds=seconds,
        sessions=len(judged),
        attainment=_share(sum(slo_met for _, slo_met in judged), len(judged)),
        goodput=good / seconds,
        throughput=total / seconds,
        ttft_ms=percentiles([r.ttft_ms for r, _ in judged if not math.isnan(r.first_ms)]),
        tpot_ms=percentiles([r.tpot_ms for r, _ in judged if r.tokens > 1]),
        mean_step_ms=_share(c.step_ms, c.steps),
        mean_items=_share(c.rounds, c.steps),
        utilisation=_share(c.busy_ms, end_ms - start_ms),
        accepted_per_round=_share(c.accepted, c.rounds),
        acceptance=_share(c.accepted, c.verified),
        wasted_share=_share(c.wasted_ms, c.drafting_ms),
        drafted_per_token=_share(c.drafted, c.committed),
        proactive_hit_rate=_share(c.proactive_hits, c.proactive),
        mean_queue_ms=_share(c.queue_ms, c.rounds),
        bytes_up_per_token=_share(c.up_bytes, c.committed),
        bytes_down_per_token=_share(c.down_bytes, c.committed),
        device_j_per_token=_share(c.draft_j + c.idle_j, c.committed),
        attainment_by_slo={k: _share(sum(v), len(v)) for k, v in sorted(classes.items())},
        judged_by_client=clients,
        missed_by=dict(Counter(r.missed_by(end_ms) for r, slo_met in judged if not slo_met)),
        counters=c,
        events=events,
    )


def _share(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
