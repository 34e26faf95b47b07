"""A step under construction: keeps count against the limits and the estimator while members join."""

from __future__ import annotations

import math

import numpy as np

from wispprof.policies.api import Limits, ScheduledItem, SessionView, StepPlan
from wispprof.types import BatchCost, StepTimeEstimator

__all__ = ["StepBuilder", "cut_drafts", "eligible", "no_batch"]


def eligible(sessions: list[SessionView]) -> list[SessionView]:
    """Those that may take part now. The view says so: a new prompt may, and a stream at any time, but a
    session in round mode (its cache evicted or not) only once its round has arrived."""
    return [s for s in sessions if s.ready]


def spread(first: int, last: int, count: int) -> set[int]:
    """At most ``count`` whole numbers from ``first`` to ``last``, both included, evenly apart."""
    step = (last - first) / (count - 1)
    return {int(first + place * step) for place in range(count - 1)} | {last}


def no_batch(now_ms: float, wake_ms: float | None, reason: str) -> StepPlan:
    """A plan without members. ``wake_ms`` is never in the past, or the loop would spin."""
    if wake_ms is not None:
        wake_ms = max(wake_ms, now_ms + 0.1) if math.isfinite(wake_ms) else None
    return StepPlan(wake_ms=wake_ms, reason=reason)


def cut_drafts(session: SessionView, keep: int | None) -> int:
    """How many drafts a session offers when at most ``keep`` may be used (``None``: all)."""
    held = len(session.acceptance_probs)
    return held if keep is None else min(held, keep)


class StepBuilder:
    """Adds members one by one; whatever would break a limit or the time budget is refused.

    ``budget_ms`` bounds the step's *bound*, not its median. Prompt chunks share
    ``limits.prefill_chunk`` between them, so one step never prefills more than that.
    """

    __slots__ = (
        "_planned",
        "cost",
        "estimator",
        "kv",
        "limits",
        "members",
        "prefill_left",
        "tokens",
    )

    def __init__(self, estimator: StepTimeEstimator, limits: Limits) -> None:
        self.estimator = estimator
        self.cost: BatchCost = estimator.start()
        self.limits = limits
        self.members: list[ScheduledItem] = []
        self.tokens = 0
        self.kv = limits.kv_free
        self.prefill_left = limits.prefill_chunk
        self._planned: set[str] = set()

    @property
    def full(self) -> bool:
        """Nothing more can join, whatever it is."""
        room = min(self.limits.max_tokens - self.tokens, self.kv)
        return room <= 0 or len(self.members) >= self.limits.max_items

    @property
    def free_slots(self) -> int:
        """How many more members may join."""
        return self.limits.max_items - len(self.members)

    def room(self) -> int:
        """Most new tokens that one more member may bring."""
        if len(self.members) >= self.limits.max_items:
            return 0
        return min(self.limits.max_tokens - self.tokens, self.kv)

    def add_decode(
        self, session: SessionView, drafts: int, budget_ms: float = math.inf, *, shrink: bool = True
    ) -> bool:
        """Add a decoding session with ``drafts`` of its tail.

        ``shrink``: fewer drafts rather than none where a token limit is short (dropping drafts is
        lossless). The time budget never shrinks a tail: that is the policy's own business.
        """
        room = self.room()
        if room < 1 or session.session in self._planned:
            return False
        if drafts + 1 > room:
            if not shrink:
                return False
            drafts = room - 1
        cost = self.cost.add(drafts + 1, session.cached)
        if budget_ms < math.inf and cost.bound_ms > budget_ms:
            return False
        self._take(cost, ScheduledItem(session.session, drafts=drafts), drafts + 1)
        return True

    def add_decodes(self, sessions: list[SessionView], drafts: list[int]) -> None:
        """Add decoding sessions, each once, that fit the limits together."""
        names = [s.session for s in sessions]
        cached = [s.cached for s in sessions]
        self.cost = self.cost.add_all([kept + 1 for kept in drafts], cached)
        self.members += map(ScheduledItem, names, drafts)
        self._planned.update(names)
        new = len(drafts) + sum(drafts)
        self.tokens += new
        self.kv -= new

    def add_prefill(
        self, session: SessionView, budget_ms: float = math.inf, *, most: int | None = None
    ) -> int:
        """Add the largest chunk of a prompt that fits (``most``: a lower cap); returns its tokens."""
        chunk = min(session.prompt_left, self.prefill_left, self.room())
        if most is not None:
            chunk = min(chunk, most)
        if chunk < 1 or session.session in self._planned:
            return 0
        cost = self.cost.add(chunk, session.cached, True)
        if budget_ms < math.inf and cost.bound_ms > budget_ms:
            chunk, cost = self._largest(session, chunk, budget_ms)
            if chunk < 1:
                return 0
        self._take(cost, ScheduledItem(session.session, prefill=chunk), chunk)
        self.prefill_left -= chunk
        return chunk

    def add(self, session: SessionView, keep: int | None = None) -> bool:
        """Add whatever the session has to do: a prompt chunk, or its tail (at most ``keep``)."""
        if session.prompt_left:
            return self.add_prefill(session) > 0
        return self.add_decode(session, cut_drafts(session, keep))

    def plan(self, reason: str = "") -> StepPlan:
        return StepPlan(
            members=tuple(self.members),
            p50_ms=self.cost.p50_ms,
            bound_ms=self.cost.bound_ms,
            reason=reason,
        )

    def _largest(self, session: SessionView, most: int, budget_ms: float) -> tuple[int, BatchCost]:
        """The largest chunk within the budget: predictions never fall when work is added. Narrowed
        down sixteen-fold at a time, for an estimator prices many chunks at the cost of one."""
        low, high = 0, most
        while high - low > 1:
            sizes = np.array(sorted(spread(low + 1, high - 1, 16)))
            bounds = self.cost.add_many(sizes, np.full(len(sizes), session.cached), True)[1]
            inside = int(np.searchsorted(bounds > budget_ms, True))
            high = int(sizes[inside]) if inside < len(sizes) else high
            low = int(sizes[inside - 1]) if inside else low
        return low, self.cost.add(low, session.cached, True) if low else self.cost

    def _take(self, cost: BatchCost, member: ScheduledItem, new: int) -> None:
        self.cost = cost
        self.members.append(member)
        self._planned.add(member.session)
        self.tokens += new
        self.kv -= new
