"""The manners of every estimator here, and the nonnegative least squares they share.

A *surface* maps the totals of a batch to median milliseconds. It is made by ``fit`` (learned attributes
end in ``_``), lies on disk as plain JSON, and is evaluated from plain numbers alone.
"""

from __future__ import annotations

from typing import Any, Protocol, Self

import numpy as np

from wispprof.fitting.features import FloatArray, Totals
from wispprof.fitting.rows import Observations

__all__ = ["Boxed", "Surface", "fit_nonnegative"]


class Surface(Protocol):
    """Totals of a batch to its median time.

    ``monotone`` says whether predictions are guaranteed never to fall when work is added.
    """

    kind: str
    monotone: bool

    def fit(self, data: Observations) -> Self:
        """Learn from observations and return self."""

    def again(self) -> Self:
        """An unfitted surface with the settings that this one's fit chose."""

    def p50(self, totals: Totals) -> float:
        """Median milliseconds of one non-empty batch."""

    def p50_many(self, totals: FloatArray) -> FloatArray:
        """The same for rows (n, 8); returns (n,). Equal to :meth:`p50` within rounding."""

    def inside(self, totals: Totals, high: Totals) -> float:
        """:meth:`p50` of the batch cut down to ``high``; never falls when work is added."""

    def inside_many(self, totals: FloatArray, high: FloatArray) -> FloatArray:
        """The same for rows (n, 8)."""

    def payload(self) -> dict[str, Any]:
        """Everything needed to evaluate the surface, as JSON."""

    @classmethod
    def from_payload(cls, payload: dict[str, Any]) -> Self:
        """A fitted surface from its payload."""


class Boxed:
    """``inside`` of surfaces that never fall in any single total: cut total by total."""

    def p50(self, totals: Totals) -> float:
        raise NotImplementedError

    def p50_many(self, totals: FloatArray) -> FloatArray:
        raise NotImplementedError

    def inside(self, totals: Totals, high: Totals) -> float:
        return self.p50(Totals(*(min(a, b) for a, b in zip(totals, high, strict=True))))

    def inside_many(self, totals: FloatArray, high: FloatArray) -> FloatArray:
        return self.p50_many(np.minimum(totals, high))


def fit_nonnegative(design: FloatArray, times_ms: FloatArray, ridge: float = 1e-6) -> FloatArray:
    """Weights ≥ 0 that minimise the relative error of ``design @ weights`` against ``times_ms``.

    Columns are scaled to one before a small ridge acts, so that units do not decide what is shrunk.
    Two passes reweight rows by the inverse of their absolute residual (towards the median, because
    timing noise has a tail on one side).
    """
    from sklearn.linear_model import LinearRegression

    scale = np.maximum(np.abs(design).max(axis=0), 1e-300)
    relative = design / scale / times_ms[:, None]
    width = design.shape[1]
    floor = np.sqrt(ridge * len(design)) * np.eye(width) * np.abs(relative).mean(axis=0)
    target = np.concatenate([np.ones(len(design)), np.zeros(width)])
    weight = np.ones(len(design))
    weights = np.zeros(width)
    for _ in range(3):
        root = np.sqrt(weight)[:, None]
        solver = LinearRegression(positive=True, fit_intercept=False)
        solver.fit(np.vstack([relative * root, floor]), target * np.append(root, np.ones(width)))
        weights = np.asarray(solver.coef_, dtype=np.float64)
        residual = np.abs(relative @ weights - 1.0)
        weight = 1.0 / np.maximum(residual, max(float(np.median(residual)), 1e-4))
        weight /= weight.mean()
    scaled: FloatArray = weights / scale
    return scaled
