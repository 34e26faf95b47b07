"""The step-time estimator that a server learns from its own steps, where none was fitted."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from wispprof.types import BatchCost, BatchShape, BatchTotals, StepTimeEstimator

__all__ = ["LearningEstimator", "warmup_shapes"]

_COVERAGE = 0.95


@dataclass(frozen=True, slots=True)
class _Batch(BatchCost):
    """Totals of a batch being built, priced by four weights."""

    weights: tuple[float, float, float, float]
    ratio: float
    items: int = 0
    new: int = 0
    pairs: int = 0
    cached: int = 0

    @property
    def p50_ms(self) -> float:
        if not self.items:
            return 0.0
        step, per_new, per_pair, per_cached = self.weights
        return step + per_new * self.new + per_pair * self.pairs + per_cached * self.cached

    @property
    def bound_ms(self) -> float:
        return self.p50_ms * self.ratio

    def add(self, new: int, cached: int, prefill: bool = False) -> _Batch:
        return _Batch(
            self.weights,
            self.ratio,
            self.items + 1,
            self.new + new,
            self.pairs + new * cached + new * (new + 1) // 2,
            self.cached + cached,
        )

    def add_many(
        self, new: np.ndarray, cached: np.ndarray, prefill: np.ndarray | bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """(p50, bound), each (n,), with each of n candidates added alone."""
        step, per_new, per_pair, per_cached = self.weights
        p50 = step + per_new * (self.new + new) + per_cached * (self.cached + cached)
        p50 = p50 + per_pair * (self.pairs + new * cached + new * (new + 1) / 2)
        return p50, p50 * self.ratio


class LearningEstimator(StepTimeEstimator):
    """WISP's linear form (per step, per new token, per query-key pair, per cached token), learnt from
    the steps of this server. All weights are kept ≥ 0, so predictions never fall when work is added.

    The bound is the median times the 95 % quantile of actual / predicted over the same window.
    """

    coverage = _COVERAGE

    def __init__(self, window: int = 512, refit_every: int = 32) -> None:
        self.weights = (1.0, 0.05, 0.0, 0.0)
        self.ratio = 1.5
        self.fits = 0
        self._rows: deque[tuple[float, float, float, float, float]] = deque(maxlen=window)
        self._since = 0
        self._refit_every = refit_every

    @property
    def steps(self) -> int:
        """Steps in the window."""
        return len(self._rows)

    def start(self) -> _Batch:
        return _Batch(self.weights, self.ratio)

    def predict_totals(self, totals: BatchTotals[Any]) -> tuple[np.ndarray, np.ndarray]:
        step, per_new, per_pair, per_cached = self.weights
        p50 = step + per_new * totals.sum_new + per_pair * totals.attention_pairs
        p50 = (p50 + per_cached * totals.sum_cached) * (totals.items > 0)
        return p50, p50 * self.ratio

    def observe(self, shape: BatchShape, actual_ms: float) -> None:
        """Add a step; refits when enough came since the last fit."""
        self._rows.append(
            (
                1.0,
                float(shape.new_tokens),
                float(shape.attention_pairs),
                float(shape.cached_tokens),
                max(actual_ms, 1e-3),
            )
        )
        self._since += 1
        early = len(self._rows) in (4, 8, 16)
        if early or self._since >= self._refit_every:
            self.fit()

    def fit(self) -> None:
        """Least relative squares with weights ≥ 0 over the window."""
        rows = np.array(self._rows)
        if len(rows) < 4:
            return
        self._since = 0
        times = rows[:, 4]
        weights = _nonnegative(rows[:, :4] / times[:, None])
        predicted = np.maximum(rows[:, :4] @ weights, 1e-3)
        ratios = times / predicted
        # The median is what policies call p50: least squares lands above it on skewed noise.
        centre = float(np.median(ratios))
        step, per_new, per_pair, per_cached = (float(w) * centre for w in weights)
        self.weights = (step, per_new, per_pair, per_cached)
        self.ratio = max(1.0, float(np.quantile(ratios, _COVERAGE)) / centre)
        self.fits += 1


def _nonnegative(design: np.ndarray) -> np.ndarray:
    """Weights ≥ 0 that bring ``design @ weights`` closest to 1: best over all supports of 4 columns."""
    scale = np.maximum(np.abs(design).max(axis=0), 1e-300)
    columns = design / scale
    gram = columns.T @ columns + 1e-9 * len(design) * np.eye(4)
    target = columns.T @ np.ones(len(design))
    best, best_gain = np.zeros(4), 0.0
    supports = itertools.chain.from_iterable(
        itertools.combinations(range(4), size) for size in range(1, 5)
    )
    for support in supports:
        index = list(support)
        solved = np.linalg.solve(gram[np.ix_(index, index)], target[index])
        gain = float(solved @ target[index])
        if (solved >= 0).all() and gain > best_gain:
            best = np.zeros(4)
            best[index] = solved
            best_gain = gain
    weights: np.ndarray = best / scale
    return weights


def warmup_shapes(prefill_chunk: int) -> Sequence[tuple[int, int, int]]:
    """(sessions, new, cached) to measure before serving when nothing was fitted: small, spread."""
    deep = max(16, prefill_chunk)
    return [(1, 1, 16), (1, 8, 16), (4, 1, 16), (4, 4, deep), (1, 1, deep), (1, deep, 0)]
