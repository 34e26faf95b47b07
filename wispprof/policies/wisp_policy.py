"""WISP's verification batch scheduler (arXiv 2601.11652): deadlines first, then value per millisecond.

Urgent items join by earliest deadline, the others by expected accepted tokens per predicted ms. An
addition is refused if it exceeds a limit or the earliest deadline in the batch, by the bound. If nothing
fits, the item with the earliest deadline goes alone.

Not in the paper: when an item counts as urgent (``urgency``), and that an item which is late even alone keeps
its place in the order but no longer constrains the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from wispprof.policies.batch_builder import RETRY_MS, BatchBuilder, no_batch, ready_sessions
from wispprof.policies.cost_model import BoolArray, FloatArray, IntArray, MarginalCostCache, MarginalCosts
from wispprof.policies.draft_selection import SessionColumns
from wispprof.policies.interface import Limits, SessionView, StepPlan, column
from wispprof.types import StepTimeEstimator

_DEADLINE, _PROMPT_LEFT = column("deadline_ms"), column("prompt_left")
_BLOCK = 128
"""Candidates priced first: most steps are full before the others are reached."""
_REFUSALS = 8
"""Candidates refused one by one before the rest of a block is priced again at once."""
_MIN_RUN = 8
"""Decode items in a row from which they are priced at once, as they would join one after another."""


@dataclass
class WispPolicy:
    """``urgency``: an item is urgent if its slack is less than this many times the bound of a step over
    everything that is ready (it would be late after waiting for one)."""

    urgency: float = 1.0
    name: str = field(default="wisp", init=False)
    stream: bool = field(default=False, init=False)
    _costs: MarginalCostCache = field(default_factory=MarginalCostCache, init=False, repr=False)

    def plan(
        self, now_ms: float, sessions: list[SessionView], estimator: StepTimeEstimator, limits: Limits
    ) -> StepPlan:
        ready = ready_sessions(sessions)
        if not ready:
            return no_batch(now_ms, None, "nothing ready")
        queue = _Queue(now_ms, ready, estimator, limits, self._costs, self.urgency)
        batch = BatchBuilder(estimator, limits)
        budget_ms = math.inf
        for block in queue.blocks():
            budget_ms = self._add(batch, ready, queue, block, budget_ms)
            if batch.full or queue.min_bound_ms(batch) > budget_ms:
                break
        if batch.items:
            return batch.plan("deadlines, then value")
        for idx in np.argsort(queue.deadline_ms, kind="stable").tolist():
            if batch.add(ready[idx]):
                return batch.plan("earliest deadline alone")
        return no_batch(now_ms, now_ms + RETRY_MS, "no capacity")

    @staticmethod
    def _add(
        batch: BatchBuilder, ready: list[SessionView], queue: _Queue, idx: IntArray, budget_ms: float
    ) -> float:
        """Try these candidates in order. Return ms until the earliest deadline in the batch."""
        slack_ms = queue.slack_ms
        if queue.new_tokens(idx) > batch.free_tokens:
            # A candidate whose whole round exceeds the budget does not join with a part of it either.
            idx = idx[queue.bounds(batch, idx) <= np.minimum(slack_ms[idx], budget_ms)]
        while len(idx) and batch.free_tokens > 0:
            ahead = queue.decodes_ahead(idx)
            if ahead >= _MIN_RUN:
                joined = queue.joining(batch, idx[:ahead], budget_ms)
                run, idx = idx[:joined], idx[joined:]
                if joined:
                    batch.add_decodes([ready[i] for i in run.tolist()], queue.drafts(run).tolist())
                    budget_ms = min(budget_ms, float(slack_ms[run].min()))
                if batch.free_tokens < 1:
                    break
                if joined == ahead and queue.decodes_ahead(idx[1:]) >= _MIN_RUN:
                    # A single prompt between two runs.
                    allowed_ms = min(budget_ms, float(slack_ms[idx[0]]))
                    if batch.add(ready[int(idx[0])], allowed_ms):
                        budget_ms = allowed_ms
                    idx = idx[1:]
                    continue
            # The batch only grows and its budget only shrinks: what the budget refuses now stays out.
            bounds = queue.bounds(batch, idx, batch.free_tokens)
            idx = idx[bounds <= np.minimum(slack_ms[idx], budget_ms)]
            tried = refused = 0
            for i in idx.tolist():
                if batch.free_tokens < 1:
                    return budget_ms
                allowed_ms = min(budget_ms, float(slack_ms[i]))
                tried += 1
                if batch.add(ready[i], allowed_ms):
                    budget_ms = allowed_ms
                else:
                    refused += 1
                if refused == _REFUSALS:
                    break
                if ready[i].prompt_left and queue.decodes_ahead(idx[tried:]) >= _MIN_RUN:
                    break
            idx = idx[tried:]
        return budget_ms


class _Queue:
    """Candidates as columns (n,). ``slack_ms``: ms to each deadline, ``inf`` for an urgent candidate that is
    late even alone."""

    def __init__(
        self,
        now_ms: float,
        ready: list[SessionView],
        estimator: StepTimeEstimator,
        limits: Limits,
        cost_cache: MarginalCostCache,
        urgency: float,
    ) -> None:
        count = len(ready)
        self._columns = SessionColumns.of(ready)
        self._costs: MarginalCosts = self._columns.marginal_costs(cost_cache, estimator, limits.max_items)
        self._prefill_chunk = limits.prefill_chunk
        self._prompt_left = np.fromiter(map(_PROMPT_LEFT, ready), np.int64, count)
        self._is_prompt: BoolArray = self._prompt_left > 0
        # The least that can be scheduled of each: its whole round, or one token of its prompt.
        self._new: IntArray = np.where(self._is_prompt, 1, 1 + self._columns.lengths)
        self._min_item = int(self._new.min()), int(self._columns.cached.min())
        self.deadline_ms = np.fromiter(map(_DEADLINE, ready), np.float64, count)
        self.slack_ms = self.deadline_ms - now_ms
        urgent: BoolArray = self.slack_ms <= urgency * self._costs.all_bound_ms
        self._urgent = np.flatnonzero(urgent)
        self._others = np.flatnonzero(~urgent)
        alone_ms = self.bounds(BatchBuilder(estimator, limits), self._urgent)
        self.slack_ms[self._urgent[alone_ms > self.slack_ms[self._urgent]]] = math.inf

    def blocks(self) -> Iterator[IntArray]:
        """Candidates in order: urgent ones by deadline, then the others by value per ms (computed only if
        they are reached)."""
        order = self._urgent[np.argsort(self.deadline_ms[self._urgent], kind="stable")]
        for start in range(0, len(order), _BLOCK):
            yield order[start : start + _BLOCK]
        if len(self._others):
            order = self._others[np.argsort(-self._value_per_ms(), kind="stable")]
            yield order[:_BLOCK]
            if len(order) > _BLOCK:
                yield order[_BLOCK:]

    def bounds(self, batch: BatchBuilder, idx: IntArray, max_new: int | None = None) -> FloatArray:
        """Bound of the step with each of these added alone, with at most ``max_new`` tokens of it."""
        cached, new = self._columns.cached[idx], self._new[idx]
        if max_new is not None:
            new = np.minimum(new, max_new)
        bounds: FloatArray = batch.cost.add_many(new, cached, self._is_prompt[idx])[1]
        return bounds

    def new_tokens(self, idx: IntArray) -> int:
        """New tokens of these together."""
        return int(self._new[idx].sum())

    def drafts(self, idx: IntArray) -> IntArray:
        """Pending drafts of each of these."""
        return self._columns.lengths[idx]

    def decodes_ahead(self, idx: IntArray) -> int:
        """How many of these come before the first prompt."""
        is_prompt = self._is_prompt[idx]
        first = int(is_prompt.argmax()) if len(is_prompt) else 0
        return first if first or not len(is_prompt) or is_prompt[0] else len(is_prompt)

    def joining(self, batch: BatchBuilder, idx: IntArray, budget_ms: float) -> int:
        """How many of these decode items join one after another, until one is refused or does not fit."""
        idx = idx[: batch.free_slots]
        new = self._new[idx]
        fitting = int(np.searchsorted(np.cumsum(new), batch.free_tokens, side="right"))
        if not fitting:
            return 0
        idx, new = idx[:fitting], new[:fitting]
        bounds = batch.cost.add_in_turn(new, self._columns.cached[idx])[1]
        allowed_ms = np.minimum(np.minimum.accumulate(self.slack_ms[idx]), budget_ms)
        refused = bounds > allowed_ms
        return int(refused.argmax()) if refused.any() else fitting

    def min_bound_ms(self, batch: BatchBuilder) -> float:
        """Lower limit of the step's bound with any further item: predictions never fall when work is
        added."""
        new, cached = self._min_item
        return min(batch.cost.add(new, cached, prefill).bound_ms for prefill in (False, True))

    def _value_per_ms(self) -> FloatArray:
        """Expected tokens per ms of the candidates that are not urgent."""
        columns = self._columns.take(self._others)
        tokens = columns.expected_tokens()
        read_ms, row_ms = self._costs.per_item(columns.cached)
        cost_ms = read_ms + row_ms + columns.lengths * row_ms
        is_prompt = self._is_prompt[self._others]
        if is_prompt.any():
            # A prompt commits one token when its last chunk is fed: a chunk is worth its share of that.
            left = self._prompt_left[self._others][is_prompt]
            new = np.minimum(left, self._prefill_chunk)
            tokens[is_prompt] = new / left
            cost_ms[is_prompt] += (new - 1) * row_ms[is_prompt]
        value: FloatArray = tokens / (cost_ms + 1e-9)
        return value
