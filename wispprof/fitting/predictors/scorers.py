"""The manners of a rejection predictor's score: learned here, evaluated from plain numbers at the edge.

Predictors of one feature: SLED's confidence threshold and vLLM's logistic on the top-2 margin.

WISP's predictor: a three-layer perceptron over four statistics, trained by scikit-learn, run by numpy.
"""

from __future__ import annotations

import warnings
from typing import Any, Protocol, Self

import numpy as np

from wispprof.fitting.batch_totals import FloatArray
from wispprof.fitting.predictors.training_rows import TokenRows
from wispprof.types import DraftFeatures

__all__ = [
    "MarginLogistic",
    "Scorer",
    "Threshold",
    "WispMlp",
]


class Scorer(Protocol):
    """Features of a draft token to a score that rises with the chance of acceptance."""

    kind: str

    def fit(self, rows: TokenRows) -> Self:
        """Learn from labelled tokens and return self; learned attributes end in ``_``."""

    def score(self, features: DraftFeatures, depth: int) -> float:
        """One token, in microseconds, with numpy at most."""

    def score_many(self, features: FloatArray, depth: np.ndarray) -> FloatArray:
        """Rows (n, 4) and depths (n,); returns (n,), equal to :meth:`score`."""

    def payload(self) -> dict[str, Any]:
        """Everything needed to evaluate it, as JSON."""

    @classmethod
    def from_payload(cls, payload: dict[str, Any]) -> Self:
        """A learned scorer from its payload."""


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


class WispMlp:
    """Two hidden layers and a logit (arXiv 2601.11652, section 4; widths are not published).

    ``layers_``: (weights, bias) of each layer, with the standardisation of the inputs folded into the
    first. Inputs are the four features and the depth in the round.
    """

    kind = "wisp-mlp"

    def __init__(self, hidden: tuple[int, int] = (32, 16), seed: int = 0) -> None:
        self.hidden = hidden
        self.seed = seed
        self.layers_: list[tuple[FloatArray, FloatArray]] = []

    def fit(self, rows: TokenRows) -> Self:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.neural_network import MLPClassifier

        table = np.column_stack([rows.features, rows.depth])
        mean, spread = table.mean(axis=0), np.maximum(table.std(axis=0), 1e-9)
        network = MLPClassifier(
            self.hidden,
            # Proposals of neighbouring positions repeat one another, so there is less to learn from than
            # rows: a strong penalty and few passes beat early stopping on held-out rows (AUC 0.917
            # against 0.893 on other prompts of the reference pair).
            alpha=2.0,
            batch_size=min(256, len(rows)),
            learning_rate_init=3e-3,
            max_iter=12,
            random_state=self.seed,
        )
        with warnings.catch_warnings():
            # Stopping at max_iter is the plan: held-out error is flat long before.
            warnings.simplefilter("ignore", ConvergenceWarning)
            network.fit((table - mean) / spread, rows.accepted)
        layers = [
            (np.asarray(w, dtype=np.float64), np.asarray(b, dtype=np.float64))
            for w, b in zip(network.coefs_, network.intercepts_, strict=True)
        ]
        first, bias = layers[0]
        layers[0] = (first / spread[:, None], bias - (mean / spread) @ first)
        self.layers_ = layers
        return self

    def score(self, features: DraftFeatures, depth: int) -> float:
        (w1, b1), (w2, b2), (w3, b3) = self.layers_
        hidden = np.array((*features, depth)) @ w1
        hidden += b1
        hidden = np.maximum(hidden, 0.0, out=hidden) @ w2
        hidden += b2
        return float((np.maximum(hidden, 0.0, out=hidden) @ w3)[0] + b3[0])

    def score_many(self, features: FloatArray, depth: np.ndarray) -> FloatArray:
        hidden: FloatArray = np.column_stack([features, depth])
        for weights, bias in self.layers_[:-1]:
            hidden = np.maximum(hidden @ weights + bias, 0.0)
        weights, bias = self.layers_[-1]
        result: FloatArray = (hidden @ weights + bias)[:, 0]
        return result

    def payload(self) -> dict[str, Any]:
        return {
            "hidden": list(self.hidden),
            "layers": [{"weights": w.tolist(), "bias": b.tolist()} for w, b in self.layers_],
        }

    @classmethod
    def from_payload(cls, payload: dict[str, Any]) -> Self:
        first, second = payload["hidden"]
        scorer = cls((int(first), int(second)))
        scorer.layers_ = [
            (
                np.array(layer["weights"], dtype=np.float64),
                np.array(layer["bias"], dtype=np.float64),
            )
            for layer in payload["layers"]
        ]
        widths = [w.shape for w, _ in scorer.layers_]
        if widths != [(5, first), (first, second), (second, 1)]:
            raise ValueError(f"layers of shapes {widths} are not a three-layer predictor")
        return scorer
