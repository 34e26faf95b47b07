"""The step's arithmetic, vectorised: what drafts are worth, and in which order they earn their time.

A step maximises a ratio, expected (weighted) tokens over milliseconds. Where the cost is a sum over members
plus a constant, the best tails are those at which the ratio stops rising when drafts join in falling order of
worth per ms: the fixed point of Dinkelbach's iteration, found by one sort. A session's own drafts never swap
places in that order, for survival falls from draft to draft and their rows cost the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from wispprof.policies.api import SessionView, column
from wispprof.policies.cost_model import MarginalCostCache, MarginalCosts
from wispprof.types import BatchTotals, StepTimeEstimator

__all__ = [
    "BatchArrays",
    "Columns",
    "DraftRanking",
    "rate_of",
    "solve",
    "typical_costs",
    "undrafted_totals",
]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

_TAIL, _CACHED = column("acceptance_probs"), column("cached")
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

    def marginal_costs(
        self, known: MarginalCostCache, estimator: StepTimeEstimator, max_items: int
    ) -> MarginalCosts:
        """Marginal costs around a batch of these sessions, represented by their mean."""
        count = len(self.tails)
        drafts, cached = int(self.lengths.sum()) // count, int(self.cached.sum()) // count
        return known.at(estimator, min(count, max_items), 1 + drafts, cached)

    def chances(self) -> tuple[BoolArray, FloatArray]:
        """(n, longest tail): where a draft is held, and the chance that it and all before it are accepted;
        what follows a tail's last draft counts as certain."""
        inside = np.arange(int(self.lengths.max())) < self.lengths[:, None]
        alive = np.ones(inside.shape)
        held = int(self.lengths.sum())
        alive[inside] = np.fromiter(chain.from_iterable(self.tails), np.float64, held)
        np.multiply.accumulate(alive, axis=1, out=alive)
        return inside, alive

    def expected(self) -> FloatArray:
        """Expected tokens (n,) of each session with its whole tail."""
        won = np.ones(len(self.tails))
        if self.lengths.any():
            inside, alive = self.chances()
            won += np.add.accumulate(alive * inside, axis=1)[:, -1]
        return won


