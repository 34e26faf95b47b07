"""Baseline batching policies, which take ready sessions in order of arrival.

``fcfs``, ``sled`` (SLED, arXiv 2506.09397), ``specedge`` (SpecEdge, arXiv 2505.17052) and ``server-only``
(no drafts, continuous batching).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain, filterfalse, islice

from wispprof.policies.batch_builder import RETRY_MS, BatchBuilder, no_batch, ready_sessions
from wispprof.policies.interface import Limits, SessionView, StepPlan, column
from wispprof.types import StepTimeEstimator

_ARRIVED, _SESSION = column("arrived_ms"), column("session")


def _arrivals(sessions: list[SessionView]) -> list[SessionView]:
    """The ready sessions in order of arrival."""
    return sorted(ready_sessions(sessions), key=_ARRIVED)


def _fill(
    now_ms: float,
    queue: Iterable[SessionView],
    estimator: StepTimeEstimator,
    limits: Limits,
    max_batch: int | None,
    reason: str,
) -> StepPlan:
    """Add sessions of the queue, each with all it has, until the batch is full."""
    batch, session = BatchBuilder(estimator, limits), None
    for session in queue:
        if batch.full or (max_batch is not None and len(batch.items) >= max_batch):
            break
        batch.add(session)
    return _planned(now_ms, batch, reason, waiting=session is not None)


def _planned(now_ms: float, batch: BatchBuilder, reason: str, *, waiting: bool) -> StepPlan:
    """The plan of a batch; if it is empty, a retry while sessions wait."""
    if batch.items:
        return batch.plan(reason)
    if waiting:
        return no_batch(now_ms, now_ms + RETRY_MS, "no capacity")
    return no_batch(now_ms, None, "nothing ready")


@dataclass
class FcfsPolicy:
    """First come, first served, at most ``max_batch`` items a step (``None``: the limits decide)."""

    max_batch: int | None = None
    name: str = field(default="fcfs", init=False)
    stream: bool = field(default=False, init=False)

    def plan(
        self, now_ms: float, sessions: list[SessionView], estimator: StepTimeEstimator, limits: Limits
    ) -> StepPlan:
        return _fill(now_ms, _arrivals(sessions), estimator, limits, self.max_batch, "fcfs")


@dataclass
class SledPolicy:
    """Static batches: start when ``batch`` items wait, or the oldest has waited ``timeout_ms``.

    The time-out is not in the paper. Without one, a fleet smaller than the batch never starts.
    """

    batch: int = 8
    timeout_ms: float = 50.0
    name: str = field(default="sled", init=False)
    stream: bool = field(default=False, init=False)

    def plan(
        self, now_ms: float, sessions: list[SessionView], estimator: StepTimeEstimator, limits: Limits
    ) -> StepPlan:
        queue = _arrivals(sessions)
        if not queue:
            return no_batch(now_ms, None, "nothing ready")
        target = min(self.batch, limits.max_items)
        expires_ms = queue[0].arrived_ms + self.timeout_ms
        if len(queue) < target and now_ms < expires_ms:
            return no_batch(now_ms, expires_ms, f"waiting for {target - len(queue)} more")
        return _fill(now_ms, queue, estimator, limits, target, "static batch")


@dataclass
class SpecEdgePolicy:
    """Groups of sessions alternate: the server verifies one group while the others draft.

    A group with nothing ready is skipped, so it delays no other group.
    """

    groups: int = 2
    name: str = field(default="specedge", init=False)
    stream: bool = field(default=False, init=False)
    _group_of: dict[str, int] = field(default_factory=dict, init=False, repr=False)
    _next_group: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise ValueError(f"groups must be at least 1, got {self.groups}")

    def plan(
        self, now_ms: float, sessions: list[SessionView], estimator: StepTimeEstimator, limits: Limits
    ) -> StepPlan:
        self._assign(sessions)
        queue = _arrivals(sessions)
        if not queue:
            return no_batch(now_ms, None, "nothing ready")
        group_of = self._group_of
        for offset in range(self.groups):
            group = (self._next_group + offset) % self.groups
            # Lazy: a step is full long before a long queue ends.
            ready = (s for s in queue if group_of[s.session] == group)
            first = next(ready, None)
            if first is not None:
                self._next_group = (group + 1) % self.groups
                queued = chain((first,), ready)
                return _fill(now_ms, queued, estimator, limits, None, f"group {group}")
        raise AssertionError("every session has a group")

    def _assign(self, sessions: list[SessionView]) -> None:
        """Add new sessions to the smallest group; remove those that ended."""
        names = list(map(_SESSION, sessions))
        if len(self._group_of) > len(names):
            open_sessions = set(names)
            self._group_of = {k: g for k, g in self._group_of.items() if k in open_sessions}
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
class ServerOnlyPolicy:
    """No drafts: every decoding session advances by one token a step, prompts are read in chunks.

    This is continuous batching with chunked prefill, decodes first.
    """

    name: str = field(default="server-only", init=False)
    stream: bool = field(default=True, init=False)

    def plan(
        self, now_ms: float, sessions: list[SessionView], estimator: StepTimeEstimator, limits: Limits
    ) -> StepPlan:
        queue = _arrivals(sessions)
        batch = BatchBuilder(estimator, limits)
        free_slots = max(0, min(batch.free_slots, batch.free_tokens))
        decode = list(islice((s for s in queue if not s.prompt_left), free_slots))
        batch.add_decodes(decode, [0] * len(decode))
        for session in queue:
            if batch.full or not batch.prefill_left:
                break
            if session.prompt_left:
                batch.add_prefill(session)
        return _planned(now_ms, batch, "all advance", waiting=bool(queue))
