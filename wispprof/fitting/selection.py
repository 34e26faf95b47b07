"""Fit every estimator on one profile and choose by held-out error."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from wispprof.artifacts.rows import StepRow
from wispprof.errors import FitError
from wispprof.fitting.batch_totals import FloatArray, select
from wispprof.fitting.conformal import RatioBound
from wispprof.fitting.estimator import (
    ESTIMATOR_KINDS,
    Domain,
    FittedEstimator,
    model_class,
)
from wispprof.fitting.observations import Observations
from wispprof.fitting.step_time_models import StepTimeModel

__all__ = ["assemble", "fit_estimator", "folds_of", "out_of_fold", "relative_errors"]

FOLDS = 10


def folds_of(data: Observations, folds: int = FOLDS, seed: int = 0) -> np.ndarray:
    """Fold of each shape, (n,), by a hash of its key: whole shapes, the same on every run."""
    ranks = np.array([zlib.crc32(f"{seed}:{key}".encode()) for key in data.groups])
    fold = np.empty(len(data), dtype=np.int64)
    fold[np.argsort(ranks, kind="stable")] = np.arange(len(data)) % folds
    return fold


def out_of_fold(
    kind: str, data: Observations, folds: int = FOLDS, seed: int = 0, nested: bool = True
) -> tuple[FloatArray, StepTimeModel]:
    """Predictions made without their own shape, (n,), and the model fitted on all shapes.

    Without ``nested`` the settings (not the weights) are those that the fit on all shapes chose. That is
    much quicker, and precise enough for a bound whose coverage is then tested on other shapes.
    """
    whole = model_class(kind)().fit(data)
    fold = folds_of(data, min(folds, len(data)), seed)
    predicted = np.empty(len(data))
    for number in np.unique(fold):
        held = fold == number
        part = (model_class(kind)() if nested else whole.clone_unfitted()).fit(data.take(~held))
        predicted[held] = part.p50_many(select(data.totals, held))
    return predicted, whole


def relative_errors(predicted: FloatArray, actual: FloatArray) -> dict[str, float]:
    """MAPE, median, p90, p99 absolute percentage error and signed bias, all in percent."""
    signed = 100.0 * (predicted / actual - 1.0)
    size = np.abs(signed)
    p50, p90, p99 = np.quantile(size, (0.5, 0.9, 0.99))
    return {
        "mape": float(size.mean()),
        "median_ape": float(p50),
        "p90_ape": float(p90),
        "p99_ape": float(p99),
        "bias": float(signed.mean()),
    }


def assemble(
    step_model: StepTimeModel, predicted: FloatArray, data: Observations, coverage: float = 0.95
) -> FittedEstimator:
    """An estimator from a model fitted on all of ``data`` and out-of-fold predictions."""
    ratio = RatioBound.calibrate(np.maximum(predicted, 1e-9), data.samples, data.totals.prefill > 0)
    return FittedEstimator(step_model, ratio, Domain.of(data.totals), coverage)


def fit_estimator(
    rows: Sequence[StepRow] | Observations,
    kind: str = "auto",
    coverage: float = 0.95,
    kinds: Sequence[str] = ESTIMATOR_KINDS,
) -> FittedEstimator:
    """Fit a verification-time estimator on profile rows.

    ``kind`` names a step-time model; ``auto`` fits all of ``kinds`` and keeps the one of least held-out
    error among the monotone ones. ``.report`` holds the comparison.
    Raises :class:`FitError` for rows that :func:`~wispprof.fitting.observations.check_rows` refuses.
    """
    data = rows if isinstance(rows, Observations) else Observations.of(rows)
    tried = tuple(kinds) if kind == "auto" else (kind,)
    fitted: dict[str, FittedEstimator] = {}
    errors: dict[str, dict[str, float]] = {}
    for name in tried:
        predicted, step_model = out_of_fold(name, data)
        errors[name] = relative_errors(predicted, data.median_ms)
        fitted[name] = assemble(step_model, predicted, data, coverage)
    eligible = (
        [n for n in tried if fitted[n].step_model.monotone] if kind == "auto" else list(tried)
    )
    if not eligible:
        raise FitError("None of the estimators tried is monotone.", "Add wisp-linear to them.")
    best = min(eligible, key=lambda n: errors[n]["mape"])
    noise = data.repeat_noise()
    report: dict[str, Any] = {
        "chosen": best,
        "requested": kind,
        "held_out": errors,
        "monotone": {n: fitted[n].step_model.monotone for n in tried},
        "shapes": len(data),
        "samples": int(sum(len(s) for s in data.samples)),
        "repeat_noise_percent": float(100 * np.median(noise)),
        "coverage": coverage,
        "flagged_rows": {"kept": data.flagged, "left_out": data.left_out},
        "drift_percent": float(100 * (np.exp(data.drift) - 1)),
    }
    fitted[best].report.update(report)
    return fitted[best]
