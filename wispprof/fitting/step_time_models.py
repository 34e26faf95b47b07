"""Step-time models: batch totals to median milliseconds. Baselines, and the fit that linear models share.

``wisp-linear`` follows WISP, ``staircase`` vLLM's start-up profiling, ``forest`` Vidur. Each is learned
by ``fit``, is stored as plain JSON, and predicts from plain numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from wispprof.artifacts.document import LearnedState
from wispprof.artifacts.rows import NonNegative
from wispprof.fitting.batch_totals import ArrayTotals, FloatArray, Totals, clipped
from wispprof.fitting.observations import Observations
from wispprof.types import BatchTotals

TREES = 48
"""Of the random forest."""


class StepTimeModel(LearnedState, ABC):
    """Totals of a batch to its median time. Attributes that end in ``_`` are learned by :meth:`fit`.

    ``monotone``: predictions never fall if work is added.
    """

    kind: str
    monotone = True

    @abstractmethod
    def fit(self, data: Observations) -> Self:
        """Learn from observations and return self."""

    def clone_unfitted(self) -> Self:
        """An unfitted model with the settings that this one's fit chose."""
        return type(self)()

    @abstractmethod
    def p50(self, totals: Totals) -> float:
        """Median milliseconds of one non-empty batch."""

    @abstractmethod
    def p50_many(self, totals: ArrayTotals) -> FloatArray:
        """:meth:`p50` of n batches, (n,); equal within rounding."""

    def clipped(self, totals: Totals, high: Totals) -> float:
        """:meth:`p50` of the batch cut to ``high``; never falls if work is added.

        The default cuts total by total: for models that never fall in any single total.
        """
        return self.p50(BatchTotals(*map(min, totals, high)))

    def clipped_many(self, totals: ArrayTotals, high: Totals) -> FloatArray:
        """:meth:`clipped` of n batches, (n,)."""
        return self.p50_many(clipped(totals, high))


def fit_nonnegative(design: FloatArray, times_ms: FloatArray, ridge: float = 1e-6) -> FloatArray:
    """Weights ≥ 0 that minimise the relative error of ``design @ weights`` against ``times_ms``.

    Columns are scaled to one before a small ridge acts, so that units do not decide what is shrunk.
    Two more passes reweight rows by the inverse of their absolute residual: timing noise is skewed, so
    the fit should approach the median.
    """
    from scipy.optimize import nnls

    scale = np.maximum(np.abs(design).max(axis=0), 1e-300)
    relative = design / scale / times_ms[:, None]
    width = design.shape[1]
    shrink = np.sqrt(ridge * len(design)) * np.eye(width) * np.abs(relative).mean(axis=0)
    target = np.concatenate([np.ones(len(design)), np.zeros(width)])
    row_weights = np.ones(len(design))
    weights = np.zeros(width)
    for _ in range(3):
        root = np.sqrt(row_weights)[:, None]
        weights = nnls(np.vstack([relative * root, shrink]), target * np.append(root, np.ones(width)))[0]
        residual = np.abs(relative @ weights - 1.0)
        row_weights = 1.0 / np.maximum(residual, max(float(np.median(residual)), 1e-4))
        row_weights /= row_weights.mean()
    scaled: FloatArray = weights / scale
    return scaled


class WispLinear(StepTimeModel):
    """WISP's estimator (arXiv 2601.11652, section 5), with all weights ≥ 0:

    ``a·Σ new + b·Σ new·(cached + new) + c·Σ cached + d``.

    ``coef_``: milliseconds per token, per token pair, per cached token, and per step.
    """

    kind = "wisp-linear"
    coef_: tuple[NonNegative, NonNegative, NonNegative, NonNegative]

    def fit(self, data: Observations) -> Self:
        totals = data.totals
        pairs = totals.sum_new_cached + totals.sum_new_sq
        design = [totals.sum_new, pairs, totals.sum_cached, np.ones(len(data))]
        a, b, c, d = fit_nonnegative(np.stack(design, axis=1), data.median_ms).tolist()
        self.coef_ = (a, b, c, d)
        return self

    def p50(self, totals: Totals) -> float:
        time_ms: float = self._time_ms(totals)
        return time_ms

    def p50_many(self, totals: ArrayTotals) -> FloatArray:
        return np.asarray(self._time_ms(totals))

    def _time_ms(self, totals: BatchTotals[Any]) -> Any:
        """Of one batch or of n: both must round alike."""
        a, b, c, d = self.coef_
        _, new, cached, new_cached, new_sq, *_ = totals
        return a * new + b * (new_cached + new_sq) + c * cached + d


