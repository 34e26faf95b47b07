"""Predicted and measured step times of a running server.

A fitted estimator is corrected while its drift is watched; without one the server fits its own steps.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable

import numpy as np

from wispprof.fitting import FittedEstimator
from wispprof.fitting.drift import Cell, DriftMonitor, DriftSettings, DriftStatus
from wispprof.policies.linear_cost import LinearCost
from wispprof.types import BatchShape, StepTimeEstimator

log = logging.getLogger("wispprof.server")

_COVERAGE = 0.95
_PREFILL_WINDOW_MS = 10_000.0
_CORRECT_EVERY_STEPS = 16
_REPORT_AFTER_STEPS = 128
"""Steps after an alarm until shapes that drifted since are reported too; doubles with each report."""
_RATIOS_EVERY = 8
_EARLY = 0.05
_MIN_CORRECTION = 0.005
"""Smaller corrections leave the estimator unchanged, so that policies keep what they cached of it."""


class OnlineFit:
    """WISP's linear form, fitted to the last steps of this server.

    All weights are ≥ 0, so predictions never fall if work is added. The bound is the median times the
    95 % quantile of actual / predicted.
    """

    def __init__(self, window: int = 512, refit_every: int = 32) -> None:
        self.estimator = LinearCost(1.0, 0.05, bound_ratio=1.5)
        self._rows: deque[tuple[float, float, float, float, float]] = deque(maxlen=window)
        self._steps_since_fit = 0
        self._refit_every = refit_every

    def observe(self, shape: BatchShape, actual_ms: float) -> None:
        """Add a step; refits early, then after every ``refit_every`` steps."""
        counts = float(shape.new_tokens), float(shape.attention_pairs), float(shape.cached_tokens)
        self._rows.append((1.0, *counts, max(actual_ms, 1e-3)))
        self._steps_since_fit += 1
        if len(self._rows) in (4, 8, 16) or self._steps_since_fit >= self._refit_every:
            self.fit()

    def fit(self) -> None:
        """Least relative squares with weights ≥ 0 over the window."""
        from scipy.optimize import nnls

        rows = np.array(self._rows)
        if len(rows) < 4:
            return
        self._steps_since_fit = 0
        features, times = rows[:, :4], rows[:, 4]
        design = features / times[:, None]
        scale = np.maximum(design.max(axis=0), 1e-300)
        # A ridge too small to matter keeps collinear steps solvable.
        ridge = np.sqrt(1e-9 * len(rows)) * np.eye(4)
        target = np.concatenate([np.ones(len(rows)), np.zeros(4)])
        weights = nnls(np.vstack([design / scale, ridge]), target)[0] / scale
        ratios = times / np.maximum(features @ weights, 1e-3)
        # Least squares lands above the median on skewed noise; policies need the median.
        centre = float(np.median(ratios))
        step_ms, new_ms, pair_ms, kv_ms = (float(w) * centre for w in weights)
        ratio = max(1.0, float(np.quantile(ratios, _COVERAGE)) / centre)
        self.estimator = LinearCost(step_ms, new_ms, kv_ms, pair_ms, bound_ratio=ratio, covers=_COVERAGE)


def warmup_shapes(prefill_chunk: int) -> list[tuple[int, int, int]]:
    """(sessions, new, cached) of the steps to measure before serving without a fitted estimator."""
    deep = max(16, prefill_chunk)
    return [(1, 1, 16), (1, 8, 16), (4, 1, 16), (4, 4, deep), (1, 1, deep), (1, deep, 0)]


class StepTimeTracker:
    """``fitted``: the estimator to start from; ``None`` fits one to this server's steps.

    Only a :class:`FittedEstimator` is corrected and watched; any other estimator is used as it is.
    ``ratio`` and ``early_ratio``: median and 5 % quantile of measured / predicted time over the last steps, 1
    before the first.
    """

    def __init__(
        self,
        fitted: StepTimeEstimator | None,
        window: int = 128,
        drift: DriftSettings | None = None,
    ) -> None:
        self._online = OnlineFit() if fitted is None else None
        self._fitted = fitted
        self._monitor = (
            DriftMonitor(fitted, drift or DriftSettings()) if isinstance(fitted, FittedEstimator) else None
        )
        self._reported_cells: set[Cell] = set()
        self._report_from_step, self._report_after = 0, _REPORT_AFTER_STEPS
        self._ratios: deque[float] = deque(maxlen=window)
        self.ratio = self.early_ratio = 1.0
        self._cycles: deque[tuple[float, float]] = deque(maxlen=window)
        self._prefills: deque[tuple[float, float]] = deque(maxlen=8 * window)
        self.steps = 0
        self.corrections = 0

    @property
    def learning(self) -> bool:
        """Whether the server fits its own steps, for want of a fitted estimator."""
        return self._online is not None

    @property
    def estimator(self) -> StepTimeEstimator:
        """The estimator to use now, corrections included."""
        if self._online is not None:
            return self._online.estimator
        assert self._fitted is not None
        return self._fitted

    @property
    def cycle_ratio(self) -> float:
        """Mean time between the starts of back-to-back steps over their predicted median, at least 1.
        It covers planning, committing and the tail of slow steps."""
        predicted = sum(p for _, p in self._cycles)
        return max(1.0, sum(c for c, _ in self._cycles) / predicted) if predicted > 0 else 1.0

    def prefill_load(self, now_ms: float) -> float:
        """Share of the last seconds spent on prefill."""
        while self._prefills and self._prefills[0][0] < now_ms - _PREFILL_WINDOW_MS:
            self._prefills.popleft()
        return sum(ms for _, ms in self._prefills) / _PREFILL_WINDOW_MS

    def _update_quantiles(self) -> None:
        early, middle = np.quantile(np.array(self._ratios), (_EARLY, 0.5))
        self.early_ratio, self.ratio = float(early), float(middle)

    @property
    def drift(self) -> DriftStatus | None:
        """Status of the drift monitor; ``None`` without a fitted estimator."""
        return None if self._monitor is None else self._monitor.status()

    def cycle(self, cycle_ms: float, predicted_ms: float) -> None:
        """A step that another followed at once took ``cycle_ms``, planning and commit included."""
        self._cycles.append((cycle_ms, predicted_ms))

    def prefilled(self, now_ms: float, prefill_ms: float) -> None:
        """Prefill took ``prefill_ms`` of a step that ended now."""
        self._prefills.append((now_ms, prefill_ms))

    def observe(self, shape: BatchShape, predicted_ms: float, actual_ms: float) -> None:
        """A step ended, for which policies were given ``predicted_ms``."""
        self.steps += 1
        if predicted_ms > 0:
            self._ratios.append(actual_ms / predicted_ms)
            if len(self._ratios) < _RATIOS_EVERY or self.steps % _RATIOS_EVERY == 0:
                self._update_quantiles()
        if self._online is not None:
            self._online.observe(shape, actual_ms)
        if self._monitor is not None:
            detected = self._monitor.observe(shape, actual_ms)
            if detected is not None or self.steps % _CORRECT_EVERY_STEPS == 0:
                self._correct(self._monitor)

    def learn(self, rows: Iterable[tuple[BatchShape, float]]) -> None:
        """Fit to warm-up measurements taken before serving."""
        if self._online is not None:
            for shape, actual_ms in rows:
                self._online.observe(shape, actual_ms)
            self._online.fit()

    def _correct(self, monitor: DriftMonitor) -> None:
        corrected, current = monitor.corrected(), self._fitted
        assert isinstance(current, FittedEstimator)
        change = max(
            abs(corrected.p50_scale / current.p50_scale - 1.0),
            abs(corrected.bound_scale / current.bound_scale - 1.0),
        )
        if change > _MIN_CORRECTION:
            self._fitted = corrected
            self.corrections += 1
        status = monitor.status()
        if not status.re_profile:
            return
        cells = {cell for cell, _ in status.cells}
        due = self.steps >= self._report_from_step and not cells <= self._reported_cells
        if self._report_from_step == 0 or due:
            log.warning("%s", status.reason)
            self._reported_cells |= cells
            self._report_from_step = self.steps + self._report_after
            self._report_after *= 2
