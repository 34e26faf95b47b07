"""The step's arithmetic, vectorised: what drafts are worth, and in which order they earn their time.

A step maximises a ratio, expected (weighted) tokens over milliseconds. Where the cost is a sum over members
plus a constant, the best tails are those at which the ratio stops rising when drafts join in falling order of
worth per ms: the fixed point of Dinkelbach's iteration, found by one sort. A session's own drafts never swap
places in that order, for survival falls from draft to draft and their rows cost the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from wispprof.core import StepEstimator
from wispprof.policies.api import SessionView
from wispprof.policies.marginal import MarginalCosts, Slopes

__all__ = ["Book", "Columns", "Ladder", "rate_of", "solve"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

_TAIL, _CACHED = attrgetter("tail"), attrgetter("cached")
_LEAST_MS = 1e-12
"""A row that costs nothing is worth infinitely much per ms; this keeps the order among such rows."""


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

    def take(self, places: IntArray) -> Columns:
        """The columns of some sessions only."""
        tails = [self.tails[place] for place in places.tolist()]
        return Columns(tails, self.cached[places], self.lengths[places])

    def slopes(self, known: Slopes, estimator: StepEstimator, max_items: int) -> MarginalCosts:
        """Marginal costs around a batch of these sessions, represented by their mean."""
        count = len(self.tails)
        drafts, cached = int(self.lengths.sum()) // count, int(self.cached.sum()) // count
        return known.at(estimator, min(count, max_items), 1 + drafts, cached)


@dataclass(frozen=True, slots=True)
class Book:
    """Decoding sessions as columns: n sessions that hold N drafts in all, session by session.

    ``owner`` (N,): whose draft it is, ``depth`` (N,): its place in that tail, ``alive`` (N,): the chance
    that it and all before it are accepted. ``ends`` (n,): that chance for a whole tail. ``lone_ms`` (n,):
    what advancing without drafts adds to a step, ``read_ms`` of it for the item and its cache; ``row_ms``
    (n,): one more draft. ``weight`` (n,): worth of a token of this session.
    """

    cached: IntArray
    lengths: IntArray
    owner: IntArray
    depth: IntArray
    alive: FloatArray
    ends: FloatArray
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
        held = int(lengths.sum())
        ends = np.ones(count)
        if held:
            places = np.arange(int(lengths.max()))
            inside = places < lengths[:, None]
            chances = np.ones(inside.shape)
            chances[inside] = np.fromiter(chain.from_iterable(tails), np.float64, held)
            np.multiply.accumulate(chances, axis=1, out=chances)
            ends = chances[:, -1]  # what follows a tail's last draft counts as certain
            owner, depth = np.nonzero(inside)
            alive = chances[inside]
        else:
            owner = depth = np.empty(0, np.int64)
            alive = np.empty(0)
        deep = cached.astype(np.float64)
        row: FloatArray = costs.row_ms + costs.pair_ms * deep
        read: FloatArray = costs.item_ms + costs.kv_ms * deep
        return cls(
            cached,
            lengths,
            owner,
            depth,
            alive,
            ends,
            read + row,
            read,
            row,
            weight,
            costs.fixed_ms,
        )

    def gains(self, keep: IntArray) -> FloatArray:
        """Expected tokens (n,) of each session with the first ``keep`` (n,) of its drafts."""
        won = np.ones(len(keep))
        if len(self.alive):
            held = self.alive * (self.depth < keep[self.owner])
            won += np.bincount(self.owner, held, len(keep))
        return won


@dataclass(frozen=True, slots=True)
class Ladder:
    """Drafts of a step's members in the order in which they earn their time; any first j of them are the
    leading parts of tails.

    ``owner``, ``depth`` (M,) as in the book; ``worth`` and ``spent_ms`` (M + 1,): weighted expected tokens
    and linear time of the step with the first 0 … M of them.
    """

    owner: IntArray
    depth: IntArray
    worth: FloatArray
    spent_ms: FloatArray

    @classmethod
    def of(cls, book: Book, members: BoolArray, most: int | None = None) -> Self:
        """``members`` (n,): who takes part. ``most``: longest ladder of use."""
        owner, alive = book.owner, book.alive
        value = alive * book.weight[owner]
        density = value / np.maximum(book.row_ms, _LEAST_MS)[owner]
        some = members[owner] & (alive > 0.0)
        order = np.argsort(-density, kind="stable")
        order = order[some[order]][:most]
        worth, spent = np.empty(len(order) + 1), np.empty(len(order) + 1)
        worth[0] = book.weight @ members
        spent[0] = book.fixed_ms + book.lone_ms @ members
        worth[1:], spent[1:] = value[order], book.row_ms[owner[order]]
        np.add.accumulate(worth, out=worth)
        np.add.accumulate(spent, out=spent)
        return cls(owner[order], book.depth[order], worth, spent)

    @property
    def best(self) -> int:
        """How many drafts make the highest rate by the linear costs; the fewest where rates are equal."""
        return int((self.worth / np.maximum(self.spent_ms, 1e-9)).argmax())

    def keep(self, taken: int, count: int) -> IntArray:
        """Drafts (n,) that each of ``count`` sessions keeps when the first ``taken`` are."""
        kept: IntArray = np.bincount(self.owner[:taken], minlength=count)
        return kept

    def totals(self, taken: IntArray, cached: IntArray, members: BoolArray) -> FloatArray:
        """Rows (m, 8) as :class:`~wispprof.policies.marginal.TotalsEstimator` takes them, of the steps with
        the first ``taken`` (m,) drafts, each ≤ M, for the same members."""
        inside = cached * members
        items, held = int(np.count_nonzero(members)), int(inside.sum())
        cross, square = np.zeros(len(self.worth)), np.zeros(len(self.worth))
        widest = np.ones(len(self.worth))
        cross[1:], square[1:] = inside[self.owner], 2 * self.depth + 3
        widest[1:] = self.depth + 2
        rows = np.empty((len(taken), 8))
        rows[:, 0] = items
        rows[:, 1] = items + taken
        rows[:, 2] = held
        rows[:, 3] = held + np.add.accumulate(cross)[taken]
        rows[:, 4] = items + np.add.accumulate(square)[taken]
        rows[:, 5] = inside.max()
        rows[:, 6] = np.maximum.accumulate(widest)[taken]
        rows[:, 7] = 0.0
        return rows


def rate_of(book: Book, members: BoolArray, keep: IntArray) -> float:
    """Weighted tokens per ms of a choice, by the linear costs; 0 without members."""
    spent = book.fixed_ms + float((book.lone_ms + keep * book.row_ms) @ members)
    won = float((book.gains(keep) * book.weight) @ members)
    return won / spent if spent > 0 and won > 0 else 0.0


def solve(book: Book, members: BoolArray) -> tuple[float, IntArray]:
    """The best tails of these members by the linear costs: (going rate, drafts each keeps)."""
    ladder = Ladder.of(book, members)
    taken = ladder.best
    rate = float(ladder.worth[taken] / max(ladder.spent_ms[taken], 1e-9))
    return rate, ladder.keep(taken, len(book.cached))
