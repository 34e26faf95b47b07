"""Drift: compare predicted with measured step times while serving, and correct without re-profiling.

- The *median* is corrected by a slow multiplicative step on the sign of the error: a running median of the
  log ratio, which an outlier cannot move far.
- The *bound* is corrected by adaptive conformal inference (Gibbs and Candès, NeurIPS 2021, in the scale-free
  form of Angelopoulos et al., "Conformal PID control", 2023). Each miss raises a log factor and each hit
  lowers it, in the ratio that gives the stated long-run miss rate.
- The *detector* is a two-sided CUSUM (Page, 1954) on whitened log residuals of the uncorrected predictions,
  per cell of the shape space and for all cells together. It advises a new profile and names the cells.

:func:`recalibrate` scales an estimator's median to a server's step log and learns its bound anew.
"""

from __future__ import annotations

import math
import statistics
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
    """``warm_up``: steps from which the detector learns the stream's centre and spread, both robust
    against outliers. The centre may lie as far from 0 as nine of ten held-out errors of the estimator did
    (``trust`` if its report does not tell). Otherwise an estimator that is wrong from the first step on
    would pass.

    ``slack`` and ``limit``: CUSUM allowance and threshold in standard deviations; with 0.5 and 16 a
    stream of independent errors runs for millions of steps without an alarm. ``clip``: largest whitened
    residual that counts, so that a single stall is no drift. ``rate``: step of the bound's log factor in
    units of the residuals' spread; ``median_rate``: that of the median. ``meaningful``: least relative
    change that is worth a new profile.
    """

    warm_up: int = 100
    slack: float = 0.5
    limit: float = 16.0
    clip: float = 3.0
    rate: float = 0.25
    median_rate: float = 0.05
    meaningful: float = 0.05
    cell_warm_up: int = 30
    trust: float = 0.25


class Cell(NamedTuple):
    """A region of shape space: powers of two of new tokens and deepest cache, with or without chunks."""

    new: int
    cached: int
    prefill: bool

    def __str__(self) -> str:
        high_new, high_cached = 2**self.new, 2**self.cached
        chunks = " with prompt chunks" if self.prefill else ""
        return f"≤ {high_new} new tokens over ≤ {high_cached} cached{chunks}"


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
class _Track:
    """Running centre, spread and CUSUM of one stream of log ratios."""

    count: int = 0
    mean: float = 0.0
    spread: float = 0.0
    first: list[float] = field(default_factory=list)
    up: float = 0.0
    down: float = 0.0
    recent: float = 0.0

    def observe(
        self, value: float, settings: DriftSettings, warm_up: int, least: float, trust: float
    ) -> bool:
        """Add one log ratio; whether the stream has left its starting level, which lies within ``trust``
        of 0."""
        self.count += 1
        self.recent += (value - self.recent) / min(self.count, 50)
        if self.count <= warm_up:
            self.first.append(value)
            if self.count == warm_up:
                centre, self.spread = _level(self.first)
                self.mean = max(-trust, min(trust, centre))
                self.first.clear()
            return False
        spread = max(self.spread, least)
        score = max(-settings.clip, min(settings.clip, (value - self.mean) / spread))
        # A start level known from few steps is itself uncertain by spread / √steps.
        slack = settings.slack + 2.0 / math.sqrt(warm_up)
        self.up = max(0.0, self.up + score - slack)
        self.down = max(0.0, self.down - score - slack)
        return max(self.up, self.down) > settings.limit


def _level(values: list[float]) -> tuple[float, float]:
    """Robust centre and spread: mean and standard deviation with values clipped at three robust deviations
    from the median."""
    middle = statistics.median(values)
    reach = 3.0 * 1.4826 * statistics.median([abs(v - middle) for v in values])
    clipped = [max(middle - reach, min(middle + reach, v)) for v in values]
    return statistics.fmean(clipped), statistics.pstdev(clipped)


