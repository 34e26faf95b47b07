"""A step under construction, checked against the limits and priced by the estimator."""

from __future__ import annotations

import math

import numpy as np

from wispprof.policies.interface import Limits, ScheduledItem, SessionView, StepPlan
from wispprof.types import BatchCost, StepTimeEstimator

RETRY_MS = 1.0
"""Delay after a step in which nothing fitted: another session may finish and free KV meanwhile."""


def ready_sessions(sessions: list[SessionView]) -> list[SessionView]:
    """The sessions that may be scheduled now."""
    return [s for s in sessions if s.ready]


def evenly_spaced(first: int, last: int, count: int) -> set[int]:
    """At most ``count`` evenly spaced integers from ``first`` to ``last``, both included."""
    step = (last - first) / (count - 1)
    return {int(first + idx * step) for idx in range(count - 1)} | {last}


def no_batch(now_ms: float, wake_ms: float | None, reason: str) -> StepPlan:
    """A plan without items. ``wake_ms`` is never in the past, or the caller would spin."""
    if wake_ms is not None:
        wake_ms = max(wake_ms, now_ms + 0.1) if math.isfinite(wake_ms) else None
    return StepPlan(wake_ms=wake_ms, reason=reason)


class BatchBuilder:
    """Adds items one by one and refuses what would exceed a limit or the time budget.

    ``budget_ms`` limits the step's *bound*, not its median. All prompt chunks of a step share
    ``limits.prefill_chunk``.
    """

    def __init__(self, estimator: StepTimeEstimator, limits: Limits) -> None:
        self.estimator = estimator
        self.cost: BatchCost = estimator.start()
        self.limits = limits
        self.items: list[ScheduledItem] = []
        self.prefill_left = limits.prefill_chunk
        self._tokens_left = limits.max_tokens
        self._kv_left = limits.kv_free
        self._scheduled: set[str] = set()

    @property
    def free_slots(self) -> int:
        """How many more items fit."""
        return self.limits.max_items - len(self.items)

    @property
    def free_tokens(self) -> int:
        """Most new tokens of one more item."""
        if len(self.items) >= self.limits.max_items:
            return 0
        return min(self._tokens_left, self._kv_left)

    @property
    def full(self) -> bool:
        """No further item of any kind fits."""
        return self.free_tokens <= 0

    def add_decode(self, session: SessionView, drafts: int, budget_ms: float = math.inf) -> bool:
        """Add a decoding session with its first ``drafts`` pending drafts.

        If the token limits are short, it is cut to fewer drafts (lossless). The time budget never cuts it:
        draft lengths are the policy's decision.
        """
        free_tokens = self.free_tokens
        if free_tokens < 1 or session.session in self._scheduled:
            return False
        drafts = min(drafts, free_tokens - 1)
        cost = self.cost.add(drafts + 1, session.cached)
        if budget_ms < math.inf and cost.bound_ms > budget_ms:
            return False
        self._take(cost, ScheduledItem(session.session, drafts=drafts), drafts + 1)
        return True

    def add_decodes(self, sessions: list[SessionView], drafts: list[int]) -> None:
        """Add decoding sessions, each once, that fit the limits together. Drafts are priced as far as they
        are expected to stand."""
        names = [s.session for s in sessions]
        new_tokens = [1 + round(k * s.standing) for k, s in zip(drafts, sessions, strict=True)]
        self.cost = self.cost.add_all(new_tokens, [s.cached for s in sessions])
        self.items += map(ScheduledItem, names, drafts)
        self._scheduled.update(names)
        new = len(drafts) + sum(drafts)
        self._tokens_left -= new
        self._kv_left -= new

    def add_prefill(
        self, session: SessionView, budget_ms: float = math.inf, *, max_chunk: int | None = None
    ) -> int:
        """Add the largest prompt chunk that fits (at most ``max_chunk``). Return its tokens."""
        chunk = min(session.prompt_left, self.prefill_left, self.free_tokens)
        if max_chunk is not None:
            chunk = min(chunk, max_chunk)
        if chunk < 1 or session.session in self._scheduled:
            return 0
        cost = self.cost.add(chunk, session.cached, True)
        if budget_ms < math.inf and cost.bound_ms > budget_ms:
            chunk = self._largest_chunk(session, chunk, budget_ms)
            if chunk < 1:
                return 0
            cost = self.cost.add(chunk, session.cached, True)
        self._take(cost, ScheduledItem(session.session, prefill=chunk), chunk)
        self.prefill_left -= chunk
        return chunk

    def add(self, session: SessionView, budget_ms: float = math.inf) -> bool:
        """Add a prompt chunk, or the session with all its pending drafts."""
        if session.prompt_left:
            return self.add_prefill(session, budget_ms) > 0
        return self.add_decode(session, len(session.acceptance_probs), budget_ms)

    def plan(self, reason: str) -> StepPlan:
        return StepPlan(
            items=tuple(self.items), p50_ms=self.cost.p50_ms, bound_ms=self.cost.bound_ms, reason=reason
        )

    def _largest_chunk(self, session: SessionView, chunk: int, budget_ms: float) -> int:
        """The largest chunk below ``chunk`` within the budget.

        Predictions never fall when work is added, so a search finds it. It prices 16 chunks at once,
        because an estimator does that at the cost of one.
        """
        if self.cost.add(1, session.cached, True).bound_ms > budget_ms:
            return 0  # most prompts of a long queue; cheaper than a search
        low, high = 0, chunk
        while high - low > 1:
            sizes = np.array(sorted(evenly_spaced(low + 1, high - 1, 16)))
            bounds = self.cost.add_many(
                sizes, np.full(len(sizes), session.cached), np.ones(len(sizes), bool)
            )[1]
            fitting = int(np.searchsorted(bounds > budget_ms, True))
            high = int(sizes[fitting]) if fitting < len(sizes) else high
            low = int(sizes[fitting - 1]) if fitting else low
        return low

    def _take(self, cost: BatchCost, item: ScheduledItem, new: int) -> None:
        self.cost = cost
        self.items.append(item)
        self._scheduled.add(item.session)
        self._tokens_left -= new
        self._kv_left -= new