class Staircase(StepTimeModel):
    """Time by padded tokens, measured at one context length, as vLLM profiles itself at start-up.

    ``steps_``: token counts; ``times_ms_``: of a step padded to each, never falling. ``context_``: the
    one that most shapes were measured at. Beyond the last step, time grows in proportion.
    """

    kind = "staircase"
    steps_: list[float]
    times_ms_: list[float]
    context_: float

    def fit(self, data: Observations) -> Self:
        plain = data.totals.prefill == 0
        used = data.take(plain) if plain.sum() >= 4 else data
        mean = used.totals.sum_cached / used.totals.items
        tokens = np.where(used.padded > 0, used.padded, used.totals.sum_new)
        values, counts = np.unique(np.round(np.log2(1 + mean), 1), return_counts=True)
        modal = values[np.argmax(counts)]
        distance = np.abs(np.log2(1 + mean) - modal)
        self.context_ = float(2**modal - 1)
        steps = np.unique(tokens)
        times = []
        for count in steps:
            same = np.flatnonzero(tokens == count)
            nearest = same[distance[same] <= distance[same].min() + 1e-9]
            times.append(float(np.median(used.median_ms[nearest])))
        self.steps_ = steps.tolist()
        self.times_ms_ = np.maximum.accumulate(times).tolist()
        return self

    def finish(self) -> None:
        if not self.steps_ or len(self.steps_) != len(self.times_ms_):
            raise ValueError("a staircase needs as many times as steps")
        if sorted(self.steps_) != self.steps_ or sorted(self.times_ms_) != self.times_ms_:
            raise ValueError("a staircase never falls")

    def p50(self, totals: Totals) -> float:
        place = bisect_left(self.steps_, totals.sum_new)
        if place < len(self.steps_):
            return self.times_ms_[place]
        return self.times_ms_[-1] * totals.sum_new / self.steps_[-1]

    def p50_many(self, totals: ArrayTotals) -> FloatArray:
        steps, times = np.array(self.steps_), np.array(self.times_ms_)
        place = np.searchsorted(steps, totals.sum_new, side="left")
        padded = times[np.minimum(place, len(times) - 1)]
        return np.where(place == len(steps), padded * totals.sum_new / steps[-1], padded)


class Forest(StepTimeModel):
    """A random forest over batch features, as in Vidur (arXiv 2405.05465, section 4.3).

    It can predict less time for more work, so ``auto`` never chooses it; it is a baseline. It is trained
    by scikit-learn and evaluated by numpy, so that an estimator on disk is JSON.
    Nodes of all trees in one array each: ``feature_`` (-1: leaf), ``threshold_``, ``left_``, ``right_``,
    ``value_``; ``roots_`` (trees,).
    """

    kind = "forest"
    monotone = False
    roots_: NDArray[np.int64]
    feature_: NDArray[np.int64]
    threshold_: FloatArray
    left_: NDArray[np.int64]
    right_: NDArray[np.int64]
    value_: FloatArray

    def fit(self, data: Observations) -> Self:
        from sklearn.ensemble import RandomForestRegressor

        forest = RandomForestRegressor(TREES, random_state=0, n_jobs=1)
        forest.fit(np.column_stack(data.totals), data.median_ms)
        trees = [estimator.tree_ for estimator in forest.estimators_]
        counts = [tree.node_count for tree in trees]
        self.roots_ = np.cumsum([0, *counts[:-1]])
        start = np.repeat(self.roots_, counts)
        left = np.concatenate([tree.children_left for tree in trees])
        right = np.concatenate([tree.children_right for tree in trees])
        leaf = left < 0
        self.feature_ = np.where(leaf, -1, np.concatenate([tree.feature for tree in trees]))
        self.threshold_ = np.where(leaf, 0.0, np.concatenate([tree.threshold for tree in trees]))
        self.left_ = np.where(leaf, 0, left + start)
        self.right_ = np.where(leaf, 0, right + start)
        self.value_ = np.where(leaf, np.concatenate([tree.value[:, 0, 0] for tree in trees]), 0.0)
        return self

    def finish(self) -> None:
        nodes = np.arange(len(self.feature_))
        inner = self.feature_ >= 0
        parts = (self.threshold_, self.left_, self.right_, self.value_)
        if any(len(part) != len(nodes) for part in parts) or not len(self.roots_):
            raise ValueError("the forest's arrays differ in length")
        # Children after parents: a walk always ends, whatever the file says.
        if (np.minimum(self.left_, self.right_)[inner] <= nodes[inner]).any():
            raise ValueError("the forest has a cycle")
        if (np.maximum(self.left_, self.right_) >= len(nodes)).any():
            raise ValueError("the forest points outside itself")

    def p50(self, totals: Totals) -> float:
        return float(self.p50_many(BatchTotals.stack([totals]))[0])

    def p50_many(self, totals: ArrayTotals) -> FloatArray:
        table = np.column_stack(totals)
        node = np.broadcast_to(self.roots_, (len(table), len(self.roots_))).copy()
        row = np.arange(len(table))[:, None]
        while True:
            feature = self.feature_[node]
            inner = feature >= 0
            if not inner.any():
                break
            low = table[row, np.maximum(feature, 0)] <= self.threshold_[node]
            node = np.where(inner, np.where(low, self.left_[node], self.right_[node]), node)
        result: FloatArray = self.value_[node].mean(axis=1)
        return result
