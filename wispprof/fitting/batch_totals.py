"""What an estimator sees of a batch: eight totals, each updated in O(1) when an item joins.

Every total grows or stays when work is added, so any function that is non-decreasing in each of them
never falls when work is added. All estimators of this package are functions of these totals.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import mul
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wispprof.types import BatchShape, VerifyItem

__all__ = [
    "EMPTY",
    "FloatArray",
    "Totals",
    "bucket_many",
    "decode_totals_of",
    "extend",
    "extend_all",
    "extend_in_turn",
    "extend_many",
    "totals_matrix",
    "totals_of",
]

FloatArray = NDArray[np.float64]


class Totals(NamedTuple):
    """Features of a batch shape; integers, exact however the batch was put together.

    ``new``: Σ new. ``cached``: Σ cached. ``cross``: Σ new·cached. ``square``: Σ new². From the last two
    follow the causal query-key pairs, ``cross + (square + new) / 2``, and WISP's new × total length,
    ``cross + square``. ``prefill``: new tokens that belong to prompt chunks.
    """

    items: int
    new: int
    cached: int
    cross: int
    square: int
    max_cached: int
    max_new: int
    prefill: int

    @property
    def attention_pairs(self) -> float:
        """Query-key pairs that causal attention touches."""
        return self.cross + (self.square + self.new) / 2


EMPTY = Totals(0, 0, 0, 0, 0, 0, 0, 0)


def extend(totals: Totals, new: int, cached: int, prefill: bool = False) -> Totals:
    """The totals with one more item."""
    items, fed, held, cross, square, deepest, widest, prompt = totals
    return Totals(
        items + 1,
        fed + new,
        held + cached,
        cross + new * cached,
        square + new * new,
        cached if cached > deepest else deepest,
        new if new > widest else widest,
        prompt + new if prefill else prompt,
    )


def extend_all(totals: Totals, new: Sequence[int], cached: Sequence[int]) -> Totals:
    """The totals with n decode items more: n calls of :func:`extend`."""
    items, fed, held, cross, square, deepest, widest, prompt = totals
    return Totals(
        items + len(new),
        fed + sum(new),
        held + sum(cached),
        cross + sum(map(mul, new, cached)),
        square + sum(map(mul, new, new)),
        max(deepest, max(cached, default=0)),
        max(widest, max(new, default=0)),
        prompt,
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


def totals_matrix(shapes: Sequence[BatchShape]) -> FloatArray:
    """Totals of many shapes, (n, 8), columns in the order of :class:`Totals`."""
    if not shapes:
        return np.zeros((0, len(EMPTY)))
    return np.array([totals_of(s.items) for s in shapes], dtype=np.float64)


def extend_many(totals: Totals, new: Any, cached: Any, prefill: Any = False) -> FloatArray:
    """Totals of the batch with each of n candidates added alone, (n, 8).

    ``new``, ``cached`` and ``prefill`` are arrays of shape (n,) or scalars that broadcast to it.
    """
    fed, held = np.asarray(new, dtype=np.float64), np.asarray(cached, dtype=np.float64)
    prompt = np.asarray(prefill, dtype=bool)
    # Column-major: everything that follows works column by column.
    table = np.empty((max(fed.size, held.size, prompt.size), len(EMPTY)), order="F")
    table[:, 0] = totals.items + 1
    table[:, 1] = totals.new + fed
    table[:, 2] = totals.cached + held
    table[:, 3] = totals.cross + fed * held
    table[:, 4] = totals.square + fed * fed
    table[:, 5] = np.maximum(totals.max_cached, held)
    table[:, 6] = np.maximum(totals.max_new, fed)
    table[:, 7] = totals.prefill + fed * prompt
    return table


def extend_in_turn(totals: Totals, new: Any, cached: Any) -> FloatArray:
    """Totals of the batch after each of n decode items that join one after another, (n, 8).

    ``new`` and ``cached`` are arrays of shape (n,)."""
    fed, held = np.asarray(new, dtype=np.float64), np.asarray(cached, dtype=np.float64)
    table = np.empty((len(fed), len(EMPTY)), order="F")
    table[:, 0] = np.arange(totals.items + 1, totals.items + 1 + len(fed))
    np.cumsum(fed, out=table[:, 1])
    np.cumsum(held, out=table[:, 2])
    np.cumsum(fed * held, out=table[:, 3])
    np.cumsum(fed * fed, out=table[:, 4])
    table[:, 1:5] += totals[1:5]
    np.maximum.accumulate(held, out=table[:, 5])
    np.maximum.accumulate(fed, out=table[:, 6])
    np.maximum(table[:, 5:7], totals[5:7], out=table[:, 5:7])
    table[:, 7] = totals.prefill
    return table


def bucket_many(new: FloatArray, buckets: FloatArray) -> FloatArray:
    """Tokens a step computes after padding: the smallest bucket that holds ``new``, else ``new``."""
    if len(buckets) == 0:
        return new
    place = np.searchsorted(buckets, new, side="left")
    inside = place < len(buckets)
    return np.where(inside, buckets[np.minimum(place, len(buckets) - 1)], new)
