"""Batching policies that take whatever is ready in order of arrival: the simple rivals.

``fcfs`` and ``sled_static`` (SLED, arXiv 2506.09397), ``specedge_pipeline`` (SpecEdge, arXiv
2505.17052) and ``server-only`` (no drafts, continuous batching).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain, filterfalse, islice

from wispprof.policies.api import Limits, SessionView, StepPlan, column
from wispprof.policies.batch_builder import StepBuilder, eligible, no_batch
from wispprof.types import StepTimeEstimator

__all__ = ["Fcfs", "ServerOnly", "SledStatic", "SpecEdgePipeline"]

_ARRIVED, _SESSION = column("arrived_ms"), column("session")
_RETRY_MS = 1.0  # nothing fitted (no KV left): ask again soon, somebody may finish meanwhile


def _fill(
    now_ms: float,
    queue: Iterable[SessionView],
    estimator: StepTimeEstimator,
    limits: Limits,
    max_batch: int | None,
    reason: str,
) -> StepPlan:
    build, session = StepBuilder(estimator, limits), None
    for session in queue:
        if build.full or (max_batch is not None and len(build.members) >= max_batch):
            break
        build.add(session)
    if not build.members:
        waits = session is not None
        return no_batch(
            now_ms, now_ms + _RETRY_MS if waits else None, "no room" if waits else "no_batch"
        )
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
        estimator: StepTimeEstimator,
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
        estimator: StepTimeEstimator,
        limits: Limits,
    ) -> StepPlan:
        queue = sorted(eligible(sessions), key=_ARRIVED)
        if not queue:
            return no_batch(now_ms, None, "no_batch")
        target = min(self.batch, limits.max_items)
        expires_ms = queue[0].arrived_ms + self.timeout_ms
        if len(queue) < target and now_ms < expires_ms:
            return no_batch(now_ms, expires_ms, f"waiting for {target - len(queue)} more")
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
        estimator: StepTimeEstimator,
        limits: Limits,
    ) -> StepPlan:
        self._assign(sessions)
        queue = sorted(eligible(sessions), key=_ARRIVED)
        if not queue:
            return no_batch(now_ms, None, "no_batch")
        group_of = self._group_of
        for offset in range(self.groups):
            turn = (self._turn + offset) % self.groups
            # Not listed: a step is full long before a long queue ends.
            mine = (s for s in queue if group_of[s.session] == turn)
            first = next(mine, None)
            if first is not None:
                self._turn = (turn + 1) % self.groups
                return _fill(
                    now_ms, chain((first,), mine), estimator, limits, None, f"group {turn}"
                )
        raise AssertionError("every session has a group")

    def _assign(self, sessions: list[SessionView]) -> None:
        """New sessions join the smallest group; those that ended are forgotten."""
        names = list(map(_SESSION, sessions))
        if len(self._group_of) > len(names):
            alive = set(names)
            self._group_of = {k: g for k, g in self._group_of.items() if k in alive}
        newcomers = list(filterfalse(self._group_of.__contains__, names))
        if not newcomers:
            return
        sizes = [0] * self.groups
        for group in self._group_of.values():
            sizes[group] += 1
        for name in newcomers:
            group = sizes.index(min(sizes))
            self._group_of[name] = group
            sizes[group] += 1


@dataclass
class ServerOnly:
    """No drafts at all: every decoding session advances by one token each step, prompts in chunks.

    This is continuous batching with chunked prefill, decodes first, on the same engine and kernels.
    """

    name: str = field(default="server-only", init=False)
    stream: bool = field(default=True, init=False)

    def plan(
        self,
        now_ms: float,
        sessions: list[SessionView],
        estimator: StepTimeEstimator,
        limits: Limits,
    ) -> StepPlan:
        queue = sorted(eligible(sessions), key=_ARRIVED)
        build = StepBuilder(estimator, limits)
        free_slots = max(0, min(build.free_slots, build.room()))
        decode = list(islice((s for s in queue if not s.prompt_left), free_slots))
        build.add_decodes(decode, [0] * len(decode))
        for session in queue:
            if build.full or not build.prefill_left:
                break
            if session.prompt_left:
                build.add_prefill(session)
        if not build.members:
            wake_ms = now_ms + _RETRY_MS if queue else None
            return no_batch(now_ms, wake_ms, "no room" if queue else "no_batch")
        return build.plan("all advance")
