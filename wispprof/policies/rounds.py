"""Batching policies that take whatever is ready in order of arrival: the simple rivals.

``fcfs`` and ``sled_static`` (SLED, arXiv 2506.09397), ``specedge_pipeline`` (SpecEdge, arXiv
2505.17052) and ``centralized`` (no drafts, continuous batching).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import attrgetter

from wispprof.core import StepEstimator
from wispprof.policies.api import Limits, SessionView, StepPlan
from wispprof.policies.build import StepBuilder, eligible, idle

__all__ = ["Centralized", "Fcfs", "SledStatic", "SpecEdgePipeline"]

_ARRIVED = attrgetter("arrived_ms")
_RETRY_MS = 1.0  # nothing fitted (no KV left): ask again soon, somebody may finish meanwhile


def _fill(
    now_ms: float,
    queue: list[SessionView],
    estimator: StepEstimator,
    limits: Limits,
    max_batch: int | None,
    reason: str,
) -> StepPlan:
    build = StepBuilder(estimator, limits)
    for session in queue:
        if build.full or (max_batch is not None and len(build.members) >= max_batch):
            break
        build.add(session)
    if not build.members:
        return idle(now_ms, now_ms + _RETRY_MS if queue else None, "no room" if queue else "idle")
    return build.plan(reason)


@dataclass
class Fcfs:
    """First come, first served, at most ``max_batch`` items a step (``None``: the limits decide)."""

    max_batch: int | None = None
    name: str = field(default="fcfs", init=False)
    stream: bool = field(default=False, init=False)

    def plan(
        self,
        now_ms: float,
        sessions: list[SessionView],
        estimator: StepEstimator,
        limits: Limits,
    ) -> StepPlan:
        queue = sorted(eligible(sessions), key=_ARRIVED)
        return _fill(now_ms, queue, estimator, limits, self.max_batch, "fcfs")


@dataclass
class SledStatic:
    """Static batches: start when ``batch`` items wait, or the oldest has waited ``timeout_ms``.

    The time-out is not in the paper's text; without one a fleet smaller than the batch never starts.
    """

    batch: int = 8
    timeout_ms: float = 50.0
    name: str = field(default="sled_static", init=False)
    stream: bool = field(default=False, init=False)

    def plan(
        self,
        now_ms: float,
        sessions: list[SessionView],
        estimator: StepEstimator,
        limits: Limits,
    ) -> StepPlan:
        queue = sorted(eligible(sessions), key=_ARRIVED)
        if not queue:
            return idle(now_ms, None, "idle")
        target = min(self.batch, limits.max_items)
        expires_ms = queue[0].arrived_ms + self.timeout_ms
        if len(queue) < target and now_ms < expires_ms:
            return idle(now_ms, expires_ms, f"waiting for {target - len(queue)} more")
        return _fill(now_ms, queue, estimator, limits, target, "static batch")


@dataclass
class SpecEdgePipeline:
    """Groups of sessions alternate: the server verifies one while the others draft.

    A group whose turn comes with nothing ready is passed over, so a silent group stalls nobody.
    """

    groups: int = 2
    name: str = field(default="specedge_pipeline", init=False)
    stream: bool = field(default=False, init=False)
    _group_of: dict[str, int] = field(default_factory=dict, init=False, repr=False)
    _turn: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise ValueError(f"groups must be at least 1, got {self.groups}")

    def plan(
        self,
        now_ms: float,
        sessions: list[SessionView],
        estimator: StepEstimator,
        limits: Limits,
    ) -> StepPlan:
        self._assign(sessions)
        queue = sorted(eligible(sessions), key=_ARRIVED)
        if not queue:
            return idle(now_ms, None, "idle")
        for offset in range(self.groups):
            turn = (self._turn + offset) % self.groups
            mine = [s for s in queue if self._group_of[s.session] == turn]
            if mine:
                self._turn = (turn + 1) % self.groups
                return _fill(now_ms, mine, estimator, limits, None, f"group {turn}")
        raise AssertionError("every session has a group")

    def _assign(self, sessions: list[SessionView]) -> None:
        """New sessions join the smallest group; those that ended are forgotten."""
        alive = {s.session for s in sessions}
        if len(self._group_of) > len(alive):
            self._group_of = {k: g for k, g in self._group_of.items() if k in alive}
        sizes = [0] * self.groups
        for group in self._group_of.values():
            sizes[group] += 1
        for session in sessions:
            if session.session not in self._group_of:
                group = sizes.index(min(sizes))
                self._group_of[session.session] = group
                sizes[group] += 1


@dataclass
class Centralized:
    """No drafts at all: every decoding session advances by one token each step, prompts in chunks.

    This is continuous batching with chunked prefill, decodes first, on the same engine and kernels.
    """

    name: str = field(default="centralized", init=False)
    stream: bool = field(default=True, init=False)

    def plan(
        self,
        now_ms: float,
        sessions: list[SessionView],
        estimator: StepEstimator,
        limits: Limits,
    ) -> StepPlan:
        queue = sorted(eligible(sessions), key=_ARRIVED)
        build = StepBuilder(estimator, limits)
        for session in queue:
            if build.full:
                break
            if not session.prompt_left:
                build.add_decode(session, 0)
        for session in queue:
            if build.full or not build.prefill_left:
                break
            if session.prompt_left:
                build.add_prefill(session)
        if not build.members:
            wake_ms = now_ms + _RETRY_MS if queue else None
            return idle(now_ms, wake_ms, "no room" if queue else "idle")
        return build.plan("all advance")
