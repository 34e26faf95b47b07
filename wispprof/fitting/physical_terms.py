"""The physical part of the ``wispprof`` model: what a step must cost, as nonnegative terms of its totals.

- A step reads the weights (constant) and multiplies each padded token with them (a curve in tokens).
- It reads the cache (a curve in cached tokens), touches query-key pairs, and waits for its deepest item.
- An attention kernel computes several query rows of an item about as fast as one once they fill a tile. So
  the pairs of an item's first rows cost more than those of later ones: min(Σ new·cached, r·Σ cached).
- Only tokens that are sampled pass the output head, so a prompt token costs less than a draft.
- Attention groups items of similar context. The totals do not tell how many groups there are; √(items ·
  max_cached) grows as the groups do in measurements. Prompt chunks and decode items form separate groups,
  which costs up to the smaller part's tokens.
- A session that feeds several tokens needs another attention kernel than plain decoding, with a floor of its
  own.

Every term grows with work and every weight is ≥ 0, so the sum never falls if work is added. If a batch is
cut to the measured box, sampled tokens are cut by themselves: a difference of two totals could fall.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Annotated, Any, Self

import numpy as np

from wispprof.artifacts.document import LearnedState
from wispprof.artifacts.files import Meta
from wispprof.artifacts.rows import NonNegative
from wispprof.fitting.batch_totals import ArrayTotals, FloatArray, Totals
from wispprof.fitting.observations import Observations
from wispprof.fitting.step_time_models import fit_nonnegative
from wispprof.types import BatchTotals

NEW_KNOTS = 6
CACHED_KNOTS = 3
TERMS = 11
EARLIER_TERMS = 8
"""Of estimators fitted by earlier versions; what they lack weighs nothing."""
FIRST_ROWS = (2, 4)
"""Query rows of an item after which its pairs may become cheaper."""
MINIMUM_OF_BOTH = 10
"""Steps of one token a session, and of several, that the term of the latter needs."""
BUCKET_SHARE = 0.8
"""Share of rows whose padding must follow the buckets before they are used."""


def sampled_tokens(totals: BatchTotals[Any]) -> Any:
    """Tokens that pass the output head, of one batch or of n: all but those of prompt chunks."""
    return totals.sum_new - totals.prefill


def padded_many(new: FloatArray, buckets: FloatArray) -> FloatArray:
    """Tokens that a step computes after padding: the smallest bucket that holds ``new``, else ``new``."""
    if len(buckets) == 0:
        return new
    place = np.searchsorted(buckets, new, side="left")
    held = place < len(buckets)
    return np.where(held, buckets[np.minimum(place, len(buckets) - 1)], new)


@dataclass
class PiecewiseCurve:
    """A non-decreasing piecewise linear function through the origin, by its slope between knots."""

    knots: list[float]
    slopes: list[NonNegative]

    def __post_init__(self) -> None:
        if len(self.slopes) != len(self.knots) + 1:
            raise ValueError("a curve has one slope more than knots")
        self._left = [0.0, *self.knots]
        # Value at the left end of each segment.
        self._base = [0.0]
        for slope, low, high in zip(self.slopes, self._left, self.knots, strict=False):
            self._base.append(self._base[-1] + slope * (high - low))
        # As arrays too: making them anew for every batch costs more than the look-up.
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


def single_token_knots(tokens: FloatArray) -> list[float]:
    """Knots at 1 and 2 if steps of a single token were measured.

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
    new, padded = data.totals.sum_new[known], data.padded[known]
    follows = padded_many(new, buckets) == padded
    plausible = follows.mean() >= BUCKET_SHARE and (padded > new).any()
    return buckets if plausible else np.zeros(0)


