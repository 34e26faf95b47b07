"""Rejection predictors: features of a draft token to the chance that the target keeps it."""

from wispprof.fitting.predictors.fitted_predictor import (
    PREDICTOR_KINDS,
    FittedPredictor,
    fit_predictor,
    fit_scorer,
    judge,
    load_predictor,
)

__all__ = [
    "PREDICTOR_KINDS",
    "FittedPredictor",
    "fit_predictor",
    "fit_scorer",
    "judge",
    "load_predictor",
]
