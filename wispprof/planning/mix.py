"""Capacity for a mix of SLO classes: how many sessions fit when some were promised more than others.

All classes share every step. A class that needs no drafts to keep its promise makes none, so its sessions
cost one row a step; a faster one drafts just as far as it must. Its rows lengthen everybody's step, and then
others may have to draft too: draft lengths rise from 0, class by class, until every promise holds or one
cannot be kept at any length. What a longer step asks of a class only grows, so the lengths found are the
least that will do, and if there are none, none exist.
"""

from __future__ import annotations

from collections.abc import Sequence

from wispprof.artifacts.plan import MixRow
from wispprof.planning.cells import Edge
from wispprof.planning.settings import Mix, PlanSettings
from wispprof.planning.tables import largest
from wispprof.planning.timing import StepTimes, renewal

__all__ = ["mix_row"]

_ITERATIONS = 40
_TOLERANCE = 1e-3


def mix_row(times: StepTimes, edge: Edge, mix: Mix, settings: PlanSettings) -> MixRow:
    """Most sessions in these shares of which each keeps its promise, undrafted and drafted."""
    classes = [speed for speed, _ in mix]
    total = sum(share for _, share in mix)
    shares = [share / total for _, share in mix]
    most = settings.kv_sessions
    shared = _Shared(times, edge, settings.k_max)

    def undrafted(count: int) -> bool:
        return 1000.0 / times.whole(count, 1)[0] >= max(classes)

    central = max(0, largest(1, most, undrafted))
    count = largest(max(1, central), most, lambda n: shared.lengths(classes, shares, n) is not None)
    count = max(0, count)
    lengths = shared.lengths(classes, shares, count) if count else None
    bound_by = "time"
    if count == most:
        bound_by = "kv" if most < settings.max_sessions else "limit"
    return MixRow(
        edge.device.name,
        edge.rtt_ms,
        edge.mode,
        tuple(classes),
        tuple(shares),
        central,
        count,
        tuple(map(float, lengths or [0] * len(classes))),
        bound_by,
    )


class _Shared:
    """Sessions of several classes over one server."""

    def __init__(self, times: StepTimes, edge: Edge, k_max: int) -> None:
        self._times = times
        self._draft_ms = edge.device.step_ms(times.cached)
        self._resume_ms = edge.device.resume_ms
        self._rtt_ms = edge.rtt_ms
        self._stream = edge.mode == "stream"
        self._slow = edge.slow
        self._mean_lengths = edge.mean.lengths().tolist()
        self._slow_lengths = edge.slow.lengths().tolist()
        self._k_max = k_max

    def lengths(
        self, classes: Sequence[float], shares: Sequence[float], count: int
    ) -> list[int] | None:
        """Draft length of each class with which ``count`` sessions all keep their promise."""
        ks = [0] * len(classes)
        while True:
            step_ms = self._step_ms(ks, shares, count)
            behind = [
                i for i, speed in enumerate(classes) if self._speed(ks[i], step_ms, count) < speed
            ]
            if not behind:
                return ks
            for i in behind:
                ks[i] += 1
                if ks[i] > self._k_max:
                    return None

    def _round_ms(self, k: int, step_ms: float, count: int) -> float:
        """From commit to commit."""
        if self._stream or not k:
            return step_ms
        away = k * self._draft_ms + self._resume_ms + self._rtt_ms
        # Half of a running step is waited for, unless nobody else is there to run one.
        busy = min(1.0, (count - 1) * step_ms / (away + step_ms)) if count > 1 else 0.0
        return away + step_ms * (1.0 + 0.5 * busy)

    def _speed(self, k: int, step_ms: float, count: int) -> float:
        """Tokens/s of the slow session of a class."""
        if not k:
            commits = 1.0
        elif self._stream:
            commits = renewal(self._slow_lengths, step_ms, k, self._draft_ms, self._rtt_ms)[0]
        else:
            commits = 1.0 + sum(self._slow.cumulative[:k])
        return 1000.0 * commits / self._round_ms(k, step_ms, count)

    def _step_ms(self, ks: Sequence[int], shares: Sequence[float], count: int) -> float:
        """The step that these draft lengths make of each other."""
        step_ms = self._times.p50_ms(count, 1)
        for _ in range(_ITERATIONS):
            items = rows = 0.0
            for k, share in zip(ks, shares, strict=True):
                inside = min(1.0, step_ms / self._round_ms(k, step_ms, count)) * share * count
                fed = 1.0 + k
                if self._stream and k:
                    fed = renewal(self._mean_lengths, step_ms, k, self._draft_ms, self._rtt_ms)[1]
                items += inside
                rows += inside * fed
            wanted = self._times.p50_ms(max(1.0, items), rows / items)
            if abs(wanted - step_ms) <= _TOLERANCE * step_ms:
                break
            step_ms += 0.5 * (wanted - step_ms)
        return step_ms
