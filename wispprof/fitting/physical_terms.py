"""The physical part: what a step must cost, as nonnegative terms of the batch totals.

A step reads the weights (constant), multiplies every padded token with them (a convex-or-not curve in
tokens after graph padding), reads the cache (a curve in cached tokens), touches query-key pairs, and
waits for its deepest item. Only what emits goes through the output head, so a prompt's tokens cost less
than a draft's. Items whose contexts differ are attended to in groups: how many, no total says, but the more
items there are and the deeper the deepest, the more there can be, and √(items · deepest) grows as they do in
what was measured. Prompt chunks and decode items in one step are groups apart, which costs up to the smaller
part's tokens. Every term grows with work and every weight is ≥ 0, so the sum never falls when work is added.

Where a batch is cut to the measured box, the tokens that emit are cut by themselves: as the difference of
two totals, of which one is cut and the other not, they could fall. A term in two totals may be cut in each:
more of one makes the other dearer, so what lies beyond the box grows with both.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from math import sqrt
from typing import Any, Self

import numpy as np

from wispprof.fitting.batch_totals import FloatArray, Totals, bucket_many
from wispprof.fitting.observations import Observations
from wispprof.fitting.step_time_models import fit_nonnegative

__all__ = ["PhysicalTerms", "PiecewiseCurve", "emitting", "emitting_many", "graph_buckets"]

NEW_KNOTS = 6
CACHED_KNOTS = 3
TERMS = 8
EARLIER_TERMS = 6
"""Estimators saved before there were the last two have weights without them."""
BUCKET_SHARE = 0.8
"""Share of rows whose padding must follow the buckets before they are believed."""


def emitting(totals: Totals) -> int:
    """Tokens that go through the output head: all but those of prompt chunks."""
    return totals[1] - totals[7]


def emitting_many(totals: FloatArray) -> FloatArray:
    """:func:`emitting` over rows (n, 8); returns (n,)."""
    return np.asarray(totals[:, 1] - totals[:, 7])


class PiecewiseCurve:
    """A non-decreasing piecewise linear function through the origin, by its slope between knots."""

    def __init__(self, knots: Sequence[float], slopes: Sequence[float]) -> None:
        if len(slopes) != len(knots) + 1 or min(slopes) < 0:
            raise ValueError("a curve has one slope ≥ 0 more than knots")
        self.knots = [float(k) for k in knots]
        self.slopes = [float(s) for s in slopes]
        edges = [0.0, *self.knots]
        # Value at the left end of each segment.
        self._left = list(edges)
        self._base = [0.0]
        for index in range(len(self.knots)):
            rise = self.slopes[index] * (edges[index + 1] - edges[index])
            self._base.append(self._base[-1] + rise)
        # The same as arrays: making them anew for every batch costs more than reading them.
        self._arrays = tuple(
            np.array(v, dtype=np.float64) for v in (self.knots, self.slopes, self._base, self._left)
        )

    def __call__(self, x: float) -> float:
        place = bisect_right(self.knots, x)
        return self._base[place] + self.slopes[place] * (x - self._left[place])

    def many(self, x: FloatArray) -> FloatArray:
        knots, slope, base, left = self._arrays
        place = knots.searchsorted(x, side="right")
        result: FloatArray = base[place] + slope[place] * (x - left[place])
        return result

    @staticmethod
    def columns(x: FloatArray, knots: Sequence[float]) -> FloatArray:
        """The part of ``x`` that lies in each segment, (n, knots + 1): what the slopes multiply."""
        edges = np.array([0.0, *knots, np.inf])
        part: FloatArray = np.clip(x[:, None], edges[:-1], edges[1:]) - edges[:-1]
        return part


def spread_knots(x: FloatArray, count: int) -> list[float]:
    """Up to ``count`` knots at quantiles of the distinct values, none at the ends."""
    distinct = np.unique(x[x > 0])
    if len(distinct) < 4:
        return []
    wanted = np.quantile(distinct, np.linspace(0, 1, min(count, len(distinct) - 2) + 2)[1:-1])
    return [float(k) for k in np.unique(wanted)]


def lone_token_knots(tokens: FloatArray) -> list[float]:
    """Bends at 1 and 2 where steps of a single token were measured.

    One token is a matrix-vector product, two are a matrix product: on CPUs the second token can cost
    as much as the first.
    """
    return [1.0, 2.0] if (tokens == 1).any() and (tokens == 2).any() else []


def graph_buckets(data: Observations) -> FloatArray:
    """Token counts that steps are padded to, (b,), or empty where steps are not padded."""
    known = data.padded > 0
    if not known.any():
        return np.zeros(0)
    buckets = np.unique(data.padded[known])
    follows = bucket_many(data.totals[known, 1], buckets) == data.padded[known]
    padded = data.padded[known] > data.totals[known, 1]
    believable = follows.mean() >= BUCKET_SHARE and padded.any()
    return buckets if believable else np.zeros(0)


class PhysicalTerms:
    """``buckets_`` (b,), ``new_`` and ``cached_`` curves, ``weights_`` (8,) of the other terms: a step, an
    item, Σ new·cached, Σ new², the deepest item, a token that emits, √(items · deepest), and the smaller of
    a prompt's tokens and those that emit."""

    kind = "physical"
    monotone = True

    def __init__(self, new_knots: int = NEW_KNOTS, cached_knots: int = CACHED_KNOTS) -> None:
        self.new_knots = new_knots
        self.cached_knots = cached_knots
        self.buckets_: list[float] = []
        self.new_ = PiecewiseCurve([], [0.0])
        self.cached_ = PiecewiseCurve([], [0.0])
        self.weights_: tuple[float, ...] = (0.0,) * TERMS

    def fit(self, data: Observations) -> Self:
        buckets = graph_buckets(data)
        self.buckets_ = [float(b) for b in buckets]
        tokens = bucket_many(data.totals[:, 1], buckets)
        new_knots = sorted({*lone_token_knots(tokens), *spread_knots(tokens, self.new_knots)})
        cached_knots = spread_knots(data.totals[:, 2], self.cached_knots)
        items, _, cached, cross, square, deep, _, prefill = data.totals.T
        emit = emitting_many(data.totals)
        one, groups, mixed = np.ones(len(data)), np.sqrt(items * deep), np.minimum(prefill, emit)
        design = np.concatenate(
            [
                PiecewiseCurve.columns(tokens, new_knots),
                PiecewiseCurve.columns(cached, cached_knots),
                np.stack([one, items, cross, square, deep, emit, groups, mixed], axis=1),
            ],
            axis=1,
        )
        weights = fit_nonnegative(design, data.median_ms).tolist()
        first, second = len(new_knots) + 1, len(cached_knots) + 1
        self.new_ = PiecewiseCurve(new_knots, weights[:first])
        self.cached_ = PiecewiseCurve(cached_knots, weights[first : first + second])
        self.weights_ = tuple(weights[first + second :])
        return self

    def again(self) -> Self:
        return type(self)(self.new_knots, self.cached_knots)

    def tokens(self, new: float) -> float:
        """Tokens computed for ``new`` fed ones, after graph padding."""
        buckets = self.buckets_
        place = bisect_left(buckets, new)
        return buckets[place] if place < len(buckets) else new

    def p50(self, totals: Totals, emit: float) -> float:
        """Milliseconds of a batch of which ``emit`` tokens emit (see :func:`emitting`)."""
        items, new, cached, cross, square, deep, _, prefill = totals
        w0, w1, w2, w3, w4, w5, w6, w7 = self.weights_
        return (
            self.new_(self.tokens(new))
            + self.cached_(cached)
            + w0
            + w1 * items
            + w2 * cross
            + w3 * square
            + w4 * deep
            + w5 * emit
            + w6 * sqrt(items * deep)
            + w7 * min(prefill, emit)
        )

    def p50_many(self, totals: FloatArray, emit: FloatArray) -> FloatArray:
        """:meth:`p50` over rows (n, 8) and (n,)."""
        tokens = bucket_many(totals[:, 1], np.array(self.buckets_))
        items, _, cached, cross, square, deep, _, prefill = totals.T
        w0, w1, w2, w3, w4, w5, w6, w7 = self.weights_
        # The very operations of :meth:`p50`, in its order: both must round alike.
        result: FloatArray = (
            self.new_.many(tokens)
            + self.cached_.many(cached)
            + w0
            + w1 * items
            + w2 * cross
            + w3 * square
            + w4 * deep
            + w5 * emit
            + w6 * np.sqrt(items * deep)
            + w7 * np.minimum(prefill, emit)
        )
        return result

    def payload(self) -> dict[str, Any]:
        return {
            "buckets": self.buckets_,
            "new": {"knots": self.new_.knots, "slopes": self.new_.slopes},
            "cached": {"knots": self.cached_.knots, "slopes": self.cached_.slopes},
            "weights": list(self.weights_),
        }

    @classmethod
    def from_payload(cls, payload: dict[str, Any]) -> Self:
        terms = cls()
        terms.buckets_ = sorted(float(b) for b in payload["buckets"])
        terms.new_ = PiecewiseCurve(payload["new"]["knots"], payload["new"]["slopes"])
        terms.cached_ = PiecewiseCurve(payload["cached"]["knots"], payload["cached"]["slopes"])
        weights = tuple(float(w) for w in payload["weights"])
        if len(weights) == EARLIER_TERMS:
            weights += (0.0,) * (TERMS - EARLIER_TERMS)
        if len(weights) != TERMS or min(weights) < 0:
            raise ValueError(f"the physical part has {TERMS} weights ≥ 0")
        terms.weights_ = weights
        return terms
