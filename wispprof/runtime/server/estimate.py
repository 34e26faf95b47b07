"""The step-time estimator of a running server: a fitted one held against reality, or one learnt here.

Either way every step's predicted and measured time meet in :meth:`StepClock.observe`.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from wispprof.core import BatchShape, StepEstimator
from wispprof.fitting import FittedEstimator

__all__ = ["LearningEstimator", "StepClock"]

_COVERAGE = 0.95
_PREFILL_WINDOW_MS = 10_000.0


@dataclass(frozen=True, slots=True)
class _Batch:
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


class LearningEstimator:
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

    def predict(self, shape: BatchShape) -> tuple[float, float]:
        batch = self.start()
        for item in shape.items:
            batch = batch.add(*item)
        return batch.p50_ms, batch.bound_ms

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


class StepClock:
    """Predictions and what became of them.

    A fitted estimator is corrected as a whole when the median of actual / predicted over the last
    steps leaves ``tolerance``: a hot machine is slower everywhere. ``scale`` is that correction.
    """

    def __init__(
        self, fitted: StepEstimator | None, window: int = 128, tolerance: float = 0.1
    ) -> None:
        self._fitted = fitted
        self._now = fitted
        self._learnt = LearningEstimator()
        self._ratios: deque[float] = deque(maxlen=window)
        self._cycles: deque[tuple[float, float]] = deque(maxlen=window)
        self._prefills: deque[tuple[float, float]] = deque(maxlen=8 * window)
        self._since = 0
        self._window = window
        self._tolerance = tolerance
        self.scale = 1.0
        self.steps = 0
        self.corrections = 0

    @property
    def stretch(self) -> float:
        """Mean time from one step's beginning to the next one's over its predicted median, while there
        was always work: what planning, committing and the tail of slow steps add. At least 1."""
        predicted = sum(p for _, p in self._cycles)
        return max(1.0, sum(c for c, _ in self._cycles) / predicted) if predicted > 0 else 1.0

    def prefill_load(self, now_ms: float) -> float:
        """Share of all time that prompts took over the last seconds."""
        while self._prefills and self._prefills[0][0] < now_ms - _PREFILL_WINDOW_MS:
            self._prefills.popleft()
        return sum(ms for _, ms in self._prefills) / _PREFILL_WINDOW_MS

    def cycle(self, cycle_ms: float, predicted_ms: float) -> None:
        """A step that another followed at once took ``cycle_ms``, planning and commit included."""
        self._cycles.append((cycle_ms, predicted_ms))

    def prefilled(self, now_ms: float, took_ms: float) -> None:
        """Prompts took ``took_ms`` of a step that ended now."""
        self._prefills.append((now_ms, took_ms))

    @property
    def learning(self) -> bool:
        """Whether there is no fitted estimator and this server learns its own."""
        return self._fitted is None

    @property
    def estimator(self) -> StepEstimator:
        """What policies should ask now."""
        return self._learnt if self._now is None else self._now

    @property
    def drift(self) -> float:
        """Median of actual / predicted over the last steps; 1 while there are none."""
        return float(np.median(self._ratios)) if self._ratios else 1.0

    def observe(self, shape: BatchShape, predicted_ms: float, actual_ms: float) -> None:
        self.steps += 1
        if predicted_ms > 0:
            self._ratios.append(actual_ms / predicted_ms)
        if self._fitted is None:
            self._learnt.observe(shape, actual_ms)
            return
        self._since += 1
        if self._since >= self._window and abs(self.drift - 1.0) > self._tolerance:
            self.scale *= self.drift
            self.corrections += 1
            self._now = _rescaled(self._fitted, self.scale)
            self._since = 0
            self._ratios.clear()

    def learn(self, rows: Iterable[tuple[BatchShape, float]]) -> None:
        """Warm-up measurements for a learning clock, taken before serving."""
        for shape, actual_ms in rows:
            self._learnt.observe(shape, actual_ms)
        self._learnt.fit()


def _rescaled(fitted: StepEstimator, scale: float) -> StepEstimator:
    """The estimator times ``scale``, where it can be scaled at all (fitted ones can)."""
    if not isinstance(fitted, FittedEstimator):
        return fitted
    return fitted.with_scale(fitted.p50_scale * scale, fitted.bound_scale * scale)


def warmup_shapes(prefill_chunk: int) -> Sequence[tuple[int, int, int]]:
    """(sessions, new, cached) to measure before serving when nothing was fitted: small, spread."""
    deep = max(16, prefill_chunk)
    return [(1, 1, 16), (1, 8, 16), (4, 1, 16), (4, 4, deep), (1, 1, deep), (1, deep, 0)]
