"""Bring an estimator up to date with what a server saw: its median scaled, its bound recalibrated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from wispprof.artifacts.records import StepRow
from wispprof.errors import FitError
from wispprof.fitting.conformal import RatioBound, weighted_quantiles
from wispprof.fitting.estimator import FittedEstimator
from wispprof.fitting.features import decode_totals_of, totals_matrix
from wispprof.fitting.rows import DISTRUSTED
from wispprof.fitting.selection import relative_errors

__all__ = ["MINIMUM_STEPS", "recalibrate"]

MINIMUM_STEPS = 50


def recalibrate(estimator: FittedEstimator, rows: Sequence[StepRow]) -> FittedEstimator:
    """The same surface with its median scaled to the log and its bound learnt anew from it.

    The scale is the median of actual ÷ predicted over steps inside the measured domain. The report
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
    totals = totals_matrix([row.shape for row in usable])
    decode = np.array([decode_totals_of(row.shape) for row in usable], dtype=np.float64)
    predicted, _ = fresh.predict_many(totals, decode)
    samples = [np.array(row.samples_ms) for row in usable]
    actual = np.array([row.median_ms for row in usable])
    inside = np.array([fresh.in_domain(row.shape) for row in usable])
    basis = inside if inside.sum() >= MINIMUM_STEPS else np.ones(len(usable), dtype=bool)
    ratio = actual[basis] / predicted[basis]
    scale = weighted_quantiles(ratio, np.ones(len(ratio)), [0.5])[0]
    bound = RatioBound.calibrate(predicted * scale, samples, totals[:, 7] > 0)
    # Bounds are kept in units of the surface, whose median the scale has not touched.
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
