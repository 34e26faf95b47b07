"""The parts of a plain decision: a step that grows, what it costs, and the prompts that are read beside it.
Every price is that of a whole batch, by ``estimator.predict``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from wispprof.policies import Limits, ScheduledItem, SessionView
from wispprof.policies.cost_model import expected_tokens
from wispprof.policies.wispprof_settings import WispprofSettings
from wispprof.types import BatchShape, StepTimeEstimator, VerifyItem

__all__ = ["Costs", "Keep", "Step", "linear_costs", "price", "read_prompts", "value_of"]

Keep = dict[str, int]
"""Drafts that each member keeps, by session."""


class Costs(NamedTuple):
    """Linear costs around the batch at hand, in ms."""

    fixed: float
    item: float
    row: float
    pair: float
    kv: float
    bound: float

    def read(self, s: SessionView) -> float:
        return self.item + self.kv * s.cached

    def draft(self, s: SessionView) -> float:
        return self.row + self.pair * s.cached

    def spent(self, s: SessionView, drafts: int) -> float:
        return self.read(s) + self.draft(s) * (1 + drafts)


def rounded_up(value: int, digits: int) -> int:
    """Up to the next number with so many significant binary digits."""
    while len(bin(value)[2:].rstrip("0")) > digits:
        value += 1
    return value


def linear_costs(estimator: StepTimeEstimator, sessions: Sequence[SessionView], free_slots: int) -> Costs:
    """Secants over half the mean batch: so many items more, one so much wider, one as deep as the others."""
    count = len(sessions)
    items = rounded_up(min(count, free_slots), 5)
    new = 1 + sum(len(s.acceptance_probs) for s in sessions) // count
    cached = rounded_up(sum(s.cached for s in sessions) // count, 4)

    def price(*more: tuple[int, int]) -> float:
        return estimator.predict(BatchShape.of([(new, cached)] * items + list(more)))[0]

    span, cached = max(4, items // 2), max(64, cached)
    base = price()
    narrow = (price(*[(1, 0)] * span) - base) / span
    wide = price((span, 0)) - base
    deep = price((1, cached)) - price((1, 0))
    deep_wide = price((span, cached)) - price((span, 0))
    row = max(0.0, (wide - narrow) / (span - 1))
    pair = max(0.0, (deep_wide - deep) / ((span - 1) * cached))
    item, kv = max(0.0, narrow - row), max(0.0, deep / cached - pair)
    fixed = max(0.0, base - items * (item + new * (row + pair * cached) + kv * cached))
    bound = estimator.predict(BatchShape.uniform(items, new, cached))[1]
    return Costs(fixed, item, row, pair, kv, bound)


class Step:
    """A step that grows."""

    def __init__(self, estimator: StepTimeEstimator, limits: Limits) -> None:
        self.estimator, self.limits = estimator, limits
        self.items: list[VerifyItem] = []
        self.scheduled: dict[str, ScheduledItem] = {}

    def price(self, *more: VerifyItem) -> tuple[float, float]:
        items = (*self.items, *more)
        return self.estimator.predict(BatchShape(items)) if items else (0.0, 0.0)

    def join(self, s: SessionView, member: ScheduledItem) -> None:
        new, chunk = member.prefill or 1 + member.drafts, bool(member.prefill)
        self.items.append(VerifyItem(new, s.cached, chunk))
        self.scheduled[s.session] = member

    def largest_chunk(self, s: SessionView) -> int:
        """Most prompt tokens of a session for which the limits have capacity."""
        if len(self.scheduled) >= self.limits.max_items:
            return 0
        used = sum(item.new for item in self.items)
        fed = sum(item.new for item in self.items if item.prefill)
        tokens_left = min(self.limits.max_tokens, self.limits.kv_free) - used
        return max(0, min(s.prompt_left, self.limits.prefill_chunk - fed, tokens_left))


def price(sessions: Sequence[SessionView], keep: Keep, estimator: StepTimeEstimator) -> float:
    """Median ms of the step in which these keep so many drafts; 0 with nobody in it."""
    items = [(1 + keep[s.session], s.cached) for s in sessions if s.session in keep]
    return estimator.predict(BatchShape.of(items))[0] if items else 0.0


def value_of(
    sessions: Sequence[SessionView],
    keep: Keep,
    weight: dict[str, float],
    estimator: StepTimeEstimator,
    extra_ms: float,
) -> float:
    """Weighted tokens per ms."""
    worth = 0.0
    for s in sessions:
        if s.session in keep:
            worth += weight[s.session] * expected_tokens(s.acceptance_probs[: keep[s.session]])
    return worth / max(price(sessions, keep, estimator) + extra_ms, 1e-9)


def read_prompts(
    step: Step,
    now_ms: float,
    prompts: Sequence[SessionView],
    decode: Sequence[SessionView],
    tokens: float,
    settings: WispprofSettings,
) -> None:
    """Chunks as large as no running session minds; earliest first-token deadline first."""
    chunk = step.limits.prefill_chunk
    token_ms = step.estimator.predict(BatchShape.of([(chunk, 0, True)]))[0] / chunk
    running_ms = step.price()[1]
    reachable = [s for s in decode if not s.slo_unreachable] or decode
    slack_ms = sorted(s.deadline_ms - now_ms for s in reachable)
    stretched_ms = math.inf
    if len(prompts) > 1 and reachable:
        stretched_ms = 4.0 * running_ms
    elif reachable:
        unnoticed_ms = 0.1 * slack_ms[len(slack_ms) // 2]
        stretched_ms = min(max(unnoticed_ms, 2.0 * running_ms), 3.0 * running_ms)
    budget_ms = math.inf
    if settings.size_prefill and reachable:
        gap_ms = 0.8 * tokens * 1000.0 / max(s.slo.tokens_per_s for s in reachable)
        keepable = [ms for ms in slack_ms if ms >= running_ms]
        budget_ms = min([max(gap_ms, stretched_ms), *keepable])

    def due(s: SessionView) -> float:
        # Without a TTFT SLO: a multiple of its prefill time alone.
        if s.deadline_ms < math.inf or settings.ttft_target == math.inf:
            return s.deadline_ms
        return s.arrived_ms + settings.ttft_target * token_ms * (s.cached + s.prompt_left)

    queue = sorted(prompts, key=lambda s: (s.slo_unreachable, due(s), s.arrived_ms, s.session))
    for place, s in enumerate(queue):
        allowed_ms = math.inf
        if settings.size_prefill and decode:
            left_ms = due(s) - now_ms
            hurry_ms = 0.0
            if s.slo_unreachable or left_ms < running_ms:
                hurry_ms = 2.0 * running_ms if left_ms <= 4.0 * running_ms else 0.0
            elif left_ms <= 4.0 * running_ms:
                hurry_ms = min(left_ms, 2.0 * running_ms)
            # Steps so long that what the running sessions leave of each suffices in time.
            work_ms, needed_ms = token_ms * s.prompt_left, math.inf
            if left_ms > work_ms and work_ms / left_ms < 1.0:
                needed_ms = running_ms / (1.0 - work_ms / left_ms)
            allowed_ms = max(min(budget_ms, max(stretched_ms, needed_ms)), hurry_ms)
        most = step.largest_chunk(s)
        fits = [n for n in range(most, 0, -1) if step.price(VerifyItem(n, s.cached, True))[1] <= allowed_ms]
        size = fits[0] if fits else min(most, 16) if place == 0 else 0
        if size:
            step.join(s, ScheduledItem(s.session, prefill=size))
