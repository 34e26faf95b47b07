"""WISP's verification batch scheduler (arXiv 2601.11652): deadlines first, then value per ms.

Items that must start now join by earliest deadline; the others by expected accepted tokens per
predicted millisecond. Each addition is checked against the limits and against the earliest deadline
in the batch, on the bound, and refused if it breaks one. If nothing fits, the earliest deadline goes
alone. Not in the paper and chosen here: when an item counts as urgent (``urgency``), and that an item
which is late even alone keeps its place in the order but no longer constrains the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from wispprof.policies.api import Limits, SessionView, StepPlan, column
from wispprof.policies.batch_builder import StepBuilder, eligible, no_batch
from wispprof.policies.cost_model import (
    MarginalCostCache,
    MarginalCosts,
)
from wispprof.policies.draft_selection import BoolArray, Columns, FloatArray, IntArray
from wispprof.types import StepTimeEstimator

__all__ = ["Wisp"]

_DEADLINE, _PROMPT_LEFT = column("deadline_ms"), column("prompt_left")
_RETRY_MS = 1.0
_BLOCK = 128
"""Candidates priced at first: most steps are full, or spent, before the others are looked at."""
_REFUSALS = 8
"""Candidates refused one by one before all that are left of a block are priced again at once."""
_RUN = 8
"""From so many rounds in a row on they are priced at once as they would join one after another."""


@dataclass
class Wisp:
    """``urgency``: an item is urgent when its slack is less than this many times the bound of a step
    over everything that is ready (it would not survive waiting for one)."""

    urgency: float = 1.0
    name: str = field(default="wisp", init=False)
    stream: bool = field(default=False, init=False)
    _slopes: MarginalCostCache = field(default_factory=MarginalCostCache, init=False, repr=False)

    def plan(
        self,
        now_ms: float,
        sessions: list[SessionView],
        estimator: StepTimeEstimator,
        limits: Limits,
    ) -> StepPlan:
        ready = eligible(sessions)
        if not ready:
            return no_batch(now_ms, None, "no_batch")
        queue = _Queue(now_ms, ready, estimator, limits, self._slopes, self.urgency)
        build = StepBuilder(estimator, limits)
        budget_ms = math.inf
        for places in queue.blocks():
            budget_ms = self._join(build, ready, queue, places, budget_ms)
            if build.full or queue.least_ms(build) > budget_ms:
                break
        if build.members:
            return build.plan("deadlines, then value")
        for index in np.argsort(queue.deadline, kind="stable").tolist():
            if build.add(ready[index]):
                return build.plan("earliest deadline alone")
        return no_batch(now_ms, now_ms + _RETRY_MS, "no room")

    @staticmethod
    def _join(
        build: StepBuilder,
        ready: list[SessionView],
        queue: _Queue,
        places: IntArray,
        budget_ms: float,
    ) -> float:
        """Try these candidates in turn; returns the earliest deadline in the batch, as ms from now."""
        own_ms = queue.own_ms
        if queue.crowd(build, places):
            # Whose whole tail is too much does not come with a part of it either.
            places = places[queue.bounds(build, places) <= np.minimum(own_ms[places], budget_ms)]
        while len(places) and build.room() > 0:
            ahead = queue.rounds_ahead(places)
            if ahead >= _RUN:
                run = places[:ahead]
                joined = queue.run(build, run, budget_ms)
                if joined:
                    run = run[:joined]
                    build.add_decodes([ready[p] for p in run.tolist()], queue.lengths(run).tolist())
                    budget_ms = min(budget_ms, float(own_ms[run].min()))
                places = places[joined:]
                if build.room() < 1:
                    break
                if joined == ahead and queue.rounds_ahead(places[1:]) >= _RUN:
                    # A lone prompt between two runs.
                    allowed = min(budget_ms, float(own_ms[places[0]]))
                    if _joins(build, ready[int(places[0])], allowed):
                        budget_ms = allowed
                    places = places[1:]
                    continue
            # The batch only grows and its budget only shrinks: what the budget refuses now stays out.
            least_ms = queue.bounds(build, places, build.room())
            places = places[least_ms <= np.minimum(own_ms[places], budget_ms)]
            tried = refused = 0
            for place in places.tolist():
                if build.room() < 1:
                    return budget_ms
                session = ready[place]
                allowed = min(budget_ms, float(own_ms[place]))
                tried += 1
                if _joins(build, session, allowed):
                    budget_ms = allowed
                else:
                    refused += 1
                if refused == _REFUSALS:
                    break
                if session.prompt_left and queue.rounds_ahead(places[tried:]) >= _RUN:
                    break
            places = places[tried:]
        return budget_ms


def _joins(build: StepBuilder, session: SessionView, budget_ms: float) -> bool:
    """Add a round, or what fits of a prompt, if the budget allows it."""
    if session.prompt_left:
        return build.add_prefill(session, budget_ms) > 0
    return build.add_decode(session, len(session.acceptance_probs), budget_ms)


class _Queue:
    """Candidates as columns (n,). ``own_ms``: time to each deadline; ``inf`` for an urgent one that is late
    even alone: it keeps its place in the order and constrains nobody."""

    def __init__(
        self,
        now_ms: float,
        ready: list[SessionView],
        estimator: StepTimeEstimator,
        limits: Limits,
        marginal_costs: MarginalCostCache,
        urgency: float,
    ) -> None:
        count = len(ready)
        self._columns = Columns.of(ready)
        self._costs: MarginalCosts = self._columns.marginal_costs(
            marginal_costs, estimator, limits.max_items
        )
        self._chunk = limits.prefill_chunk
        self._left = np.fromiter(map(_PROMPT_LEFT, ready), np.int64, count)
        self._prompt: BoolArray = self._left > 0
        # The least that answers each: its round, or one token of its prompt.
        self._new: NDArray[np.int64] = np.where(self._prompt, 1, 1 + self._columns.lengths)
        self._least = int(self._new.min()), int(self._columns.cached.min())
        self.deadline = np.fromiter(map(_DEADLINE, ready), np.float64, count)
        self.own_ms = self.deadline - now_ms
        urgent: BoolArray = self.own_ms <= urgency * self._costs.all_bound_ms
        self._urgent = np.flatnonzero(urgent)
        self._others = np.flatnonzero(~urgent)
        alone = self.bounds(StepBuilder(estimator, limits), self._urgent)
        self.own_ms[self._urgent[alone > self.own_ms[self._urgent]]] = math.inf

    def blocks(self) -> Iterator[IntArray]:
        """Places in the order in which they are tried: urgent ones by deadline, the others by expected
        tokens per ms, which are only reckoned when it is their turn."""
        order = self._urgent[np.argsort(self.deadline[self._urgent], kind="stable")]
        for start in range(0, len(order), _BLOCK):
            yield order[start : start + _BLOCK]
        if len(self._others):
            order = self._others[np.argsort(-self._value(), kind="stable")]
            yield order[:_BLOCK]
            if len(order) > _BLOCK:
                yield order[_BLOCK:]

    def bounds(self, build: StepBuilder, places: IntArray, most: int | None = None) -> FloatArray:
        """Bound of the step under construction with each of these added alone, and at most ``most`` tokens of
        it."""
        cached, new = self._columns.cached[places], self._new[places]
        if most is not None:
            new = np.minimum(new, most)
        return build.cost.add_many(new, cached, self._prompt[places])[1]

    def crowd(self, build: StepBuilder, places: IntArray) -> bool:
        """Whether these bring more tokens than a step has room for."""
        return int(self._new[places].sum()) > build.room()

    def lengths(self, places: IntArray) -> IntArray:
        """Drafts that these hold."""
        return self._columns.lengths[places]

    def rounds_ahead(self, places: IntArray) -> int:
        """How many of these come before the first prompt."""
        prompt = self._prompt[places]
        first = int(prompt.argmax()) if len(prompt) else 0
        return first if first or not len(prompt) or prompt[0] else len(prompt)

    def run(self, build: StepBuilder, places: IntArray, budget_ms: float) -> int:
        """How many of these rounds join, one after another, before one is refused or does not fit."""
        places = places[: build.free_slots]
        new = self._new[places]
        fits = int(np.searchsorted(np.cumsum(new), build.room(), side="right"))
        places, new = places[:fits], new[:fits]
        if not fits:
            return 0
        bounds = build.cost.add_in_turn(new, self._columns.cached[places])[1]
        allowed_ms = np.minimum(np.minimum.accumulate(self.own_ms[places]), budget_ms)
        refused = bounds > allowed_ms
        return int(refused.argmax()) if refused.any() else fits

    def least_ms(self, build: StepBuilder) -> float:
        """A floor of the step's bound whoever joins next: predictions never fall when work is added."""
        new, cached = self._least
        return min(build.cost.add(new, cached, chunk).bound_ms for chunk in (False, True))

    def _value(self) -> FloatArray:
        """Expected tokens per ms of those who are not urgent."""
        places = self._others
        columns = self._columns.take(places)
        value = columns.expected()
        read_ms, row_ms = self._costs.over(columns.cached)
        spent = read_ms + row_ms + columns.lengths * row_ms
        prompt = self._prompt[places]
        if prompt.any():
            # A prompt commits one token when its last chunk is fed: value by what is left.
            left = self._left[places][prompt]
            new = np.minimum(left, self._chunk)
            value[prompt] = new / left
            spent[prompt] += (new - 1) * row_ms[prompt]
        worth: FloatArray = value / (spent + 1e-9)
        return worth
