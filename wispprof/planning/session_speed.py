"""Runs of accepted drafts, and the speed of a session under a given load: two models of its rounds.

Both describe identical sessions that share one server, each with ``k`` drafts:

*round*: draft k, uplink, wait for the running step, verify, downlink. A step holds the sessions whose rounds
arrived during the last one. The edge pauses meanwhile, so its first draft takes ``resume_ms`` longer.

*stream*: every step advances every session by one token and by the drafts that have arrived. After a
rejection the edge drafts from the new committed length; its j-th draft arrives ``rtt + j·draft`` after
the commit. Until the next rejection the timing is deterministic, so expected tokens and steps follow
from the distribution of accepted runs.

The estimator prices steps at the resulting batch. Step time and batch are iterated to a fixed point.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from wispprof.artifacts.rows import AcceptanceTrace
from wispprof.errors import PlanError
from wispprof.types import StepTimeEstimator

_ITERATIONS = 40
_TOLERANCE = 1e-3
HORIZON = 48
"""Longest run of accepted drafts that is told apart from longer ones."""
_FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Runs:
    """``cumulative[j]`` = P(the first j+1 drafts are all accepted), ``HORIZON`` of them, falling.

    Acceptance comes in streaks, so a mean acceptance with a geometric law would misplan.
    """

    cumulative: tuple[float, ...]

    @classmethod
    def of(cls, cumulative: list[float] | tuple[float, ...] | _FloatArray) -> Runs:
        """From a table of length ≥ 1, such as a trace's; its last ratio continues to the horizon."""
        table = [min(1.0, max(0.0, float(c))) for c in cumulative]
        if not table or any(b > a + 1e-9 for a, b in itertools.pairwise(table)):
            raise PlanError(
                "Cumulative acceptance must be a falling table of at least one value.",
                "Record the trace again.",
            )
        before = table[-2] if len(table) > 1 else 1.0
        ratio = table[-1] / before if before > 0 else 0.0
        while len(table) < HORIZON:
            table.append(table[-1] * ratio)
        return cls(tuple(table[:HORIZON]))

    @classmethod
    def geometric(cls, acceptance: float) -> Runs:
        """Every draft is accepted with the same probability."""
        return cls(tuple(acceptance ** (j + 1) for j in range(HORIZON)))

    @property
    def acceptance(self) -> float:
        """Mean conditional acceptance: accepted drafts over accepted drafts and first rejections."""
        accepted = sum(self.cumulative)
        return accepted / (accepted + 1.0)

    def scaled(self, acceptance: float) -> Runs:
        """The same shape with another mean conditional acceptance (all values raised to one power)."""
        low, high = 1e-3, 1e3
        for _ in range(60):
            power = (low * high) ** 0.5
            if Runs(tuple(c**power for c in self.cumulative)).acceptance > acceptance:
                low = power
            else:
                high = power
        return Runs(tuple(c**high for c in self.cumulative))

    def lengths(self) -> _FloatArray:
        """P(run = 0, 1, …, HORIZON), sums to one."""
        edges: _FloatArray = np.array([1.0, *self.cumulative, 0.0], dtype=np.float64)
        falls: _FloatArray = -np.diff(edges)
        return falls


def runs_of_trace(trace: AcceptanceTrace, quantile: float = 0.05) -> tuple[Runs, Runs]:
    """Runs of the mean session, and of the slow session at ``quantile`` of the paths by mean acceptance.

    A path is one session. The slow session decides SLO attainment, the mean decides throughput. Raises
    :class:`PlanError` on a trace without scored rows.
    """
    scored = [p.accepted[: p.scored_rows()] for p in trace.paths if p.scored_rows() > 0]
    if not scored:
        raise PlanError(
            f"The trace of {trace.draft!r} has no path longer than its own depth.",
            "Record a trace with longer paths.",
        )
    depth = trace.depth
    mean = Runs.of(_table(np.concatenate(scored), depth))
    speeds = sorted(scored, key=lambda a: float(a.mean()))
    # The mean of the lowest 2q paths stands for the q-quantile, because one path is too noisy.
    slow = speeds[: max(1, int(np.ceil(2 * quantile * len(speeds))))]
    return mean, Runs.of(_table(np.concatenate(slow), depth))


def _table(accepted: NDArray[np.int_], depth: int) -> _FloatArray:
    return np.array([(accepted > j).mean() for j in range(depth)], dtype=np.float64)


