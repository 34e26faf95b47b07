"""What one more item costs, as plain numbers, so that a thousand candidates can be ranked quickly.

An estimator answers exactly, one addition at a time. Ranking needs no exactness: around the batch at
hand its cost is close to ``fixed + Σ (item + new·row + new·cached·pair + cached·kv)``. Those slopes are
read off the estimator itself by a handful of additions, so any estimator will do. What is finally
chosen is always priced by the estimator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wispprof.types import BatchTotals, StepTimeEstimator

__all__ = [
    "MarginalCostCache",
    "MarginalCosts",
    "expected_tokens",
    "mean_costs",
    "price_batches",
]

FloatArray = NDArray[np.float64]


class MarginalCosts(NamedTuple):
    """Slopes of the step time (p50, ms) around a batch of equal items.

    ``fixed_ms``: what remains of the batch's time without its items. ``alone_bound_ms``: bound of a
    step with one of the items; ``all_bound_ms``: of the whole batch.
    """

    fixed_ms: float
    item_ms: float
    row_ms: float
    pair_ms: float
    kv_ms: float
    alone_bound_ms: float
    all_bound_ms: float

    def over(self, cached: NDArray[np.int64]) -> tuple[FloatArray, FloatArray]:
        """What items over ``cached`` (n,) add to a step: (for the item and its cache, per new token)."""
        deep = cached.astype(np.float64)
        return self.item_ms + self.kv_ms * deep, self.row_ms + self.pair_ms * deep


def expected_tokens(acceptance_probs: Sequence[float]) -> float:
    """Tokens a session is expected to commit with this tail: 1 + Σ of cumulative acceptance probability."""
    total = alive = 1.0
    for acceptance_prob in acceptance_probs:
        alive *= acceptance_prob
        total += alive
    return total


def price_batches(
    estimator: StepTimeEstimator, new: NDArray[np.int64], cached: NDArray[np.int64]
) -> tuple[FloatArray, FloatArray]:
    """(p50, bound) of m decode batches over the same n sessions.

    ``new`` (m, n): tokens each session feeds in each batch, 0 where it stays out; ``cached`` (n,).
    """
    inside = new > 0
    held = inside * cached
    totals = BatchTotals(
        items=inside.sum(axis=1),
        sum_new=new.sum(axis=1),
        sum_cached=held.sum(axis=1),
        sum_new_cached=new @ cached,
        sum_new_sq=(new * new).sum(axis=1),
        max_cached=held.max(axis=1, initial=0),
        max_new=new.max(axis=1, initial=0),
        prefill=np.zeros(len(new), dtype=np.int64),
    )
    priced = estimator.predict_totals(totals)
    if priced is not None:
        return priced
    p50, bound = np.empty(len(new)), np.empty(len(new))
    depths = cached.tolist()
    for place, row in enumerate(new.tolist()):
        batch = estimator.start()
        for tokens, depth in zip(row, depths, strict=True):
            if tokens:
                batch = batch.add(tokens, depth)
        p50[place], bound[place] = batch.p50_ms, batch.bound_ms
    return p50, bound


class MarginalCostCache:
    """Marginal costs of one estimator, remembered: neighbouring steps have nearly the same batch.

    Batch sizes are rounded up to steps of about 6 %, contexts of about 12 %.
    """

    __slots__ = ("_estimator", "_known")

    def __init__(self) -> None:
        self._estimator: StepTimeEstimator | None = None
        self._known: dict[tuple[int, int, int], MarginalCosts] = {}

    def at(self, estimator: StepTimeEstimator, items: int, new: int, cached: int) -> MarginalCosts:
        """Slopes around ``items`` ≥ 1 items of ``new`` tokens over ``cached``."""
        if estimator is not self._estimator:
            self._estimator = estimator
            self._known.clear()
        key = (_rounded(items, 4), new, _rounded(cached, 3))
        if key not in self._known:
            self._known[key] = mean_costs(estimator, *key)
        return self._known[key]


def mean_costs(estimator: StepTimeEstimator, items: int, new: int, cached: int) -> MarginalCosts:
    """Slopes around ``items`` equal items of ``new`` tokens over ``cached``.

    Secants over half the batch rather than derivatives: a staircase (graph buckets) has no useful
    derivative.
    """
    span, far = max(4, items // 2), max(256, 2 * cached)
    batch = (items, new, cached)
    p50, bound = _price(
        estimator,
        (
            (batch,),
            (batch, (span, 1, 0)),
            (batch, (1, span, 0)),
            (batch, (1, 1, far)),
            (batch, (1, 1, 0)),
            (batch, (1, span, far)),
            ((1, new, cached),),
        ),
    )
    base = p50[0]
    narrow, wide = (p50[1] - base) / span, p50[2] - base
    deep, deep_wide = p50[3] - p50[4], p50[5] - p50[2]
    # narrow = item + row, wide = item + span·row; deep = far·(kv + pair), deep_wide = far·(kv + span·pair)
    row = max(0.0, (wide - narrow) / (span - 1))
    pair = max(0.0, (deep_wide - deep) / ((span - 1) * far))
    item = max(0.0, narrow - row)
    kv = max(0.0, deep / far - pair)
    used = items * (item + new * (row + pair * cached) + kv * cached)
    return MarginalCosts(max(0.0, base - used), item, row, pair, kv, bound[6], bound[0])


_Equal = tuple[int, int, int]
"""So many items of so many new tokens over so many cached ones."""


def _price(
    estimator: StepTimeEstimator, batches: Sequence[tuple[_Equal, ...]]
) -> tuple[list[float], list[float]]:
    """(p50, bound) of batches given as groups of equal decode items."""
    totals = [
        BatchTotals(
            items=sum(n for n, _, _ in groups),
            sum_new=sum(n * new for n, new, _ in groups),
            sum_cached=sum(n * held for n, _, held in groups),
            sum_new_cached=sum(n * new * held for n, new, held in groups),
            sum_new_sq=sum(n * new * new for n, new, _ in groups),
            max_cached=max(held for _, _, held in groups),
            max_new=max(new for _, new, _ in groups),
            prefill=0,
        )
        for groups in batches
    ]
    at_once = estimator.predict_totals(BatchTotals.stack(totals))
    if at_once is not None:
        return at_once[0].tolist(), at_once[1].tolist()
    priced = []
    for groups in batches:
        batch = estimator.start()
        for count, new, cached in groups:
            for _ in range(count):
                batch = batch.add(new, cached)
        priced.append((batch.p50_ms, batch.bound_ms))
    return [p50 for p50, _ in priced], [bound for _, bound in priced]


def _rounded(value: int, bits: int) -> int:
    """Up to the next number with ``bits + 1`` significant binary digits."""
    shift = max(0, value.bit_length() - bits - 1)
    return -((-value) >> shift) << shift if shift else value
