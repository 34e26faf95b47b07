"""Drift while serving: compare predicted with measured step times, and correct without a new profile.

- The *median* follows the sign of the error in small steps: a running median of log(measured ÷ predicted),
  which an outlier cannot move far.
- The *bound* follows adaptive conformal inference (Gibbs and Candès, NeurIPS 2021; scale-free form:
  Angelopoulos et al., "Conformal PID control", 2023). A step above the bound raises its log factor, a step
  below lowers it, in the ratio that gives the stated long-run miss rate.
- The *detector* is a two-sided CUSUM (Page, 1954) on the log ratios of the uncorrected predictions, for each
  cell of the shape space and for all steps together. It advises a new profile and names the cells.

:func:`recalibrate` scales an estimator's median to a server's step log and learns its bound anew.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from wispprof.artifacts.rows import StepRow
from wispprof.errors import FitError
from wispprof.fitting.batch_totals import Totals, decode_totals_of, totals_of
from wispprof.fitting.conformal import RatioBound, weighted_quantiles
from wispprof.fitting.estimator import FittedEstimator
from wispprof.fitting.evaluation import relative_errors
from wispprof.fitting.observations import DISTRUSTED
from wispprof.types import BatchShape, BatchTotals


@dataclass(frozen=True, slots=True)
class DriftSettings:
    """Settings of the detector and of both corrections."""

    warm_up: int = 100
    """Steps from which the detector learns the usual level and spread of the log ratios."""
    cell_warm_up: int = 30
    """The same for the steps of one cell."""
    default_error: float = 0.25
    """Largest usual level that is believed if the estimator's report states no held-out error. Otherwise the
    limit is the error that nine of ten held-out shapes stay below: an estimator that is wrong from the first
    step on must not pass for a usual level."""
    slack: float = 0.5
    """CUSUM allowance, in standard deviations."""
    limit: float = 16.0
    """CUSUM threshold, in standard deviations. With these two, a stream of independent errors runs for
    millions of steps without an alarm."""
    clip: float = 3.0
    """Largest residual that counts, in standard deviations: one stall is no drift."""
    bound_rate: float = 0.25
    """Step of the bound's log factor, in units of the log ratios' spread."""
    median_rate: float = 0.05
    """Step of the median's log factor, in the same units."""
    min_change: float = 0.05
    """Least relative change that is worth a new profile."""


class Cell(NamedTuple):
    """A region of shape space: most new tokens and deepest cache as powers of two, with or without prompt
    chunks."""

    new_log2: int
    cached_log2: int
    prefill: bool

    def __str__(self) -> str:
        chunks = " with prompt chunks" if self.prefill else ""
        return f"≤ {2**self.new_log2} new tokens over ≤ {2**self.cached_log2} cached{chunks}"


def cell_of(totals: Totals) -> Cell:
    """The cell of a batch; new tokens by powers of four, deepest cache by powers of sixteen."""
    new = 2 * math.ceil(math.log2(max(1, totals.sum_new)) / 2)
    cached = 4 * math.ceil(math.log2(max(1, totals.max_cached)) / 4)
    return Cell(new, cached, totals.prefill > 0)


@dataclass(frozen=True, slots=True)
class DriftStatus:
    """State of the monitor. ``re_profile``: the detector raised its alarm; ``reason`` explains it.

    ``ratio``: running median of measured ÷ predicted; ``bound_scale``: current factor on the bound;
    ``coverage``: share of the last steps (up to 500) under their corrected bound; ``cells``: those that
    drifted, with their ratio.
    """

    steps: int
    ratio: float
    bound_scale: float
    coverage: float
    re_profile: bool
    reason: str = ""
    cells: tuple[tuple[Cell, float], ...] = ()


