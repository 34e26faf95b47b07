"""From a score to an honest probability: isotonic steps where data allow, Platt's line where not.

Sources: Zadrozny and Elkan (KDD 2002) for isotonic, Platt (1999) for the logistic line; expected
calibration error as in Guo et al. (ICML 2017), with bins of equal count.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from wispprof.fitting.batch_totals import FloatArray

__all__ = ["Calibration", "expected_calibration_error", "reliability"]

ISOTONIC_ROWS = 1000
"""Niculescu-Mizil and Caruana (ICML 2005): isotonic overfits below about a thousand rows."""
KNOTS = 48
FLOOR = 0.002


@dataclass(frozen=True)
class Calibration:
    """A non-decreasing map from score to probability, linear between knots, flat beyond them."""

    method: str
    scores: tuple[float, ...]
    values: tuple[float, ...]

    @classmethod
    def fit(cls, score: FloatArray, accepted: np.ndarray, method: str = "auto") -> Self:
        """Learn from scores (n,) and outcomes (n,). ``method``: ``isotonic``, ``platt`` or ``auto``."""
        if method == "auto":
            method = "isotonic" if len(score) >= ISOTONIC_ROWS else "platt"
        knots = np.unique(np.quantile(score, np.linspace(0, 1, KNOTS)))
        if method == "platt":
            from sklearn.linear_model import LogisticRegression

            line = LogisticRegression(C=1e4).fit(score[:, None], accepted)
            slope = max(0.0, float(line.coef_[0, 0]))
            values = 1 / (1 + np.exp(-(slope * knots + float(line.intercept_[0]))))
        else:
            from sklearn.isotonic import IsotonicRegression

            # Averaging within bins of equal count first keeps single outcomes from making 0 or 1.
            place = np.clip(np.searchsorted(knots, score, side="right") - 1, 0, len(knots) - 1)
            count = np.bincount(place, minlength=len(knots)).astype(float)
            some = count > 0
            centre = np.bincount(place, score, len(knots))[some] / count[some]
            share = (np.bincount(place, accepted, len(knots))[some] + 1) / (count[some] + 2)
            values = IsotonicRegression().fit_transform(centre, share, sample_weight=count[some])
            knots = centre
        values = np.clip(values, FLOOR, 1 - FLOOR)
        return cls(method, tuple(float(s) for s in knots), tuple(float(v) for v in values))

    def __call__(self, score: float) -> float:
        scores, values = self.scores, self.values
        place = bisect_right(scores, score)
        if place == 0:
            return values[0]
        if place == len(scores):
            return values[-1]
        left = scores[place - 1]
        share = (score - left) / (scores[place] - left)
        return values[place - 1] + share * (values[place] - values[place - 1])

    def many(self, score: FloatArray) -> FloatArray:
        """The map over an array; (n,) to (n,)."""
        return np.interp(score, self.scores, self.values)

    def payload(self) -> dict[str, Any]:
        return {"method": self.method, "scores": list(self.scores), "values": list(self.values)}

    @classmethod
    def from_payload(cls, payload: dict[str, Any]) -> Self:
        scores = tuple(float(v) for v in payload["scores"])
        values = tuple(float(v) for v in payload["values"])
        if not scores or len(scores) != len(values) or not all(map(math.isfinite, scores)):
            raise ValueError("a calibration needs as many values as scores")
        return cls(str(payload["method"]), scores, values)


def reliability(
    probability: FloatArray, accepted: np.ndarray, bins: int = 10
) -> list[tuple[float, float, int]]:
    """(mean predicted, share accepted, rows) of bins of equal count, by rising prediction."""
    order = np.argsort(probability, kind="stable")
    parts = np.array_split(order, min(bins, len(order)))
    return [
        (float(probability[p].mean()), float(accepted[p].mean()), len(p)) for p in parts if len(p)
    ]


def expected_calibration_error(
    probability: FloatArray, accepted: np.ndarray, bins: int = 10
) -> float:
    """Mean distance between predicted and seen acceptance over bins of equal count."""
    curve = reliability(probability, accepted, bins)
    total = sum(n for _, _, n in curve)
    return sum(abs(p - a) * n for p, a, n in curve) / total
