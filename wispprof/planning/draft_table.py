"""One cell of the draft-length table: the best k for a device, link, load and promise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from wispprof.artifacts.plan import DraftRow
from wispprof.planning.acceptance_runs import Runs
from wispprof.planning.objective import Figures, choose
from wispprof.planning.session_speed import (
    LoadedStepTimes,
    SessionSpeed,
    round_pace,
    stream_pace,
    undrafted_pace,
)
from wispprof.settings.planner_settings import PlanSettings
from wispprof.types import BatchCost, BatchShape, StepTimeEstimator

__all__ = ["EdgeCosts", "PlannedDevice", "SpeedCurve", "curve", "draft_row"]

_MAX_LEAD = 32


class PlannedDevice(Protocol):
    """What the planner asks of an edge device; the simulator's device profiles answer it."""

    @property
    def name(self) -> str: ...

    @property
    def draft_w(self) -> float: ...

    @property
    def resume_ms(self) -> float:
        """What a rest adds to the round drafted after it."""

    def step_ms(self, context: int) -> float:
        """One draft token over ``context`` tokens, the controller's decision included."""


@dataclass(frozen=True, slots=True)
class EdgeCosts:
    """How alike sessions draft: on which device, over which link, in which mode, and how far what they draft
    is right. ``slow``: runs of the session whose promise is the hardest to keep."""

    device: PlannedDevice
    rtt_ms: float
    mode: str
    mean: Runs
    slow: Runs


@dataclass(frozen=True, slots=True)
class SpeedCurve:
    """Paces for k = 0 … k_max of the mean session, tokens/s of the slow one in the same company, and
    what one more row of one session adds to that step. ``resume_ms``: of a round's drafting, for a rest."""

    mode: str
    draft_ms: float
    rtt_ms: float
    mean: tuple[SessionSpeed, ...]
    slow: tuple[float, ...]
    row_ms: tuple[float, ...]
    resume_ms: float = 0.0


def curve(times: LoadedStepTimes, sessions: int, edge: EdgeCosts, k_max: int) -> SpeedCurve:
    """Every k of one cell. The slow session shares the steps that mean sessions make. What a rest adds is a
    round's alone; a stream drafts on."""
    draft_ms, rtt_ms = edge.device.step_ms(times.cached), edge.rtt_ms
    resume_ms = 0.0 if edge.mode == "stream" else edge.device.resume_ms
    undrafted = undrafted_pace(times, sessions)
    paces, slow_speeds = [undrafted], [undrafted.tokens_per_s]
    for k in range(1, k_max + 1):
        if edge.mode == "round":
            pace = round_pace(times, sessions, k, draft_ms, rtt_ms, edge.mean, resume_ms)
            slow_commits = 1.0 + sum(edge.slow.cumulative[:k])
        else:
            pace = stream_pace(times, sessions, k, draft_ms, rtt_ms, edge.mean)
            fixed = LoadedStepTimes(_Constant(pace.step_ms), 0)
            slow_commits = stream_pace(fixed, 1, k, draft_ms, rtt_ms, edge.slow).commits
        paces.append(pace)
        slow_speeds.append(slow_commits / pace.round_ms * 1000.0)
    rows = tuple(times.row_ms(p.items, p.rows) for p in paces)
    return SpeedCurve(
        edge.mode, draft_ms, rtt_ms, tuple(paces), tuple(slow_speeds), rows, resume_ms
    )


def draft_row(
    cell: SpeedCurve,
    device: PlannedDevice,
    load_level: int,
    tokens_per_s: float,
    settings: PlanSettings,
) -> DraftRow:
    """Choose k: among those that keep the promise the best by the objective, else the k that comes
    nearest to it, if it comes nearer than no drafts by what drafting must gain."""
    figures = [_figures(p, k, cell, device, settings) for k, p in enumerate(cell.mean)]
    keeping = [k for k, speed in enumerate(cell.slow) if speed >= tokens_per_s]
    nearest = max(range(len(figures)), key=lambda k: cell.slow[k])
    if cell.slow[nearest] < cell.slow[0] * settings.min_gain:
        nearest = 0
    best = choose(
        figures,
        keeping or [nearest],
        settings.weights,
        energy_slack=settings.energy_slack,
        lone=0,
        min_gain=settings.min_gain,
    )
    pace = cell.mean[best]
    draft_ahead = 0
    if best:
        # Far enough that the next step finds best drafts although the frontier is known late.
        draft_ahead = min(_MAX_LEAD, best + round((cell.rtt_ms + pace.step_ms) / cell.draft_ms) + 1)
    return DraftRow(
        device=device.name,
        rtt_ms=cell.rtt_ms,
        load_level=load_level,
        tokens_per_s=tokens_per_s,
        mode=cell.mode,
        k=best,
        stop=_stop(cell, best),
        draft_ahead=draft_ahead if cell.mode == "stream" else best,
        expected_tokens_per_s=pace.tokens_per_s,
        slow_tokens_per_s=cell.slow[best],
        round_ms=pace.round_ms,
        step_ms=pace.step_ms,
        commits=pace.commits,
        draft_ms=cell.draft_ms,
        price=pace.price,
        feasible=bool(keeping),
        nearest_tokens_per_s=max(cell.slow),
        energy_j_per_token=figures[best].energy_j_per_token,
        by_k=tuple(f.tokens_per_s for f in figures),
        slow_by_k=tuple(cell.slow),
        dollars_per_mtoken=figures[best].dollars_per_mtoken,
        energy_by_k=tuple(f.energy_j_per_token for f in figures),
        dollars_by_k=tuple(f.dollars_per_mtoken for f in figures),
    )


def _stop(cell: SpeedCurve, k: int) -> float:
    """Cumulative survival below which another draft costs more than it brings.

    A draft is worth its row where survival exceeds what the server commits elsewhere in the time the
    row takes; in round mode the session itself also waits for its drafting, at its own speed.
    """
    if not k:
        return 1.0
    pace = cell.mean[k]
    worth = pace.price * cell.row_ms[k]
    if cell.mode == "round":
        worth += pace.tokens_per_ms * cell.draft_ms
    return min(0.95, max(0.02, worth))


_MS_PER_H, _MTOKEN = 3.6e6, 1e6


def _figures(
    pace: SessionSpeed, k: int, cell: SpeedCurve, device: PlannedDevice, settings: PlanSettings
) -> Figures:
    """What one draft length gives and takes. Energy: of drafting. Dollars: the server's busy time, shared
    by what it commits in it, and the edge's drafting time."""
    drafting_ms = pace.drafted * cell.draft_ms + cell.resume_ms / pace.commits if k else 0.0
    server_ms = 1.0 / pace.price if pace.price > 0 else 0.0
    billed = settings.server_price * server_ms + settings.edge_price(device.name) * drafting_ms
    return Figures(
        pace.tokens_per_s,
        billed / _MS_PER_H * _MTOKEN,
        device.draft_w * drafting_ms / 1000.0,
    )


@dataclass(frozen=True, slots=True)
class _Constant(BatchCost, StepTimeEstimator):
    """An estimator whose step always takes the same time: one session alters nobody's step."""

    p50_ms: float
    coverage: float = 0.5

    @property
    def bound_ms(self) -> float:
        return self.p50_ms

    def start(self) -> _Constant:
        return self

    def add(self, new: int, cached: int, prefill: bool = False) -> _Constant:
        return self

    def predict(self, shape: BatchShape) -> tuple[float, float]:
        return self.p50_ms, self.p50_ms