@dataclass(slots=True)
class _ChangeDetector:
    """Two-sided CUSUM over one stream of log ratios.

    ``max_level``: largest distance from 0 at which the level of the first ``warm_up`` values is believed.
    """

    settings: DriftSettings
    warm_up: int
    max_level: float
    recent: float = 0.0
    changed: bool = False
    _count: int = 0
    _first: list[float] = field(default_factory=list)
    _level: float = 0.0
    _spread: float = 0.0
    _up: float = 0.0
    _down: float = 0.0

    def observe(self, value: float) -> bool:
        """Add one log ratio; whether the CUSUM is past its limit now."""
        settings = self.settings
        self._count += 1
        self.recent += (value - self.recent) / min(self._count, 50)
        if self._count <= self.warm_up:
            self._first.append(value)
            if self._count == self.warm_up:
                level, spread = _level_and_spread(self._first)
                self._level = max(-self.max_level, min(self.max_level, level))
                self._spread = max(spread, settings.min_change / 4)
            return False
        residual = max(-settings.clip, min(settings.clip, (value - self._level) / self._spread))
        # A level known from few steps is itself uncertain by spread / √steps.
        slack = settings.slack + 2.0 / math.sqrt(self.warm_up)
        self._up = max(0.0, self._up + residual - slack)
        self._down = max(0.0, self._down - residual - slack)
        return max(self._up, self._down) > settings.limit

    @property
    def matters(self) -> bool:
        """Whether recent values differ from the usual level by more than the least change."""
        return abs(self.recent - self._level) >= self.settings.min_change


