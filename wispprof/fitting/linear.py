"""WISP's verification-time estimator (arXiv 2601.11652, section 5): four linear terms."""

from __future__ import annotations

from typing import Any, Self

import numpy as np

from wispprof.errors import FitError
from wispprof.fitting.base import Boxed, fit_nonnegative
from wispprof.fitting.features import FloatArray, Totals
from wispprof.fitting.rows import Observations

__all__ = ["WispLinear"]


class WispLinear(Boxed):
    """``a·Σ new + b·Σ new·(cached + new) + c·Σ cached + d``, all weights ≥ 0.

    ``coef_``: (4,) milliseconds per token, per token pair, per cached token, and per step.
    """

    kind = "wisp-linear"
    monotone = True

    def __init__(self) -> None:
        self.coef_: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)

    def fit(self, data: Observations) -> Self:
        a, b, c, d = fit_nonnegative(self._design(data.totals), data.median_ms).tolist()
        self.coef_ = (a, b, c, d)
        return self

    def again(self) -> Self:
        return type(self)()

    def p50(self, totals: Totals) -> float:
        a, b, c, d = self.coef_
        _, new, cached, cross, square, *_ = totals
        return a * new + b * (cross + square) + c * cached + d

    def p50_many(self, totals: FloatArray) -> FloatArray:
        a, b, c, d = self.coef_
        # The very operations of :meth:`p50`, in its order: both must round alike.
        result: FloatArray = (
            a * totals[:, 1] + b * (totals[:, 3] + totals[:, 4]) + c * totals[:, 2] + d
        )
        return result

    @staticmethod
    def _design(totals: FloatArray) -> FloatArray:
        new, cached, length = totals[:, 1], totals[:, 2], totals[:, 3] + totals[:, 4]
        return np.stack([new, length, cached, np.ones(len(totals))], axis=1)

    def payload(self) -> dict[str, Any]:
        return {"coef": list(self.coef_)}

    @classmethod
    def from_payload(cls, payload: dict[str, Any]) -> Self:
        surface = cls()
        coef = [float(v) for v in payload["coef"]]
        if len(coef) != 4 or min(coef) < 0:
            raise FitError("A wisp-linear estimator has four weights ≥ 0.", "Fit it anew.")
        surface.coef_ = (coef[0], coef[1], coef[2], coef[3])
        return surface
