"""Totals of a batch shape (:class:`~wispprof.types.BatchTotals`), item by item or over many candidates.

No total falls if work is added. A function that is non-decreasing in each of them is monotone in work.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import mul
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wispprof.types import BatchShape, BatchTotals, VerifyItem

FloatArray = NDArray[np.float64]
Totals = BatchTotals[int]
"""Totals of one batch."""
ArrayTotals = BatchTotals[Any]
"""Totals of n batches: every field is an array (n,)."""

EMPTY: Totals = BatchTotals(0, 0, 0, 0, 0, 0, 0, 0)


def extend(totals: Totals, new: int, cached: int, prefill: bool = False) -> Totals:
    """The totals with one more item."""
    items, sum_new, sum_cached, sum_new_cached, sum_new_sq, max_cached, max_new, prompt = totals
    return BatchTotals(
        items + 1,
        sum_new + new,
        sum_cached + cached,
        sum_new_cached + new * cached,
        sum_new_sq + new * new,
        cached if cached > max_cached else max_cached,
        new if new > max_new else max_new,
        prompt + new if prefill else prompt,
    )


def extend_all(totals: Totals, new: Sequence[int], cached: Sequence[int]) -> Totals:
    """The totals with n more decode items: n calls of :func:`extend`."""
    return BatchTotals(
        totals.items + len(new),
        totals.sum_new + sum(new),
        totals.sum_cached + sum(cached),
        totals.sum_new_cached + sum(map(mul, new, cached)),
        totals.sum_new_sq + sum(map(mul, new, new)),
        max(totals.max_cached, max(cached, default=0)),
        max(totals.max_new, max(new, default=0)),
        totals.prefill,
    )


def totals_of(items: Iterable[VerifyItem]) -> Totals:
    """The totals of whole items."""
    totals = EMPTY
    for new, cached, prefill in items:
        totals = extend(totals, new, cached, prefill)
    return totals


def decode_totals_of(shape: BatchShape) -> Totals:
    """The totals of a shape's items that are not prompt chunks."""
    return totals_of(i for i in shape.items if not i.prefill)


def extend_many(totals: Totals, new: Any, cached: Any, prefill: Any = False) -> ArrayTotals:
    """Totals of the batch with each of n candidates added alone.

    ``new``, ``cached`` and ``prefill`` are arrays (n,) or scalars that broadcast to it.
    """
    new, cached = np.asarray(new, dtype=np.float64), np.asarray(cached, dtype=np.float64)
    prompt = np.asarray(prefill, dtype=bool)
    grown = BatchTotals.empty(max(new.size, cached.size, prompt.size))
    grown.items.fill(totals.items + 1)
    np.add(new, totals.sum_new, out=grown.sum_new)
    np.add(cached, totals.sum_cached, out=grown.sum_cached)
    np.add(new * cached, totals.sum_new_cached, out=grown.sum_new_cached)
    np.add(new * new, totals.sum_new_sq, out=grown.sum_new_sq)
    np.maximum(cached, totals.max_cached, out=grown.max_cached)
    np.maximum(new, totals.max_new, out=grown.max_new)
    np.add(new * prompt, totals.prefill, out=grown.prefill)
    return grown


def extend_in_turn(totals: Totals, new: Any, cached: Any) -> ArrayTotals:
    """Totals of the batch after each of n decode items, arrays (n,), that join one after another."""
    new, cached = np.asarray(new, dtype=np.float64), np.asarray(cached, dtype=np.float64)
    return BatchTotals(
        np.arange(totals.items + 1, totals.items + 1 + len(new), dtype=np.float64),
        np.cumsum(new) + totals.sum_new,
        np.cumsum(cached) + totals.sum_cached,
        np.cumsum(new * cached) + totals.sum_new_cached,
        np.cumsum(new * new) + totals.sum_new_sq,
        np.maximum(np.maximum.accumulate(cached), totals.max_cached),
        np.maximum(np.maximum.accumulate(new), totals.max_new),
        np.full(len(new), float(totals.prefill)),
    )


def select(totals: ArrayTotals, index: np.ndarray) -> ArrayTotals:
    """The batches at these positions, or under this mask."""
    return BatchTotals(*(column[index] for column in totals))


def clipped(totals: ArrayTotals, high: Totals) -> ArrayTotals:
    """Totals cut to ``high``, field by field."""
    return BatchTotals(*map(np.minimum, totals, high))


def upper_corner(totals: ArrayTotals) -> Totals:
    """The largest value of each total."""
    return BatchTotals(*(int(column.max()) for column in totals))