def _level_and_spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation of the values, clipped at three robust deviations from their median."""
    middle = statistics.median(values)
    reach = 3.0 * 1.4826 * statistics.median([abs(v - middle) for v in values])
    clipped = [max(middle - reach, min(middle + reach, v)) for v in values]
    return statistics.fmean(clipped), statistics.pstdev(clipped)


class DriftMonitor:
    """Observes every step; gives the corrected estimator and the drift status.

    ``estimator``: as fitted. :meth:`observe` costs a few microseconds.
    """

    def __init__(self, estimator: FittedEstimator, settings: DriftSettings | None = None) -> None:
        self.estimator = estimator
        self.settings = settings or DriftSettings()
        error = estimator.report.get("held_out", {}).get(estimator.kind, {}).get("p90_ape")
        self._max_level = self.settings.default_error if error is None else math.log1p(error / 100.0)
        self._log_median = 0.0
        self._log_bound = 0.0
        self._spread = 0.05
        self._steps = 0
        self._within_bound: deque[bool] = deque(maxlen=500)
        self._overall = _ChangeDetector(self.settings, self.settings.warm_up, self._max_level)
        self._cells: dict[Cell, _ChangeDetector] = {}
        self._alarmed = False

    def observe(self, shape: BatchShape, measured_ms: float) -> DriftStatus | None:
        """Add a finished step. Returns the status at the step that raises the first alarm.

        Steps without a positive, finite time are ignored.
        """
        if not shape.items or not math.isfinite(measured_ms) or measured_ms <= 0:
            return None
        p50, bound = self.estimator.predict(shape)
        log_ratio = math.log(measured_ms / p50)
        within_bound = measured_ms <= bound * self.bound_scale
        self._steps += 1
        self._within_bound.append(within_bound)
        self._correct(log_ratio, within_bound)
        return self._detect(totals_of(shape.items), log_ratio)

    def _correct(self, log_ratio: float, within_bound: bool) -> None:
        settings = self.settings
        error = log_ratio - self._log_median
        self._spread += 0.02 * (min(abs(error), 10 * self._spread) - self._spread)
        scale = max(self._spread, 0.002)
        # Far from the median the correction takes longer steps.
        stride = min(4.0, max(1.0, abs(error) / scale / 3))
        self._log_median += settings.median_rate * scale * stride * math.copysign(1.0, error)
        miss_rate = 1.0 - self.estimator.coverage
        self._log_bound += settings.bound_rate * scale * ((not within_bound) - miss_rate)

    def _detect(self, totals: Totals, log_ratio: float) -> DriftStatus | None:
        settings, key = self.settings, cell_of(totals)
        changed = self._overall.observe(log_ratio)
        cell = self._cells.get(key)
        if cell is None:
            cell = self._cells[key] = _ChangeDetector(settings, settings.cell_warm_up, self._max_level)
        if cell.observe(log_ratio):
            cell.changed = cell.matters
        if self._alarmed or not (cell.changed or (changed and self._overall.matters)):
            return None
        self._alarmed = True
        return self.status()

    @property
    def bound_scale(self) -> float:
        """Current factor on the fitted bound."""
        return math.exp(self._log_bound)

    def corrected(self) -> FittedEstimator:
        """The estimator with the current corrections; make it from time to time, not at every step."""
        base = self.estimator
        p50_scale = base.p50_scale * math.exp(self._log_median)
        # The bound may not fall below the median.
        least = p50_scale / min(base.ratio.at(base.coverage))
        return base.with_scale(p50_scale, max(base.bound_scale * self.bound_scale, least))

    def status(self) -> DriftStatus:
        """The current state."""
        changed = [(cell, found.recent) for cell, found in self._cells.items() if found.changed]
        changed.sort(key=lambda pair: -abs(pair[1]))
        cells = tuple((cell, math.exp(recent)) for cell, recent in changed)
        within = self._within_bound
        return DriftStatus(
            self._steps,
            math.exp(self._log_median),
            self.bound_scale,
            sum(within) / len(within) if within else 1.0,
            self._alarmed,
            self._reason(cells) if self._alarmed else "",
            cells,
        )

    def _reason(self, cells: Sequence[tuple[Cell, float]]) -> str:
        named = "; ".join(f"{cell}: {100 * (ratio - 1):+.0f} %" for cell, ratio in cells[:5])
        percent = 100 * (math.exp(self._overall.recent) - 1)
        if abs(percent) >= 50 * self.settings.min_change:
            side = "longer" if percent >= 0 else "shorter"
            where = f" ({named})" if named else ""
            return f"Steps take {abs(percent):.0f} % {side} than fitted{where}. {_REMEDY}"
        if named:
            return f"Steps of some shapes take other times than fitted ({named}). {_REMEDY}"
        return f"Steps took other times than fitted for a while. {_REMEDY}"


_REMEDY = "Check the machine's load; if it is as usual, re-profile."


MINIMUM_STEPS = 50


def recalibrate(estimator: FittedEstimator, rows: Sequence[StepRow]) -> FittedEstimator:
    """The same model with its median scaled to a step log and its bound learned from it.

    The scale is the median of measured ÷ predicted over steps inside the measured domain. The report
    gains an ``update`` record with the error before and after. Raises :class:`FitError` for fewer than
    :data:`MINIMUM_STEPS` usable steps.
    """
    usable = [
        row
        for row in rows
        if row.shape.items
        and not DISTRUSTED & set(row.flags)
        and all(np.isfinite(s) and s > 0 for s in row.samples_ms)
    ]
    if len(usable) < MINIMUM_STEPS:
        raise FitError(
            f"{len(usable)} usable steps are too few to recalibrate on; {MINIMUM_STEPS} are needed.",
            "Let the server run longer, or profile it anew.",
        )
    fresh = estimator.with_scale(1.0, 1.0)
    totals = BatchTotals.stack([totals_of(row.shape.items) for row in usable])
    decode = BatchTotals.stack([decode_totals_of(row.shape) for row in usable])
    predicted, _ = fresh.predict_many(totals, decode)
    samples = [np.array(row.samples_ms) for row in usable]
    actual = np.array([row.median_ms for row in usable])
    inside = np.array([fresh.in_domain(row.shape) for row in usable])
    basis = inside if inside.sum() >= MINIMUM_STEPS else np.ones(len(usable), dtype=bool)
    ratio = actual[basis] / predicted[basis]
    scale = weighted_quantiles(ratio, np.ones(len(ratio)), [0.5])[0]
    bound = RatioBound.calibrate(predicted * scale, samples, totals.prefill > 0)
    # Bounds are stored in units of the unscaled model.
    bound = replace(bound, split_ms=bound.split_ms / scale)
    before, _ = estimator.predict_many(totals, decode)
    report = dict(estimator.report) | {
        "update": {
            "steps": len(usable),
            "in_domain": int(inside.sum()),
            "scale": scale,
            "before": relative_errors(before, actual),
            "after": relative_errors(predicted * scale, actual),
        }
    }
    return replace(estimator, ratio=bound, p50_scale=scale, bound_scale=scale, report=report)
