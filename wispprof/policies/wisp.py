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
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wispprof.core import StepEstimator
from wispprof.policies.api import Limits, SessionView, StepPlan
from wispprof.policies.build import StepBuilder, eligible, idle
from wispprof.policies.marginal import Slopes, bounds_with
from wispprof.policies.tails import Book, Columns, FloatArray

__all__ = ["Wisp"]

_DEADLINE, _PROMPT_LEFT = attrgetter("deadline_ms"), attrgetter("prompt_left")
_RETRY_MS = 1.0
_REFUSALS = 8
"""Candidates refused one by one before all that are left are priced again at once."""


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
        order, urgent, columns = self._order(now_ms, ready, estimator, limits)
        build = StepBuilder(estimator, limits)
        own_ms = columns.deadline - now_ms
        new, cached, prompt = columns.least
        bounds = bounds_with(build.cost, new, cached, prompt)
        # Late even if alone: keeps its place, constrains nobody.
        late = bounds > own_ms
        late[urgent:] = False
        own_ms = np.where(late, math.inf, own_ms)
        budget_ms = math.inf
        position = 0
        while True:
            # The batch only grows and its budget only shrinks: what the budget refuses now stays out.
            fit = np.flatnonzero(bounds <= np.minimum(own_ms[position:], budget_ms)) + position
            position, budget_ms = self._join(build, ready, order, fit, own_ms, budget_ms)
            if position == len(order) or build.full:
                break
            rest = slice(position, None)
            bounds = bounds_with(build.cost, new[rest], cached[rest], prompt[rest])
        if build.members:
            return build.plan("deadlines, then value")
        for index in sorted(range(len(ready)), key=lambda i: ready[i].deadline_ms):
            if build.add(ready[index]):
                return build.plan("earliest deadline alone")
        return idle(now_ms, now_ms + _RETRY_MS, "no room")

    @staticmethod
    def _join(
        build: StepBuilder,
        ready: list[SessionView],
        order: list[int],
        fit: NDArray[np.int64],
        own_ms: FloatArray,
        budget_ms: float,
    ) -> tuple[int, float]:
        """Try candidates in turn until so many were refused that looking at all again is cheaper;
        returns (where to go on, the earliest deadline in the batch)."""
        refused = 0
        for position in fit.tolist():
            if build.full:
                break
            session = ready[order[position]]
            allowed = min(budget_ms, float(own_ms[position]))
            if session.prompt_left:
                joined = build.add_prefill(session, allowed) > 0
            else:
                joined = build.add_decode(session, len(session.tail), allowed)
            if joined:
                budget_ms = allowed
            else:
                refused += 1
                if refused == _REFUSALS:
                    return position + 1, budget_ms
        return len(order), budget_ms

    def _order(
        self,
        now_ms: float,
        ready: list[SessionView],
        estimator: StepEstimator,
        limits: Limits,
    ) -> tuple[list[int], int, _Candidates]:
        """Indices in the order they are tried, how many of the first are urgent, and their columns."""
        columns = Columns.of(ready)
        costs = columns.slopes(self._slopes, estimator, limits.max_items)
        book = Book.build(columns, costs, np.ones(len(ready)))
        value = book.gains[np.arange(len(ready)), book.lengths]
        spent = book.lone_ms + book.lengths * book.row_ms
        left = np.fromiter(map(_PROMPT_LEFT, ready), np.int64, len(ready))
        prompt = left > 0
        if prompt.any():
            # A prompt commits one token when its last chunk is fed: value by what is left.
            new = np.minimum(left[prompt], limits.prefill_chunk)
            value[prompt] = new / left[prompt]
            spent[prompt] += (new - 1) * book.row_ms[prompt]
        deadline = np.fromiter(map(_DEADLINE, ready), np.float64, len(ready))
        urgent = deadline <= now_ms + self.urgency * costs.all_bound_ms
        rank = np.where(urgent, deadline, -value / (spent + 1e-9))
        order = np.lexsort((rank, ~urgent))
        least = np.where(prompt, 1, 1 + columns.lengths)
        found = _Candidates(deadline[order], (least[order], columns.cached[order], prompt[order]))
        return order.tolist(), int(urgent.sum()), found


class _Candidates(NamedTuple):
    """In the order they are tried: deadlines, and (new, cached, prefill) of the least that answers each:
    its round, or one token of its prompt."""

    deadline: FloatArray
    least: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]