@dataclass(slots=True)
class DriftMonitor:
    """Observes every step; gives the corrected estimator and the drift status.

    ``estimator``: as fitted. :meth:`observe` costs a few microseconds.
    """

    estimator: FittedEstimator
    settings: DriftSettings = field(default_factory=DriftSettings)
    _trust: float = 0.0
    _log_ratio: float = 0.0
    _log_bound: float = 0.0
    _spread: float = 0.05
    _steps: int = 0
    _hits: list[bool] = field(default_factory=list)
    _all: _Track = field(default_factory=_Track)
    _cells: dict[Cell, _Track] = field(default_factory=dict)
    _drifted: dict[Cell, bool] = field(default_factory=dict)
    _alarmed: bool = False

    def __post_init__(self) -> None:
        report = self.estimator.report
        held_out = report.get("held_out", {}).get(self.estimator.kind, {})
        within = held_out.get("p90_ape")
        self._trust = self.settings.trust if within is None else math.log1p(within / 100.0)

    def observe(self, shape: BatchShape, measured_ms: float) -> DriftStatus | None:
        """Add a finished step. Returns the status at the step that raises the first alarm.

        Steps without a positive, finite time are ignored.
        """
        if not shape.items or not math.isfinite(measured_ms) or measured_ms <= 0:
            return None
        base = self.estimator
        p50, bound = base.predict(shape)
        ratio = math.log(measured_ms / p50)
        self._steps += 1
        hit = measured_ms <= bound * math.exp(self._log_bound)
        if len(self._hits) == 500:
            self._hits[self._steps % 500] = hit
        else:
            self._hits.append(hit)
        self._correct(ratio, hit)
        return self._detect(totals_of(shape.items), ratio)

    def _correct(self, ratio: float, hit: bool) -> None:
        settings = self.settings
        error = ratio - self._log_ratio
        self._spread += 0.02 * (min(abs(error), 10 * self._spread) - self._spread)
        scale = max(self._spread, 0.002)
        # Far from the median the correction takes longer steps.
        urgency = min(4.0, max(1.0, abs(error) / scale / 3))
        self._log_ratio += settings.median_rate * scale * urgency * math.copysign(1.0, error)
        miss = 1.0 - self.estimator.coverage
        self._log_bound += settings.rate * scale * ((0.0 if hit else 1.0) - miss)

    def _detect(self, totals: Totals, ratio: float) -> DriftStatus | None:
        settings = self.settings
        least = settings.meaningful / 4
        trust = self._trust
        moved = self._all.observe(ratio, settings, settings.warm_up, least, trust)
        cell = cell_of(totals)
        track = self._cells.setdefault(cell, _Track())
        if track.observe(ratio, settings, settings.cell_warm_up, least, trust):
            self._drifted[cell] = abs(track.recent - track.mean) >= settings.meaningful
        large = abs(self._all.recent - self._all.mean) >= settings.meaningful
        if not self._alarmed and ((moved and large) or any(self._drifted.values())):
            self._alarmed = True
            return self.status()
        return None

    @property
    def bound_scale(self) -> float:
        """Factor on the fitted bound now."""
        return math.exp(self._log_bound)

    def corrected(self) -> FittedEstimator:
        """The estimator with the current corrections; make it from time to time, not at every step."""
        base = self.estimator
        median = math.exp(self._log_ratio)
        p50_scale = base.p50_scale * median
        # The bound may not fall below the median.
        least = p50_scale / min(base.ratio.at(base.coverage))
        return base.with_scale(p50_scale, max(base.bound_scale * self.bound_scale, least))

    def status(self) -> DriftStatus:
        """The current state."""
        cells = tuple(
            sorted(
                (
                    (cell, math.exp(track.recent))
                    for cell, track in self._cells.items()
                    if self._drifted.get(cell)
                ),
                key=lambda pair: -abs(math.log(pair[1])),
            )
        )
        ratio = math.exp(self._log_ratio)
        reason = ""
        if self._alarmed:
            where = "; ".join(f"{cell}: {100 * (r - 1):+.0f} %" for cell, r in cells[:5])
            away = 100 * (math.exp(self._all.recent) - 1)
            if abs(away) >= 50 * self.settings.meaningful:
                side = "longer" if away >= 0 else "shorter"
                reason = f"Steps take {abs(away):.0f} % {side} than predicted: re-profile"
                reason += f" ({where})." if where else "."
            else:
                which = f"of some shapes take other times than predicted: re-profile ({where})."
                past = "took other times than predicted for a while: re-profile."
                reason = f"Steps {which if where else past}"
        covered = sum(self._hits) / len(self._hits) if self._hits else 1.0
        return DriftStatus(self._steps, ratio, self.bound_scale, covered, self._alarmed, reason, cells)


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
