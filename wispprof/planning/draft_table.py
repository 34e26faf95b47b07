"""One cell of the draft-length table: the best k for a device, link, load and SLO."""

from __future__ import annotations

from dataclasses import dataclass

from wispprof.artifacts.plan import DraftRow
from wispprof.planning.objective import Figures, choose
from wispprof.planning.replayed_gains import Gain
from wispprof.planning.session_speed import (
    LoadedStepTimes,
    Runs,
    SessionSpeed,
    renewal,
    round_speed,
    stream_speed,
    undrafted_speed,
)
from wispprof.settings.planner_settings import PlanSettings
from wispprof.simulation.devices import DeviceProfile

_MAX_DRAFT_AHEAD = 32


@dataclass(frozen=True, slots=True)
class EdgeCosts:
    """Device, link, mode and acceptance of identical sessions. ``slow``: runs of the slow session, which
    decides SLO attainment. ``gains``: by k, what the formulas leave out; empty without a trace."""

    device: DeviceProfile
    rtt_ms: float
    mode: str
    mean: Runs
    slow: Runs
    gains: tuple[Gain, ...] = ()

    def gain(self, k: int) -> Gain:
        """That of ``k`` drafts."""
        return self.gains[k] if self.gains else Gain()


@dataclass(frozen=True, slots=True)
class SpeedCurve:
    """For k = 0 … k_max: speed of the mean session, tokens/s of the slow one in the same steps, and the
    step time of one more row of one session. ``resume_ms``: extra drafting time of a round after a pause."""

    mode: str
    draft_ms: float
    rtt_ms: float
    mean: tuple[SessionSpeed, ...]
    slow: tuple[float, ...]
    row_ms: tuple[float, ...]
    resume_ms: float = 0.0


def speed_curve(times: LoadedStepTimes, sessions: int, edge: EdgeCosts, k_max: int) -> SpeedCurve:
    """Speeds for every k of one cell. The slow session shares the steps of mean sessions. Only rounds
    pause."""
    draft_ms, rtt_ms = edge.device.step_ms(times.cached), edge.rtt_ms
    resume_ms = 0.0 if edge.mode == "stream" else edge.device.resume_ms
    undrafted = edge.gain(0).of(undrafted_speed(times, sessions))
    slow_lengths = edge.slow.lengths().tolist()
    speeds, slow_speeds = [undrafted], [undrafted.tokens_per_s]
    for k in range(1, k_max + 1):
        if edge.mode == "round":
            speed = round_speed(times, sessions, k, draft_ms, rtt_ms, edge.mean, resume_ms)
            slow_commits = 1.0 + sum(edge.slow.cumulative[:k])
        else:
            speed = stream_speed(times, sessions, k, draft_ms, rtt_ms, edge.mean)
            slow_commits = renewal(slow_lengths, speed.step_ms, k, draft_ms, rtt_ms)[0]
        speed = edge.gain(k).of(speed)
        speeds.append(speed)
        slow_speeds.append(slow_commits / speed.round_ms * 1000.0)
    rows = tuple(times.row_ms(p.items, p.rows) for p in speeds)
    return SpeedCurve(edge.mode, draft_ms, rtt_ms, tuple(speeds), tuple(slow_speeds), rows, resume_ms)


def draft_row(
    cell: SpeedCurve, device: DeviceProfile, load_level: int, tokens_per_s: float, settings: PlanSettings
) -> DraftRow:
    """Choose k: the best by the objective among those that meet the SLO.

    If none does, the k that comes nearest, or 0 if that gains less than ``settings.min_gain``.
    """
    figures = [_figures(p, k, cell, device, settings) for k, p in enumerate(cell.mean)]
    feasible = [k for k, speed in enumerate(cell.slow) if speed >= tokens_per_s]
    nearest = max(range(len(figures)), key=lambda k: cell.slow[k])
    if cell.slow[nearest] < cell.slow[0] * settings.min_gain:
        nearest = 0
    best = choose(
        figures,
        feasible or [nearest],
        settings.weights,
        energy_slack=settings.energy_slack,
        undrafted=0,
        min_gain=settings.min_gain,
    )
    speed = cell.mean[best]
    draft_ahead = 0
    if best:
        # Far enough that the next step finds k drafts, although the committed length arrives late.
        draft_ahead = min(_MAX_DRAFT_AHEAD, best + round((cell.rtt_ms + speed.step_ms) / cell.draft_ms) + 1)
    return DraftRow(
        device=device.name,
        rtt_ms=cell.rtt_ms,
        load_level=load_level,
        tokens_per_s=tokens_per_s,
        mode=cell.mode,
        k=best,
        stop=_stop(cell, best),
        draft_ahead=draft_ahead if cell.mode == "stream" else best,
        expected_tokens_per_s=speed.tokens_per_s,
        slow_tokens_per_s=cell.slow[best],
        round_ms=speed.round_ms,
        step_ms=speed.step_ms,
        commits=speed.commits,
        draft_ms=cell.draft_ms,
        server_tokens_per_ms=speed.server_tokens_per_ms,
        feasible=bool(feasible),
        nearest_tokens_per_s=max(cell.slow),
        energy_j_per_token=figures[best].energy_j_per_token,
        by_k=tuple(f.tokens_per_s for f in figures),
        slow_by_k=tuple(cell.slow),
        dollars_per_mtoken=figures[best].dollars_per_mtoken,
        energy_by_k=tuple(f.energy_j_per_token for f in figures),
        dollars_by_k=tuple(f.dollars_per_mtoken for f in figures),
        context=settings.context,
    )


def _stop(cell: SpeedCurve, k: int) -> float:
    """Cumulative acceptance probability below which another draft costs more than it gains.

    A draft pays if it exceeds what the server commits elsewhere in the time of its row. In round mode the
    session also waits for its drafting, at its own speed.
    """
    if not k:
        return 1.0
    speed = cell.mean[k]
    threshold = speed.server_tokens_per_ms * cell.row_ms[k]
    if cell.mode == "round":
        threshold += speed.tokens_per_ms * cell.draft_ms
    return min(0.95, max(0.02, threshold))


_MS_PER_H, _MTOKEN = 3.6e6, 1e6


def _figures(
    speed: SessionSpeed, k: int, cell: SpeedCurve, device: DeviceProfile, settings: PlanSettings
) -> Figures:
    """Figures of one draft length. Energy is that of drafting. Dollars are the server's busy time per
    committed token and the edge's drafting time."""
    drafting_ms = speed.drafted * cell.draft_ms + cell.resume_ms / speed.commits if k else 0.0
    server_ms = 1.0 / speed.server_tokens_per_ms if speed.server_tokens_per_ms > 0 else 0.0
    billed = settings.server_price * server_ms + settings.edge_price(device.name) * drafting_ms
    return Figures(speed.tokens_per_s, billed / _MS_PER_H * _MTOKEN, device.draft_w * drafting_ms / 1000.0)