@dataclass
class LoadedStepTimes:
    """Cached step times of uniform batches over ``cached`` tokens each.

    Fractions are interpolated linearly.
    """

    estimator: StepTimeEstimator
    cached: int
    _cache: dict[tuple[int, int], tuple[float, float]] = field(default_factory=dict, repr=False)

    def uniform(self, items: int, new: int) -> tuple[float, float]:
        """(p50, bound) of ``items`` items of ``new`` tokens."""
        key = (items, new)
        if key not in self._cache:
            batch = self.estimator.start()
            for _ in range(items):
                batch = batch.add(new, self.cached)
            self._cache[key] = (batch.p50_ms, batch.bound_ms)
        return self._cache[key]

    def p50_ms(self, items: float, new: float) -> float:
        """Median of a batch of ``items`` ≥ 1 items with ``new`` ≥ 1 tokens each on average."""
        low_items, low_new = max(1, int(items)), max(1, int(new))
        part_items, part_new = max(0.0, items - low_items), max(0.0, new - low_new)
        time = self.uniform(low_items, low_new)[0]
        if part_items:
            time += part_items * (self.uniform(low_items + 1, low_new)[0] - time)
        if part_new:
            grown = self.uniform(low_items, low_new + 1)[0] - self.uniform(low_items, low_new)[0]
            time += part_new * grown * (items / low_items)
        return time

    def mean_ms(self, items: float, new: float, most: int) -> float:
        """Mean over batches of ``items`` ≥ 1 items on average, where each of ``most`` sessions takes part by
        itself. A staircase costs such a batch more than one of exactly that size."""
        spread = math.sqrt(3.0 * items * max(0.0, 1.0 - items / most))
        if not spread:
            return self.p50_ms(items, new)
        # Gauss-Hermite, three points.
        few, many = max(1.0, items - spread), min(float(most), items + spread)
        outer = self.p50_ms(few, new) + self.p50_ms(many, new)
        return (4.0 * self.p50_ms(items, new) + outer) / 6.0

    def row_ms(self, items: float, new: float) -> float:
        """Time of one token of one item beyond its first, averaged over those of ``new`` tokens: what a step
        saves for each draft that is not sent. A staircase has no useful derivative."""
        new = max(2.0, new)
        return (self.p50_ms(items, new) - self.p50_ms(items, 1.0)) / (items * (new - 1.0))


@dataclass(frozen=True, slots=True)
class SessionSpeed:
    """Mean speed of a session.

    ``commits``: tokens per commit. ``round_ms``: between commits. ``step_ms``: of the server. ``rows``:
    new tokens per item. ``items``: per step. ``drafted``: drafts per committed token.
    """

    tokens_per_ms: float
    commits: float
    round_ms: float
    step_ms: float
    rows: float
    items: float
    drafted: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        return self.tokens_per_ms * 1000.0

    @property
    def server_tokens_per_ms(self) -> float:
        """Tokens committed per ms of the server's step."""
        return self.items * self.commits / self.step_ms if self.step_ms > 0 else 0.0


def undrafted_speed(times: LoadedStepTimes, sessions: int) -> SessionSpeed:
    """k = 0: every step advances every session by one token, without the link."""
    step = times.p50_ms(sessions, 1)
    return SessionSpeed(1.0 / step, 1.0, step, step, 1.0, float(sessions))


def round_speed(
    times: LoadedStepTimes,
    sessions: int,
    k: int,
    draft_ms: float,
    rtt_ms: float,
    runs: Runs,
    resume_ms: float = 0.0,
) -> SessionSpeed:
    """Rounds of ``k`` ≥ 1 drafts, each begun after a pause that adds ``resume_ms``."""
    commits = 1.0 + sum(runs.cumulative[:k])
    away = k * draft_ms + resume_ms + rtt_ms
    items = 1.0
    step = times.mean_ms(items, 1 + k, sessions)
    for _ in range(_ITERATIONS):
        # On average a round waits for half of a running step, if another session runs one.
        busy = min(1.0, (sessions - 1) * step / (away + step)) if sessions > 1 else 0.0
        round_ms = away + step * (1.0 + 0.5 * busy)
        wanted = min(float(sessions), max(1.0, sessions * step / round_ms))
        if abs(wanted - items) <= _TOLERANCE * items:
            break
        items += 0.5 * (wanted - items)
        step = times.mean_ms(items, 1 + k, sessions)
    busy = min(1.0, (sessions - 1) * step / (away + step)) if sessions > 1 else 0.0
    round_ms = away + step * (1.0 + 0.5 * busy)
    return SessionSpeed(commits / round_ms, commits, round_ms, step, 1.0 + k, items, k / commits)


def stream_speed(
    times: LoadedStepTimes, sessions: int, k: int, draft_ms: float, rtt_ms: float, runs: Runs
) -> SessionSpeed:
    """Streams with at most ``k`` ≥ 1 drafts verified in a step."""
    lengths = runs.lengths()
    step = times.p50_ms(sessions, 1)
    commits = rows = 1.0
    drafted = 0.0
    for _ in range(_ITERATIONS):
        commits, rows = renewal(lengths.tolist(), step, k, draft_ms, rtt_ms)
        wanted = times.p50_ms(sessions, rows)
        if abs(wanted - step) <= _TOLERANCE * step:
            break
        step += 0.5 * (wanted - step)
    drafted = max(0.0, min(step / draft_ms, HORIZON) / commits)
    return SessionSpeed(commits / step, commits, step, step, rows, float(sessions), drafted)


def renewal(
    lengths: list[float], step_ms: float, k: int, draft_ms: float, rtt_ms: float
) -> tuple[float, float]:
    """(tokens, rows) per step of a stream, between two rejections.

    ``lengths``: P(run = 0, 1, …), see :meth:`Runs.lengths`.

    The length ``reached`` after each step is the same for all runs, until the step that rejects the
    run's first wrong draft. By then exactly ``run + 1`` tokens are committed.
    """
    tokens = steps = rows = 0.0
    reached = 0
    fed = 0
    count = 0
    run = 0
    last = len(lengths) - 1
    while run <= last:
        arrived = int(max(0.0, count * step_ms - rtt_ms) / draft_ms)
        held = min(k, max(0, arrived - reached))
        count += 1
        fed += 1 + held
        reached += 1 + held
        while run <= last and reached >= run + 1:
            share = lengths[run]
            tokens += share * (run + 1)
            steps += share * count
            rows += share * fed
            run += 1
    return tokens / steps, rows / steps
