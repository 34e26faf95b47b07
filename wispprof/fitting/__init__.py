"""Verification-time estimators, rejection predictors, and their held-out evaluation. No torch."""

from wispprof.fitting.estimator import ESTIMATOR_KINDS, FittedEstimator, load_estimator
from wispprof.fitting.pipeline import fit_estimator
from wispprof.fitting.rejection_predictor import (
    PREDICTOR_KINDS,
    FittedPredictor,
    fit_predictor,
    load_predictor,
)

__all__ = [
    "ESTIMATOR_KINDS",
    "PREDICTOR_KINDS",
    "FittedEstimator",
    "FittedPredictor",
    "fit_estimator",
    "fit_predictor",
    "load_estimator",
    "load_predictor",
]
