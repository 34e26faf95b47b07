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
from operator import attrgetter

import numpy as np

from wispprof.core import StepEstimator
from wispprof.policies.api import Limits, SessionView, StepPlan
from wispprof.policies.build import StepBuilder, eligible, idle
from wispprof.policies.marginal import Slopes
from wispprof.policies.tails import Book, Columns

__all__ = ["Wisp"]

_DEADLINE = attrgetter("deadline_ms")
_RETRY_MS = 1.0
_WIDEST = 65
"""Widths of refused items that are told apart; wider ones count as this wide."""


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
        refused = [math.inf] * (_WIDEST + 1)
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
                new = 1 + len(session.tail)
                # The batch only grows and its budget only shrinks: what is no smaller than something
                # the budget refused need not be priced.
                if session.cached >= refused[min(new, _WIDEST)]:
                    continue
                joined = build.add_decode(session, new - 1, allowed)
                if not joined and allowed == budget_ms and not build.full:
                    for width in range(min(new, _WIDEST), _WIDEST + 1):
                        refused[width] = min(refused[width], session.cached)
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
        columns = Columns.of(ready)
        costs = columns.slopes(self._slopes, estimator, limits.max_items)
        book = Book.build(columns, costs, np.ones(len(ready)))
        value = book.gains[np.arange(len(ready)), book.lengths]
        spent = book.lone_ms + book.lengths * book.row_ms
        for index, session in enumerate(ready):
            if session.prompt_left:
                # A prompt commits one token when its last chunk is fed: value by what is left.
                new = min(session.prompt_left, limits.prefill_chunk)
                value[index] = new / session.prompt_left
                spent[index] += (new - 1) * book.row_ms[index]
        deadline = np.fromiter(map(_DEADLINE, ready), np.float64, len(ready))
        urgent = deadline <= now_ms + self.urgency * costs.all_bound_ms
        rank = np.where(urgent, deadline, -value / (spent + 1e-9))
        order: list[int] = np.lexsort((rank, ~urgent)).tolist()
        return order, int(urgent.sum())


def _alone_ms(session: SessionView, estimator: StepEstimator) -> float:
    """Bound of the least step that answers this session: its round, or one token of its prompt."""
    new = 1 if session.prompt_left else 1 + len(session.tail)
    return estimator.start().add(new, session.cached, bool(session.prompt_left)).bound_ms
