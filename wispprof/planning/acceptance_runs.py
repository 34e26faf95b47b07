"""Distribution of accepted runs: how many drafts are accepted before the first rejection.

A trace records a run up to its own depth K; beyond it, the last conditional acceptance continues.
Acceptance comes in streaks, so a mean acceptance with a geometric law would misplan.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wispprof.artifacts.rows import AcceptanceTrace
from wispprof.errors import PlanError

HORIZON = 48
_FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Runs:
    """``cumulative[j]`` = P(the first j+1 drafts are all accepted), ``HORIZON`` of them, falling."""

    cumulative: tuple[float, ...]

    @classmethod
    def of(cls, cumulative: list[float] | tuple[float, ...] | _FloatArray) -> Runs:
        """From a table of length ≥ 1; its last ratio continues to the horizon."""
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
