"""From recorded requests to a workload, and what differs between two workloads."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from wispprof.artifacts.workload import BIN_RATIO, HOURS, LEAST_COUNT, LengthBin, SeenTraffic
from wispprof.errors import PlanError
from wispprof.simulation.arrivals import BLOCK_TOKENS, Request
from wispprof.simulation.request_traces import WISPPROF, read_clients, read_trace

LEAST_ROUNDS = 50
"""Rounds of a depth from which its acceptance is known."""
_HOUR_MS, _WINDOW_MS = 3.6e6, 10_000.0


def workload_of(paths: Sequence[Path]) -> SeenTraffic:
    """One workload of all files, which must be of one format; their requests are added up as if they followed
    each other."""
    if not paths:
        raise PlanError("There is no traffic to read.", "Name a trace or a result file.")
    names, recorded = set(), []
    for path in paths:
        name, requests, begun_s = read_trace(path)
        names.add(name)
        recorded.append((requests, begun_s))
    if len(names) > 1:
        raise PlanError(
            f"The files are of {len(names)} formats: {', '.join(sorted(names))}.", "Read each alone."
        )
    every = [request for requests, _ in recorded for request in requests]
    spans_ms = [max(1.0, requests[-1].time_ms) for requests, _ in recorded]
    hours = sum(spans_ms) / _HOUR_MS
    mean = 1000.0 * len(every) / sum(spans_ms)
    source = names.pop()
    return SeenTraffic(
        source,
        len(every),
        hours,
        mean,
        max(_busiest_per_s(requests, span) for (requests, _), span in zip(recorded, spans_ms, strict=True)),
        _burst(recorded[0][0], spans_ms[0]),
        _by_hour(recorded),
        _bins(every),
        _reused(every),
        *(_clients(paths) if source == WISPPROF else ({}, (), ())),
    )


def _clients(paths: Sequence[Path]) -> tuple[dict[str, int], tuple[float, ...], tuple[float, ...]]:
    """(requests by SLO, percentiles of round trips, cumulative acceptance by depth) of request logs. SLOs of
    fewer than :data:`LEAST_COUNT` requests, and depths of few rounds, are left out."""
    clients = [client for path in paths for client in read_clients(path)]
    slos = Counter(f"{client.tokens_per_s:g}" for client in clients if client.tokens_per_s > 0)
    rtts_ms = sorted(client.rtt_ms for client in clients if not math.isnan(client.rtt_ms))
    seen: tuple[float, ...] = ()
    if len(rtts_ms) >= LEAST_COUNT:
        seen = tuple(rtts_ms[round(q * (len(rtts_ms) - 1))] for q in (0.1, 0.5, 0.9))
    drafted, accepted = Counter[int](), Counter[int]()
    for client in clients:
        drafted.update(dict(enumerate(client.drafted)))
        accepted.update(dict(enumerate(client.accepted)))
    shares: list[float] = []
    while drafted[depth := len(shares)] >= LEAST_ROUNDS:
        shares.append(min(accepted[depth] / drafted[depth], shares[-1] if shares else 1.0))
    return {name: n for name, n in sorted(slos.items()) if n >= LEAST_COUNT}, seen, tuple(shares)


def _busiest_per_s(requests: Sequence[Request], span_ms: float) -> float:
    if span_ms < _HOUR_MS:
        return 1000.0 * len(requests) / span_ms
    whole = int(span_ms // _HOUR_MS)
    counts = Counter(
        min(whole - 1, int(r.time_ms // _HOUR_MS)) for r in requests if r.time_ms < whole * _HOUR_MS
    )
    return max(counts.values()) / 3600.0


def _burst(requests: Sequence[Request], span_ms: float) -> float:
    windows = max(1, int(span_ms // _WINDOW_MS))
    counts = Counter(int(r.time_ms // _WINDOW_MS) for r in requests)
    rates = sorted(counts.get(number, 0) for number in range(windows))
    mean = sum(rates) / windows
    return rates[min(windows - 1, math.ceil(0.99 * windows) - 1)] / mean if mean else 1.0


def _by_hour(recorded: Iterable[tuple[Sequence[Request], float]]) -> tuple[float | None, ...]:
    """Mean requests a second by hour of the day; ``None`` for hours recorded for less than a minute."""
    counts, seconds = [0] * HOURS, [0.0] * HOURS
    for requests, begun_s in recorded:
        if math.isnan(begun_s):
            continue
        begun, ended = begun_s, begun_s + requests[-1].time_ms / 1000.0
        while begun < ended:
            upto = min(ended, (begun // 3600 + 1) * 3600)
            seconds[int(begun // 3600) % HOURS] += upto - begun
            begun = upto
        for request in requests:
            counts[int((begun_s + request.time_ms / 1000.0) // 3600) % HOURS] += 1
    return tuple(n / s if s >= 60 else None for n, s in zip(counts, seconds, strict=True))


def _bins(requests: Sequence[Request]) -> tuple[LengthBin, ...]:
    """Joint counts of prompt and output lengths; rare bins join the nearest common one."""

    def place(tokens: int) -> int:
        return int(math.log(max(1, tokens)) / math.log(BIN_RATIO) + 1e-9)

    counts = Counter((place(r.prompt_tokens), place(r.output_tokens)) for r in requests)
    common = {cell: n for cell, n in counts.items() if n >= LEAST_COUNT}
    if not common:
        raise PlanError(
            f"{len(requests)} requests are too few: no {LEAST_COUNT} have like lengths.", "Record for longer."
        )
    for cell, n in counts.items():
        if n < LEAST_COUNT:
            near = min(common, key=lambda c: (abs(c[0] - cell[0]) + abs(c[1] - cell[1]), c))
            common[near] += n

    def bounds(place: int) -> tuple[int, int]:
        low, high = math.ceil(BIN_RATIO**place - 1e-9), math.ceil(BIN_RATIO ** (place + 1) - 1e-9) - 1
        return low, max(low, high)

    return tuple(LengthBin(*bounds(p), *bounds(o), n) for (p, o), n in sorted(common.items()))


def _reused(requests: Sequence[Request]) -> float:
    """Share of prompt tokens in leading blocks that an earlier request had."""
    seen: set[int] = set()
    reused = total = 0
    for request in requests:
        total += request.prompt_tokens
        leading = 0
        for block in request.blocks:
            if block not in seen:
                break
            leading += 1
        reused += min(request.prompt_tokens, leading * BLOCK_TOKENS)
        seen.update(request.blocks)
    return reused / total if total else 0.0


class WorkloadChange(NamedTuple):
    """A figure of two workloads. ``ratio`` is NaN if it was 0 before."""

    figure: str
    before: float
    after: float

    @property
    def ratio(self) -> float:
        return self.after / self.before if self.before else math.nan


def _median(rtts_ms: Sequence[float]) -> float:
    return rtts_ms[1] if rtts_ms else 0.0


def _first(shares: Sequence[float]) -> float:
    return shares[0] if shares else 0.0


def changes(before: SeenTraffic, after: SeenTraffic, tolerance: float = 0.1) -> list[WorkloadChange]:
    """Figures that decide a plan and differ by more than ``tolerance``."""
    pairs = [
        ("requests/s, mean", before.mean_per_s, after.mean_per_s),
        ("requests/s, busiest hour", before.busiest_per_s, after.busiest_per_s),
        ("burst (10 s, p99 over mean)", before.burst, after.burst),
        ("reused share of prompts", before.reused, after.reused),
        ("round trip, p50", _median(before.rtts_ms), _median(after.rtts_ms)),
        ("accepted first drafts", _first(before.cum_acceptance), _first(after.cum_acceptance)),
    ]
    for what in ("prompt", "output", "context"):
        pairs += [
            (f"{what}, p{int(100 * q)}", before.quantile(what, q), after.quantile(what, q))
            for q in (0.5, 0.9, 0.99)
        ]
    found = [WorkloadChange(*pair) for pair in pairs]
    return [c for c in found if abs(c.after - c.before) > tolerance * max(abs(c.before), 1e-9)]
