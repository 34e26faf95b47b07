"""Marginal costs of a step, and the load level.

Marginal costs are plain numbers, so that a thousand candidates can be ranked quickly. Around the current
batch the step time is close to ``fixed + Σ (item + new·row + new·cached·pair + cached·kv)``. The coefficients
are secants of the estimator itself, so any estimator works. They only rank candidates: the estimator prices
what is finally scheduled.

The *slowdown* of the sessions that decode now is a ratio of step times: all of them advance by one
undrafted token, over one of them alone. It is 1 on an idle server. It stays near 1 while the fixed part of
a step dominates, and grows once rows and KV reads bind. It needs no hardware constants. The *load level*
is the number of :data:`LOAD_BOUNDS` that the slowdown has reached: 0 … 4. It means the same for server, edge,
simulator and plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wispprof.types import BatchTotals, StepTimeEstimator

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

LOAD_BOUNDS: tuple[float, ...] = (1.15, 1.5, 2.25, 4.0)
LOAD_LEVELS = len(LOAD_BOUNDS) + 1

_HYSTERESIS = 0.05


class MarginalCosts(NamedTuple):
    """Marginal step time (p50, ms) around a batch of equal items.

    ``fixed_ms``: step time without the items. ``alone_bound_ms``: bound of a step with one such item;
    ``all_bound_ms``: bound of the whole batch.
    """

    fixed_ms: float
    item_ms: float
    row_ms: float
    pair_ms: float
    kv_ms: float
    alone_bound_ms: float
    all_bound_ms: float

    def per_item(self, cached: IntArray) -> tuple[FloatArray, FloatArray]:
        """(ms for an item and its KV read, ms per new token), each (n,), of items over ``cached`` (n,)."""
        context = cached.astype(np.float64)
        return self.item_ms + self.kv_ms * context, self.row_ms + self.pair_ms * context


def expected_tokens(acceptance_probs: Sequence[float]) -> float:
    """Expected committed tokens with these drafts: 1 + Σ cumulative acceptance probability."""
    total = cum_acceptance = 1.0
    for acceptance_prob in acceptance_probs:
        cum_acceptance *= acceptance_prob
        total += cum_acceptance
    return total


def price_batches(
    estimator: StepTimeEstimator, new: IntArray, cached: IntArray
) -> tuple[FloatArray, FloatArray]:
    """(p50, bound), each (m,), of m decode batches over the same n sessions.

    ``new`` (m, n): tokens that each session feeds in each batch, 0 if it is not in it; ``cached`` (n,).
    """
    scheduled = new > 0
    cached_of = scheduled * cached
    totals = BatchTotals(
        items=scheduled.sum(axis=1),
        sum_new=new.sum(axis=1),
        sum_cached=cached_of.sum(axis=1),
        sum_new_cached=new @ cached,
        sum_new_sq=(new * new).sum(axis=1),
        max_cached=cached_of.max(axis=1, initial=0),
        max_new=new.max(axis=1, initial=0),
        prefill=np.zeros(len(new), dtype=np.int64),
    )
    prices = estimator.predict_totals(totals)
    if prices is not None:
        return prices
    p50, bound = np.empty(len(new)), np.empty(len(new))
    contexts = cached.tolist()
    for idx, row in enumerate(new.tolist()):
        batch = estimator.start()
        for tokens, context in zip(row, contexts, strict=True):
            if tokens:
                batch = batch.add(tokens, context)
        p50[idx], bound[idx] = batch.p50_ms, batch.bound_ms
    return p50, bound


class MarginalCostCache:
    """Marginal costs of one estimator. Consecutive steps have nearly the same batch.

    Batch sizes are rounded up in steps of about 6 %, contexts in steps of about 12 %.
    """

    __slots__ = ("_costs", "_estimator")

    def __init__(self) -> None:
        self._estimator: StepTimeEstimator | None = None
        self._costs: dict[tuple[int, int, int], MarginalCosts] = {}

    def get(self, estimator: StepTimeEstimator, items: int, new: int, cached: int) -> MarginalCosts:
        """Marginal costs around ``items`` ≥ 1 items of ``new`` tokens over ``cached``."""
        if estimator is not self._estimator:
            self._estimator = estimator
            self._costs.clear()
        key = (_round_up(items, 4), new, _round_up(cached, 3))
        if key not in self._costs:
            self._costs[key] = mean_costs(estimator, *key)
        return self._costs[key]


def mean_costs(estimator: StepTimeEstimator, items: int, new: int, cached: int) -> MarginalCosts:
    """Marginal costs around ``items`` equal items of ``new`` tokens over ``cached``.

    Secants over half the batch, because a staircase (CUDA graph buckets) has no useful derivative. No context
    is longer than the batch's own: engines pad attention to the longest, so one that is longer would be
    charged for what it adds to all the others.
    """
    span, context = max(4, items // 2), max(64, cached)
    tokens = np.zeros((7, items + span + 1), dtype=np.int64)
    tokens[:6, :items] = new
    tokens[1, items:-1] = 1
    tokens[2, items] = span
    tokens[3, -1] = 1
    tokens[4, items] = 1
    tokens[5, -1] = span
    tokens[6, 0] = new
    contexts = np.repeat([context, 0, context], [items, span, 1])
    p50, bound = (prices.tolist() for prices in price_batches(estimator, tokens, contexts))
    base = p50[0]
    narrow, wide = (p50[1] - base) / span, p50[2] - base
    deep, deep_wide = p50[3] - p50[4], p50[5] - p50[2]
    # narrow = item + row, wide = item + span·row;
    # deep = context·(kv + pair), deep_wide = context·(kv + span·pair)
    row = max(0.0, (wide - narrow) / (span - 1))
    pair = max(0.0, (deep_wide - deep) / ((span - 1) * context))
    item = max(0.0, narrow - row)
    kv = max(0.0, deep / context - pair)
    used = items * (item + new * (row + pair * context) + kv * context)
    return MarginalCosts(max(0.0, base - used), item, row, pair, kv, bound[6], bound[0])


def _round_up(value: int, bits: int) -> int:
    """The next number with at most ``bits + 1`` significant binary digits."""
    shift = max(0, value.bit_length() - bits - 1)
    return -((-value) >> shift) << shift if shift else value


def slowdown(estimator: StepTimeEstimator, cached: Iterable[int]) -> float:
    """Undrafted step time of sessions with these cached tokens, over that of their mean alone."""
    contexts = list(cached)
    count = len(contexts)
    if count < 2:
        return 1.0
    together = estimator.start().add_all([1] * count, contexts).p50_ms
    alone = estimator.start().add(1, sum(contexts) // count).p50_ms
    return max(1.0, together / alone) if alone > 0 else 1.0


def load_level(slowdown: float, previous: int | None = None) -> int:
    """Load level of a slowdown.

    With ``previous``, the level changes only if the slowdown is 5 % past the bound, so that edges do not
    alternate between two rows of the plan.
    """
    level = sum(slowdown >= bound for bound in LOAD_BOUNDS)
    if previous is None or level == previous:
        return level
    if level > previous:
        above = LOAD_BOUNDS[previous:]
        return previous + sum(slowdown >= bound * (1 + _HYSTERESIS) for bound in above)
    return sum(slowdown >= bound * (1 - _HYSTERESIS) for bound in LOAD_BOUNDS[:previous])


def representative_slowdown(level: int) -> float:
    """The slowdown for which the plan computes a level: the geometric mean of its bounds."""
    if not 0 <= level < LOAD_LEVELS:
        raise ValueError(f"load level must be 0 … {LOAD_LEVELS - 1}, got {level}")
    edges = (1.0, *LOAD_BOUNDS, LOAD_BOUNDS[-1] ** 2 / LOAD_BOUNDS[-2])
    if level == 0:
        return 1.0
    return float((edges[level] * edges[level + 1]) ** 0.5)
