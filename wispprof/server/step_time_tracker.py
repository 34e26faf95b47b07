"""Predictions of a running server and what became of them.

A fitted estimator is watched by :class:`~wispprof.fitting.drift.DriftMonitor`: policies ask the corrected
one, and where the steps have left the profile for good the log says so, with the cells that went wrong.
Without a fitted one the server learns its own (:class:`LearningEstimator`). Either way every step's
predicted and measured time meet in :meth:`StepTimeTracker.observe`.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable

import numpy as np

from wispprof.fitting import FittedEstimator
from wispprof.fitting.drift import Cell, DriftMonitor, DriftSettings, DriftStatus
from wispprof.server.online_estimator import LearningEstimator
from wispprof.types import BatchShape, StepTimeEstimator

__all__ = ["StepTimeTracker"]

log = logging.getLogger("wispprof.server")

_PREFILL_WINDOW_MS = 10_000.0
_CORRECT_EVERY = 16
_REPORT_EVERY = 128
_MIN_CORRECTION = 0.005
"""Corrections smaller than this leave the estimator alone: policies keep what they know of it."""


class StepTimeTracker:
    """``fitted``: the estimator to start from; ``None`` learns one from this server's steps.

    A fitted estimator of another kind than :class:`FittedEstimator` (a test's, a formula) is used as it is.
    """

    def __init__(
        self,
        fitted: StepTimeEstimator | None,
        window: int = 128,
        drift: DriftSettings | None = None,
    ) -> None:
        self._fitted = fitted
        self._current = fitted
        self._learned = LearningEstimator()
        self._monitor = (
            DriftMonitor(fitted, drift or DriftSettings())
            if isinstance(fitted, FittedEstimator)
            else None
        )
        self._reported_cells: set[Cell] = set()
        self._report_from_step = 0
        self._ratios: deque[float] = deque(maxlen=window)
        self._cycles: deque[tuple[float, float]] = deque(maxlen=window)
        self._prefills: deque[tuple[float, float]] = deque(maxlen=8 * window)
        self.steps = 0
        self.corrections = 0

    # --- what policies and admission ask ------------------------------------------------------

    @property
    def learning(self) -> bool:
        """Whether there is no fitted estimator and this server learns its own."""
        return self._fitted is None

    @property
    def estimator(self) -> StepTimeEstimator:
        """What policies should ask now, corrections included."""
        return self._learned if self._current is None else self._current

    @property
    def cycle_ratio(self) -> float:
        """Mean time from one step's beginning to the next one's over its predicted median, while there
        was always work: what planning, committing and the tail of slow steps add. At least 1."""
        predicted = sum(p for _, p in self._cycles)
        return max(1.0, sum(c for c, _ in self._cycles) / predicted) if predicted > 0 else 1.0

    def prefill_load(self, now_ms: float) -> float:
        """Share of all time that prompts took over the last seconds."""
        while self._prefills and self._prefills[0][0] < now_ms - _PREFILL_WINDOW_MS:
            self._prefills.popleft()
        return sum(ms for _, ms in self._prefills) / _PREFILL_WINDOW_MS

    # --- what operators ask -------------------------------------------------------------------

    @property
    def ratio(self) -> float:
        """Median of measured / predicted over the last steps, against what policies were told; 1 while
        there are none."""
        return float(np.median(self._ratios)) if self._ratios else 1.0

    @property
    def drift(self) -> DriftStatus | None:
        """What the monitor knows; ``None`` without a fitted estimator to hold against reality."""
        return None if self._monitor is None else self._monitor.status()

    # --- what the step loop tells -------------------------------------------------------------

    def cycle(self, cycle_ms: float, predicted_ms: float) -> None:
        """A step that another followed at once took ``cycle_ms``, planning and commit included."""
        self._cycles.append((cycle_ms, predicted_ms))

    def prefilled(self, now_ms: float, took_ms: float) -> None:
        """Prompts took ``took_ms`` of a step that ended now."""
        self._prefills.append((now_ms, took_ms))

    def observe(self, shape: BatchShape, predicted_ms: float, actual_ms: float) -> None:
        """A step ended; ``predicted_ms``: what policies were told of it."""
        self.steps += 1
        if predicted_ms > 0:
            self._ratios.append(actual_ms / predicted_ms)
        if self._fitted is None:
            self._learned.observe(shape, actual_ms)
            return
        if self._monitor is None:
            return
        fired = self._monitor.observe(shape, actual_ms)
        if fired is not None or self.steps % _CORRECT_EVERY == 0:
            self._correct(self._monitor)

    def learn(self, rows: Iterable[tuple[BatchShape, float]]) -> None:
        """Warm-up measurements for a learning clock, taken before serving."""
        for shape, actual_ms in rows:
            self._learned.observe(shape, actual_ms)
        self._learned.fit()

    def _correct(self, monitor: DriftMonitor) -> None:
        corrected, now = monitor.corrected(), self._current
        assert isinstance(now, FittedEstimator)
        change = max(
            abs(corrected.p50_scale / now.p50_scale - 1.0),
            abs(corrected.bound_scale / now.bound_scale - 1.0),
        )
        if change > _MIN_CORRECTION:
            self._current = corrected
            self.corrections += 1
        status = monitor.status()
        if not status.re_profile:
            return
        cells = {cell for cell, _ in status.cells}
        if self._report_from_step == 0 or (
            self.steps >= self._report_from_step and not cells <= self._reported_cells
        ):
            # Once when it fires, and again when other regions of shapes went wrong too.
            log.warning("%s", status.reason)
            self._reported_cells |= cells
            self._report_from_step = self.steps + _REPORT_EVERY
