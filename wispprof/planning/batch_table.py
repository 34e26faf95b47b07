"""Batching table, capacity and break-even of a plan, and the sessions that each load level stands for.

In a mix of SLO classes all sessions share every step. Draft lengths start at 0 and rise, class by class,
until every class meets its SLO or one cannot at any length. More rows lengthen everybody's step, which
only asks for more drafts, so the lengths found are the least that suffice; if none are found, none exist.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from wispprof.artifacts.plan import BatchRow, BreakEvenRow, CapacityRow, MixRow
from wispprof.planning.draft_table import EdgeCosts, SpeedCurve, speed_curve
from wispprof.planning.session_speed import LoadedStepTimes, Runs, renewal
from wispprof.policies.cost_model import LOAD_LEVELS, load_level, representative_slowdown
from wispprof.settings.planner_settings import Mix, PlanSettings

_LEAST_CHUNK = 16


def largest(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """The largest value in ``low … high`` for which ``holds``, or ``low - 1``.

    It must hold up to some value and not beyond.
    """
    if not holds(low):
        return low - 1
    while low < high:
        middle = (low + high + 1) // 2
        if holds(middle):
            low = middle
        else:
            high = middle - 1
    return low


def sessions_of_levels(times: LoadedStepTimes, most: int) -> dict[int, int]:
    """Level → sessions it stands for: the fewest that reach its representative slowdown.

    Levels that ``most`` sessions do not reach are left out. The highest one reached stands for ``most``.
    """
    alone = times.uniform(1, 1)[0]

    def slowdown(count: int) -> float:
        return times.uniform(count, 1)[0] / alone if alone > 0 else 1.0

    levels = {0: 1}
    for level in range(1, LOAD_LEVELS):
        target = representative_slowdown(level)
        count = 1 + largest(1, most, lambda n, target=target: slowdown(n) < target)  # type: ignore[misc]
        if count > most:
            if load_level(slowdown(most)) == level:
                levels[level] = most
            break
        levels[level] = count
    return levels


def batch_row(
    times: LoadedStepTimes, level: int, sessions: int, tokens_per_s: float, mean: Runs, settings: PlanSettings
) -> BatchRow:
    """Limits of a step, by its bound, for an SLO that counts over a whole generation.

    A step that commits several tokens of a session may take as many times the class's TPOT. The row uses the
    number of new tokens (pending token and drafts) that commits most per ms among those within that time, or
    among all if none is. The limits never leave out a session that the level stands for.
    """
    tpot_ms = 1000.0 / tokens_per_s

    def commits(new: int) -> float:
        return 1.0 + sum(mean.cumulative[: new - 1])

    def meets_slo(count: int, new: int) -> bool:
        return times.uniform(count, new)[1] <= tpot_ms * commits(new)

    most = max(1, min(settings.k_max + 1, settings.max_step_tokens // sessions))
    feeds = range(1, most + 1)
    meeting = [new for new in feeds if meets_slo(sessions, new)]
    new = max(meeting or feeds, key=lambda n: commits(n) / times.uniform(sessions, n)[0])
    capacity = max(sessions, min(settings.kv_sessions, settings.max_step_tokens // new))
    items = max(sessions, largest(sessions, capacity, lambda n: meets_slo(n, new)))
    allowed_ms = max(tpot_ms * commits(new), times.uniform(sessions, new)[1])
    step = times.estimator.start()
    for _ in range(sessions):
        step = step.add(new, times.cached)

    def fits(chunk: int) -> bool:
        return step.add(chunk, times.cached, True).bound_ms <= allowed_ms

    chunk = max(_LEAST_CHUNK, largest(1, settings.max_prefill_chunk, fits))
    chunk = min(chunk, settings.max_prefill_chunk)
    filled = step.add(chunk, times.cached, True)
    return BatchRow(
        tokens_per_s=tokens_per_s,
        load_level=level,
        sessions=sessions,
        token_budget=items * new + chunk,
        max_items=items,
        prefill_chunk=chunk,
        p50_ms=filled.p50_ms,
        bound_ms=filled.bound_ms,
        context=times.cached,
    )


def capacity_row(
    times: LoadedStepTimes, edge: EdgeCosts, tokens_per_s: float, settings: PlanSettings
) -> CapacityRow:
    """Most sessions that meet their SLO, undrafted and with the best k."""
    most = settings.kv_sessions

    def undrafted(count: int) -> bool:
        return 1000.0 / times.uniform(count, 1)[0] >= tokens_per_s

    def cell(count: int) -> SpeedCurve:
        return speed_curve(times, count, edge, settings.k_max)

    def split(count: int) -> bool:
        return max(cell(count).slow) >= tokens_per_s

    central = largest(1, most, undrafted)
    # k = 0 is a choice of split serving too, so its capacity is never smaller.
    count = largest(max(1, central), most, split)
    k = 0
    if count >= 1:
        speeds = cell(count).slow
        k = max(range(len(speeds)), key=lambda i: (speeds[i], -i))
    return CapacityRow(
        edge.device.name,
        edge.rtt_ms,
        tokens_per_s,
        edge.mode,
        max(0, central),
        max(0, count),
        k,
        _bound_by(count, settings),
        times.cached,
    )


def break_even_row(
    times: LoadedStepTimes, edge: EdgeCosts, level: int, sessions: int, settings: PlanSettings
) -> BreakEvenRow:
    """The mean acceptance from which drafting pays."""
    mean = edge.mean

    def gain(runs: Runs) -> float:
        cell = speed_curve(times, sessions, replace(edge, mean=runs, slow=runs), settings.k_max)
        return max(p.tokens_per_s for p in cell.mean[1:]) / cell.mean[0].tokens_per_s

    now = gain(mean)
    needed: float | None = None
    percent = largest(0, 99, lambda p: p == 0 or gain(mean.scaled(p / 100)) < settings.min_gain)
    if percent < 99:
        needed = (percent + 1) / 100
    verdict = "split" if now >= settings.min_gain else "server-only"
    return BreakEvenRow(
        edge.device.name, edge.rtt_ms, level, edge.mode, mean.acceptance, needed, now, verdict, times.cached
    )


def _bound_by(count: int, settings: PlanSettings) -> str:
    """What limits a capacity of ``count`` sessions: step time, KV cache, or the planned maximum."""
    if count < settings.kv_sessions:
        return "time"
    return "kv" if settings.kv_sessions < settings.max_sessions else "limit"


_ITERATIONS = 40
_TOLERANCE = 1e-3


def mix_row(times: LoadedStepTimes, edge: EdgeCosts, mix: Mix, settings: PlanSettings) -> MixRow:
    """Most sessions in these shares that all meet their SLO, undrafted and drafted."""
    classes = [speed for speed, _ in mix]
    total = sum(share for _, share in mix)
    shares = [share / total for _, share in mix]
    most = settings.kv_sessions
    fleet = _MixedClasses(times, edge, settings.k_max)

    def undrafted(count: int) -> bool:
        return 1000.0 / times.uniform(count, 1)[0] >= max(classes)

    central = max(0, largest(1, most, undrafted))
    count = largest(max(1, central), most, lambda n: fleet.lengths(classes, shares, n) is not None)
    count = max(0, count)
    lengths = fleet.lengths(classes, shares, count) if count else None
    return MixRow(
        edge.device.name,
        edge.rtt_ms,
        edge.mode,
        tuple(classes),
        tuple(shares),
        central,
        count,
        tuple(map(float, lengths or [0] * len(classes))),
        _bound_by(count, settings),
        times.cached,
    )


class _MixedClasses:
    """Sessions of several SLO classes on one server."""

    def __init__(self, times: LoadedStepTimes, edge: EdgeCosts, k_max: int) -> None:
        self._times = times
        self._draft_ms = edge.device.step_ms(times.cached)
        self._resume_ms = edge.device.resume_ms
        self._rtt_ms = edge.rtt_ms
        self._stream = edge.mode == "stream"
        self._slow, self._gain = edge.slow, edge.gain
        self._mean_lengths = edge.mean.lengths().tolist()
        self._slow_lengths = edge.slow.lengths().tolist()
        self._k_max = k_max

    def lengths(self, classes: Sequence[float], shares: Sequence[float], count: int) -> list[int] | None:
        """Least draft length of each class with which ``count`` sessions all meet their SLO."""
        ks = [0] * len(classes)
        while True:
            step_ms = self._step_ms(ks, shares, count)
            missing = [i for i, speed in enumerate(classes) if self._speed(ks[i], step_ms, count) < speed]
            if not missing:
                return ks
            for i in missing:
                ks[i] += 1
                if ks[i] > self._k_max:
                    return None

    def _round_ms(self, k: int, step_ms: float, count: int) -> float:
        """Time between commits."""
        if self._stream or not k:
            return step_ms
        away = k * self._draft_ms + self._resume_ms + self._rtt_ms
        # On average a round waits for half of a running step, if another session runs one.
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
        return 1000.0 * commits / self._round_ms(k, step_ms, count) * self._gain(k).speed

    def _step_ms(self, ks: Sequence[int], shares: Sequence[float], count: int) -> float:
        """Step time at these draft lengths: fixed point of step time and batch."""
        step_ms = self._times.p50_ms(count, 1)
        for _ in range(_ITERATIONS):
            items = rows = 0.0
            for k, share in zip(ks, shares, strict=True):
                scheduled = min(1.0, step_ms / self._round_ms(k, step_ms, count)) * share * count
                fed = 1.0 + k
                if self._stream and k:
                    fed = renewal(self._mean_lengths, step_ms, k, self._draft_ms, self._rtt_ms)[1]
                items += scheduled
                rows += scheduled * fed
            target = self._times.p50_ms(max(1.0, items), rows / items)
            if abs(target - step_ms) <= _TOLERANCE * step_ms:
                break
            step_ms += 0.5 * (target - step_ms)
        return step_ms
