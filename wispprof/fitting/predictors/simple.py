"""Predictors of one feature: SLED's confidence threshold and vLLM's logistic on the top-2 margin."""

from __future__ import annotations

from typing import Any, Self

import numpy as np

from wispprof.core import DraftFeatures
from wispprof.fitting.features import FloatArray
from wispprof.fitting.predictors.data import TokenRows

__all__ = ["MarginLogistic", "Threshold"]


class Threshold:
    """SLED (arXiv 2506.09397): the draft's confidence as it is."""

    kind = "threshold"

    def fit(self, rows: TokenRows) -> Self:
        return self

    def score(self, features: DraftFeatures, depth: int) -> float:
        return features[0]

    def score_many(self, features: FloatArray, depth: np.ndarray) -> FloatArray:
        return features[:, 0]

    def payload(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_payload(cls, payload: dict[str, Any]) -> Self:
        return cls()


class MarginLogistic:
    """A logistic line over the margin between the two best logits. ``weights_``: slope, intercept."""

    kind = "margin-logistic"

    def __init__(self) -> None:
        self.weights_: tuple[float, float] = (1.0, 0.0)

    def fit(self, rows: TokenRows) -> Self:
        from sklearn.linear_model import LogisticRegression

        line = LogisticRegression().fit(rows.features[:, 2:3], rows.accepted)
        self.weights_ = (float(line.coef_[0, 0]), float(line.intercept_[0]))
        return self

    def score(self, features: DraftFeatures, depth: int) -> float:
        slope, intercept = self.weights_
        return slope * features[2] + intercept

    def score_many(self, features: FloatArray, depth: np.ndarray) -> FloatArray:
        slope, intercept = self.weights_
        return slope * features[:, 2] + intercept

    def payload(self) -> dict[str, Any]:
        return {"weights": list(self.weights_)}

    @classmethod
    def from_payload(cls, payload: dict[str, Any]) -> Self:
        scorer = cls()
        slope, intercept = payload["weights"]
        scorer.weights_ = (float(slope), float(intercept))
        return scorer