class PhysicalTerms(LearnedState):
    """``buckets_`` (b,), ``new_`` and ``cached_`` curves, and ``weights_`` (11,) of the other terms: a step,
    an item, Σ new·cached, Σ new², the deepest item, a sampled token, √(items · max_cached), the smaller of a
    prompt's tokens and the sampled ones, the pairs of the first rows, and a step in which some session feeds
    several tokens."""

    buckets_: list[float]
    new_: PiecewiseCurve
    cached_: PiecewiseCurve
    weights_: Annotated[tuple[NonNegative, ...], Meta(min_length=EARLIER_TERMS, max_length=TERMS)]

    def __init__(self, new_knots: int = NEW_KNOTS, cached_knots: int = CACHED_KNOTS) -> None:
        self.new_knots = new_knots
        self.cached_knots = cached_knots

    def fit(self, data: Observations) -> Self:
        buckets = graph_buckets(data)
        self.buckets_ = [float(b) for b in buckets]
        totals = data.totals
        tokens = padded_many(totals.sum_new, buckets)
        new_knots = sorted({*single_token_knots(tokens), *spread_knots(tokens, self.new_knots)})
        cached_knots = spread_knots(totals.sum_cached, self.cached_knots)
        sampled = sampled_tokens(totals)
        several = totals.max_new > 1
        if min(several.sum(), (~several).sum()) < MINIMUM_OF_BOTH:
            several = np.zeros(len(data), dtype=bool)  # it could not be told from the fixed part of a step
        others = [
            np.ones(len(data)),
            totals.items,
            totals.sum_new_cached,
            totals.sum_new_sq,
            totals.max_cached,
            sampled,
            np.sqrt(totals.items * totals.max_cached),
            np.minimum(totals.prefill, sampled),
            *(np.minimum(totals.sum_new_cached, rows * totals.sum_cached) for rows in FIRST_ROWS),
            several,
        ]
        design = np.concatenate(
            [
                PiecewiseCurve.columns(tokens, new_knots),
                PiecewiseCurve.columns(totals.sum_cached, cached_knots),
                np.stack(others, axis=1),
            ],
            axis=1,
        )
        weights = fit_nonnegative(design, data.median_ms).tolist()
        first, second = len(new_knots) + 1, len(cached_knots) + 1
        self.new_ = PiecewiseCurve(new_knots, weights[:first])
        self.cached_ = PiecewiseCurve(cached_knots, weights[first : first + second])
        self.weights_ = tuple(weights[first + second :])
        return self

    def padded(self, new: float) -> float:
        """Tokens computed for ``new`` fed ones, after graph padding."""
        buckets = self.buckets_
        place = bisect_left(buckets, new)
        return buckets[place] if place < len(buckets) else new

    def p50(self, totals: Totals, sampled: float) -> float:
        """Milliseconds of a batch with so many sampled tokens (see :func:`sampled_tokens`)."""
        new_ms, cached_ms = self.new_(self.padded(totals.sum_new)), self.cached_(totals.sum_cached)
        groups, mixed = sqrt(totals.items * totals.max_cached), min(totals.prefill, sampled)
        few, some = (min(totals.sum_new_cached, rows * totals.sum_cached) for rows in FIRST_ROWS)
        time_ms: float = self._sum(totals, new_ms, cached_ms, sampled, groups, mixed, few, some)
        return time_ms

    def p50_many(self, totals: ArrayTotals, sampled: FloatArray) -> FloatArray:
        """:meth:`p50` of n batches, (n,)."""
        new_ms = self.new_.many(padded_many(totals.sum_new, np.array(self.buckets_)))
        cached_ms = self.cached_.many(totals.sum_cached)
        groups, mixed = np.sqrt(totals.items * totals.max_cached), np.minimum(totals.prefill, sampled)
        few, some = (np.minimum(totals.sum_new_cached, rows * totals.sum_cached) for rows in FIRST_ROWS)
        return np.asarray(self._sum(totals, new_ms, cached_ms, sampled, groups, mixed, few, some))

    def _sum(
        self,
        totals: BatchTotals[Any],
        new_ms: Any,
        cached_ms: Any,
        sampled: Any,
        groups: Any,
        mixed: Any,
        few: Any,
        some: Any,
    ) -> Any:
        """All terms, of one batch or of n: both must round alike."""
        items, _, _, new_cached, new_sq, max_cached, max_new, _ = totals
        # Estimators of earlier versions have no weights for the last terms.
        w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10 = (*self.weights_, 0.0, 0.0, 0.0)[:TERMS]
        linear_ms = new_ms + cached_ms + w0 + w1 * items + w2 * new_cached + w3 * new_sq + w4 * max_cached
        linear_ms += w5 * sampled + w6 * groups + w7 * mixed + w8 * few + w9 * some
        return linear_ms + w10 * (max_new > 1)
