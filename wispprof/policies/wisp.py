"""WISP's verification batch scheduler (arXiv 2601.11652): deadlines first, then value per ms.

Items that must start now join by earliest deadline; the others by expected accepted tokens per
predicted millisecond. Each addition is checked against the limits and against the earliest deadline
in the batch, on the bound, and refused if it breaks one. If nothing fits, the earliest deadline goes
alone. Not in the paper and chosen here: when an item counts as urgent (``urgency``), and that an item
which is late even alone keeps its place in the order but no longer constrains the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from wispprof.core import StepEstimator
from wispprof.policies.api import Limits, SessionView, StepPlan
from wispprof.policies.build import StepBuilder, eligible, idle
from wispprof.policies.marginal import Slopes, expected_tokens

__all__ = ["Wisp"]

_RETRY_MS = 1.0


@dataclass
class Wisp:
    """``urgency``: an item is urgent when its slack is less than this many times the bound of a step
    over everything that is ready (it would not survive waiting for one)."""

    urgency: float = 1.0
    name: str = field(default="wisp", init=False)
    stream: bool = field(default=False, init=False)
    _slopes: Slopes = field(default_factory=Slopes, init=False, repr=False)

    def plan(
        self,
        now_ms: float,
        sessions: list[SessionView],
        estimator: StepEstimator,
        limits: Limits,
    ) -> StepPlan:
        ready = eligible(sessions)
        if not ready:
            return idle(now_ms, None, "idle")
        order, urgent = self._order(now_ms, ready, estimator, limits)
        build = StepBuilder(estimator, limits)
        budget_ms = math.inf
        for position, index in enumerate(order):
            if build.full:
                break
            session = ready[index]
            own_ms = session.deadline_ms - now_ms
            if position < urgent and _alone_ms(session, estimator) > own_ms:
                own_ms = math.inf  # late even if alone: keeps its place, constrains nobody
            allowed = min(budget_ms, own_ms)
            if session.prompt_left:
                joined = build.add_prefill(session, allowed) > 0
            else:
                joined = build.add_decode(session, len(session.tail), allowed)
            if joined:
                budget_ms = allowed
        if build.members:
            return build.plan("deadlines, then value")
        for index in sorted(range(len(ready)), key=lambda i: ready[i].deadline_ms):
            if build.add(ready[index]):
                return build.plan("earliest deadline alone")
        return idle(now_ms, now_ms + _RETRY_MS, "no room")

    def _order(
        self,
        now_ms: float,
        ready: list[SessionView],
        estimator: StepEstimator,
        limits: Limits,
    ) -> tuple[list[int], int]:
        """Indices in the order they are tried; the first so many of them are urgent."""
        costs = self._slopes.of(estimator, ready, limits)
        urgent_ms = now_ms + self.urgency * costs.all_bound_ms
        urgent: list[tuple[float, int]] = []
        rest: list[tuple[float, int]] = []
        row, kv, pair, item = costs.row_ms, costs.kv_ms, costs.pair_ms, costs.item_ms
        for index, session in enumerate(ready):
            deadline = session.deadline_ms
            if deadline <= urgent_ms:
                urgent.append((deadline, index))
                continue
            if session.prompt_left:
                # A prompt commits one token when its last chunk is fed: value by what is left.
                new = min(session.prompt_left, limits.prefill_chunk)
                value = new / session.prompt_left
            else:
                new = 1 + len(session.tail)
                value = expected_tokens(session.tail)
            cost = item + new * (row + pair * session.cached) + kv * session.cached
            rest.append((-value / (cost + 1e-9), index))
        urgent.sort()
        rest.sort()
        return [i for _, i in urgent] + [i for _, i in rest], len(urgent)


def _alone_ms(session: SessionView, estimator: StepEstimator) -> float:
    """Bound of the least step that answers this session: its round, or one token of its prompt."""
    new = 1 if session.prompt_left else 1 + len(session.tail)
    return estimator.start().add(new, session.cached, bool(session.prompt_left)).bound_ms