class BatchArrays(NamedTuple):
    """Decoding sessions as columns: n sessions that hold N drafts in all, session by session.

    ``owner`` (N,): whose draft it is, ``depth`` (N,): its place in that acceptance_probs, ``alive`` (N,): the chance
    that it and all before it are accepted. ``ends`` (n,): that chance for a whole acceptance_probs. ``lone_ms`` (n,):
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
    def of(
        cls, sessions: Sequence[SessionView], costs: MarginalCosts, weight: FloatArray
    ) -> BatchArrays:
        return cls.build(Columns.of(sessions), costs, weight)

    @classmethod
    def build(cls, columns: Columns, costs: MarginalCosts, weight: FloatArray) -> BatchArrays:
        cached, lengths = columns.cached, columns.lengths
        count = len(lengths)
        held = int(lengths.sum())
        ends = np.ones(count)
        if held:
            inside, chances = columns.chances()
            ends = chances[:, -1]
            owner = np.arange(count).repeat(lengths)
            depth = np.arange(held) - (lengths.cumsum() - lengths)[owner]
            alive = chances[inside]
        else:
            owner = depth = np.empty(0, np.int64)
            alive = np.empty(0)
        read, row = costs.over(cached)
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


class DraftRanking(NamedTuple):
    """Drafts of a step's members in the order in which they earn their time; any first j of them are the
    leading parts of tails.

    ``order``, ``owner``, ``depth`` (M,): which draft of the book it is, and what the book says of it;
    ``worth`` and ``spent_ms`` (M + 1,): weighted expected tokens and linear time of the step with the first
    0 … M of them.
    """

    order: IntArray
    owner: IntArray
    depth: IntArray
    worth: FloatArray
    spent_ms: FloatArray

    @classmethod
    def of(cls, arrays: BatchArrays, members: BoolArray, most: int | None = None) -> Self:
        """``members`` (n,): who takes part. ``most``: longest ladder of use."""
        owner, alive = arrays.owner, arrays.alive
        density = alive * arrays.weight[owner]
        density /= np.maximum(arrays.row_ms, _LEAST_MS)[owner]
        order = np.negative(density, out=density).argsort(kind="stable")
        some = members[owner] & (alive > 0.0)
        return cls._climb(arrays, members, order[some[order]][:most])

    def among(self, arrays: BatchArrays, members: BoolArray, most: int | None = None) -> Self:
        """The ladder of some of its members only: who leaves it changes nobody's place."""
        return self._climb(arrays, members, self.order[members[self.owner]][:most])

    @classmethod
    def _climb(cls, arrays: BatchArrays, members: BoolArray, order: IntArray) -> Self:
        owner = arrays.owner[order]
        worth, spent = np.empty(len(order) + 1), np.empty(len(order) + 1)
        worth[0] = arrays.weight @ members
        spent[0] = arrays.fixed_ms + arrays.lone_ms @ members
        np.multiply(arrays.alive[order], arrays.weight[owner], out=worth[1:])
        spent[1:] = arrays.row_ms[owner]
        np.add.accumulate(worth, out=worth)
        np.add.accumulate(spent, out=spent)
        return cls(order, owner, arrays.depth[order], worth, spent)

    @property
    def best(self) -> int:
        """How many drafts make the highest rate by the linear costs; the fewest where rates are equal."""
        return int((self.worth / np.maximum(self.spent_ms, 1e-9)).argmax())

    def keep(self, taken: int, count: int) -> IntArray:
        """Drafts (n,) that each of ``count`` sessions keeps when the first ``taken`` are."""
        kept: IntArray = np.bincount(self.owner[:taken], minlength=count)
        return kept

    def totals(self, taken: IntArray, cached: IntArray, members: BoolArray) -> BatchTotals[Any]:
        """Totals (m,) of the steps with the first ``taken`` (m,) drafts, each ≤ M, for the same members."""
        inside = cached * members
        items, held = int(np.count_nonzero(members)), int(inside.sum())
        # What the step without drafts has, and what each draft adds to it; integers, exact in any order.
        new_cached, new_sq = np.empty(len(self.worth)), np.empty(len(self.worth))
        max_new = np.empty(len(self.worth))
        new_cached[0], new_sq[0], max_new[0] = held, items, 1.0
        new_cached[1:] = inside[self.owner]
        np.add(self.depth, 2, out=max_new[1:])
        new_sq[1:] = 2.0 * max_new[1:] - 1.0
        totals = BatchTotals.empty(len(taken))
        totals.items[:] = items
        np.add(taken, items, out=totals.sum_new)
        totals.sum_cached[:] = held
        totals.sum_new_cached[:] = np.add.accumulate(new_cached)[taken]
        totals.sum_new_sq[:] = np.add.accumulate(new_sq)[taken]
        totals.max_cached[:] = inside.max()
        totals.max_new[:] = np.maximum.accumulate(max_new)[taken]
        totals.prefill[:] = 0.0
        return totals


def typical_costs(
    sessions: Sequence[SessionView],
    known: MarginalCostCache,
    estimator: StepTimeEstimator,
    max_items: int,
) -> MarginalCosts:
    """:meth:`Columns.marginal_costs` of a few sessions of which nothing else is asked."""
    count = len(sessions)
    drafts, cached = sum(map(len, map(_TAIL, sessions))), sum(map(_CACHED, sessions))
    return known.at(estimator, min(count, max_items), 1 + drafts // count, cached // count)


def undrafted_totals(cached: IntArray, members: BoolArray) -> BatchTotals[int]:
    """Totals of the step in which these members, at least one, advance without drafts."""
    inside = cached[members]
    items, held = len(inside), int(inside.sum())
    return BatchTotals(items, items, held, held, items, int(inside.max()), 1, 0)


def rate_of(arrays: BatchArrays, members: BoolArray, keep: IntArray) -> float:
    """Weighted tokens per ms of a choice, by the linear costs; 0 without members."""
    spent = arrays.fixed_ms + float((arrays.lone_ms + keep * arrays.row_ms) @ members)
    won = float((arrays.gains(keep) * arrays.weight) @ members)
    return won / spent if spent > 0 and won > 0 else 0.0


def solve(arrays: BatchArrays, members: BoolArray) -> tuple[float, IntArray]:
    """The best tails of these members by the linear costs: (going rate, drafts each keeps)."""
    ranking = DraftRanking.of(arrays, members)
    taken = ranking.best
    rate = float(ranking.worth[taken] / max(ranking.spent_ms[taken], 1e-9))
    return rate, ranking.keep(taken, len(arrays.cached))
