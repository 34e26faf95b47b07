"""The step's arithmetic, vectorised: what tails are worth, and how much of each to verify.

The step maximises a ratio, expected (weighted) tokens over milliseconds. Dinkelbach's iteration solves
it exactly where the cost is a sum over members plus a constant: at a going rate λ each session decides
for itself (keep draft j iff its worth exceeds λ × the time of its row), the rate of that choice is
the next λ, and λ rises to its fixed point in a few rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wispprof.core import StepEstimator
from wispprof.policies.api import SessionView
from wispprof.policies.marginal import MarginalCosts, Slopes

__all__ = ["Book", "Columns", "keep_at", "rate_of", "solve"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

MAX_TAIL = 32
_ROUNDS = 12
_SETTLED = 1e-6


_TAIL, _CACHED = attrgetter("tail"), attrgetter("cached")


class Columns(NamedTuple):
    """What a book reads of its sessions."""

    tails: list[tuple[float, ...]]
    cached: IntArray
    lengths: IntArray

    @classmethod
    def of(cls, sessions: Sequence[SessionView]) -> Columns:
        tails = list(map(_TAIL, sessions))
        count = len(tails)
        return cls(
            tails,
            np.fromiter(map(_CACHED, sessions), np.int64, count),
            np.fromiter(map(len, tails), np.int64, count),
        )

    def slopes(self, known: Slopes, estimator: StepEstimator, max_items: int) -> MarginalCosts:
        """Marginal costs around a batch of these sessions, represented by their mean."""
        count = len(self.tails)
        drafts, cached = int(self.lengths.sum()) // count, int(self.cached.sum()) // count
        return known.at(estimator, min(count, max_items), 1 + drafts, cached)


@dataclass(frozen=True, slots=True)
class Book:
    """Decoding sessions as columns. n sessions, tails padded to K.

    ``alive`` (n, K): cumulative survival, 0 past the tail. ``gains`` (n, K+1): expected tokens with
    the first t drafts, ``gains[:, 0] == 1``. ``lone_ms`` (n,): what advancing without drafts adds to
    a step, ``read_ms`` of it for the item and its cache; ``row_ms`` (n,): one more draft.
    ``weight`` (n,): worth of a token of this session.
    """

    cached: IntArray
    lengths: IntArray
    alive: FloatArray
    gains: FloatArray
    lone_ms: FloatArray
    read_ms: FloatArray
    row_ms: FloatArray
    weight: FloatArray
    fixed_ms: float

    @classmethod
    def of(cls, sessions: Sequence[SessionView], costs: MarginalCosts, weight: FloatArray) -> Book:
        return cls.build(Columns.of(sessions), costs, weight)

    @classmethod
    def build(cls, columns: Columns, costs: MarginalCosts, weight: FloatArray) -> Book:
        tails, cached, lengths = columns
        count = len(tails)
        widest = int(lengths.max()) if count else 0
        alive = np.zeros((count, widest))
        if widest:
            inside = np.arange(widest) < lengths[:, None]
            alive[inside] = np.fromiter(chain.from_iterable(tails), np.float64, int(lengths.sum()))
            np.cumprod(alive, axis=1, out=alive)
            alive = alive[:, :MAX_TAIL]
        gains = np.ones((count, alive.shape[1] + 1))
        np.cumsum(alive, axis=1, out=gains[:, 1:])
        gains[:, 1:] += 1.0
        row: FloatArray = costs.row_ms + costs.pair_ms * cached.astype(np.float64)
        read: FloatArray = costs.item_ms + costs.kv_ms * cached.astype(np.float64)
        return cls(
            cached,
            np.minimum(lengths, MAX_TAIL),
            alive,
            gains,
            read + row,
            read,
            row,
            weight,
            costs.fixed_ms,
        )


def keep_at(book: Book, rate: float) -> IntArray:
    """Drafts each session keeps when a millisecond is worth ``rate``, (n,)."""
    if not book.alive.shape[1]:
        return book.lengths
    worth = book.alive * book.weight[:, None] >= (rate * book.row_ms)[:, None]
    kept: IntArray = (worth & (book.alive > 0)).sum(axis=1)
    return kept


def rate_of(book: Book, members: BoolArray, keep: IntArray) -> float:
    """Weighted tokens per ms of a choice, by the linear costs; 0 without members."""
    gains = book.gains[np.arange(len(keep)), keep] * book.weight
    spent = book.fixed_ms + float(((book.lone_ms + keep * book.row_ms) * members).sum())
    won = float((gains * members).sum())
    return won / spent if spent > 0 and won > 0 else 0.0


def solve(book: Book, members: BoolArray) -> tuple[float, IntArray]:
    """Dinkelbach's fixed point over tails: (going rate, drafts each keeps)."""
    keep = np.zeros_like(book.lengths)
    rate = rate_of(book, members, keep)
    for _ in range(_ROUNDS):
        keep = keep_at(book, rate)
        better = rate_of(book, members, keep)
        if better <= rate * (1 + _SETTLED):
            break
        rate = better
    return rate, keep
