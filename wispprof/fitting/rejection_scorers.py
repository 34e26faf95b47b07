"""Scores of draft tokens, learned from traces and evaluated after each token from plain numbers.

``threshold`` follows SLED, ``margin-logistic`` vLLM, ``wisp-mlp`` WISP; ``lightgbm`` is this project's.
Training uses scikit-learn and LightGBM; evaluation uses numpy at most.
"""

from __future__ import annotations

import warnings
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from wispprof.fitting.batch_totals import FloatArray
from wispprof.fitting.token_rows import TokenRows
from wispprof.types import DraftFeatures


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
        """A fitted scorer from its payload."""


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
            # Proposals at neighbouring positions are similar, so rows overstate the data: a strong penalty
            # and few passes beat early stopping (AUC 0.917 against 0.893 on the reference pair).
            alpha=2.0,
            batch_size=min(256, len(rows)),
            learning_rate_init=3e-3,
            max_iter=12,
            random_state=self.seed,
        )
        with warnings.catch_warnings():
            # Training stops at max_iter on purpose: held-out error is flat long before.
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


LEAVES = 16
ALL_LEAVES = np.uint16(0xFFFF)


def _lowest_bits() -> NDArray[np.int8]:
    """The place of the lowest set bit of every 16-bit mask."""
    mask = np.arange(1, 1 << LEAVES, dtype=np.int64)
    return np.append(0, np.log2(mask & -mask)).astype(np.int8)


class BoostedTrees:
    """Boosted trees, trained by LightGBM and evaluated by numpy in one pass over all nodes (QuickScorer,
    Lucchese et al., SIGIR 2015): each failed test masks out the leaves of its left subtree, and the
    leftmost remaining leaf is the answer. At most 16 leaves fit one 16-bit mask.

    One token takes 11 µs, with LightGBM's own ``predict`` 29 µs (60 trees, one x86 core).

    ``feature_``, ``threshold_``, ``mask_`` (trees, nodes) and ``leaf_`` (trees, 16).
    """

    kind = "lightgbm"

    def __init__(self, trees: int = 60, seed: int = 0) -> None:
        self.trees = trees
        self.seed = seed
        empty = np.zeros((0, LEAVES - 1))
        self._set(empty.astype(np.int64), empty, empty.astype(np.int64), np.zeros((0, LEAVES)))

    def _set(
        self, feature: np.ndarray, threshold: FloatArray, mask: np.ndarray, leaf: FloatArray
    ) -> None:
        self.feature_ = feature
        self.threshold_ = threshold
        self.mask_ = mask.astype(np.uint16)
        self.leaf_ = leaf
        self._lowest = _lowest_bits()
        self._rows = np.arange(len(leaf)) * LEAVES
        self._flat = leaf.reshape(-1)

    def fit(self, rows: TokenRows) -> Self:
        import lightgbm

        table = np.column_stack([rows.features, rows.depth]).astype(np.float64)
        parameters = {
            "objective": "binary",
            # Small trees and large leaves, for the reason given in WispMlp.
            "num_leaves": 4,
            "max_depth": 3,
            "learning_rate": 0.04,
            "min_data_in_leaf": max(10, len(rows) // 30),
            "lambda_l2": 20.0,
            "feature_fraction": 0.8,
            "bagging_fraction": 0.8,
            "bagging_freq": 1,
            "seed": self.seed,
            "num_threads": 1,
            "deterministic": True,
            "verbosity": -1,
        }
        model = lightgbm.train(
            parameters, lightgbm.Dataset(table, label=rows.accepted.astype(float)), self.trees
        )
        trees = [t["tree_structure"] for t in model.dump_model()["tree_info"]]
        shape = (len(trees), LEAVES - 1)
        feature = np.zeros(shape, dtype=np.int64)
        threshold = np.full(shape, np.inf)
        mask = np.full(shape, 0xFFFF, dtype=np.int64)
        leaf = np.zeros((len(trees), LEAVES))
        for number, root in enumerate(trees):
            nodes: list[tuple[int, float, int]] = []
            _walk(root, 0, nodes, leaf[number])
            for place, node in enumerate(nodes):
                feature[number, place], threshold[number, place], mask[number, place] = node
        self._set(feature, threshold, mask, leaf)
        return self

    def score(self, features: DraftFeatures, depth: int) -> float:
        failed = np.array((*features, depth))[self.feature_] > self.threshold_
        left = np.bitwise_and.reduce(np.where(failed, self.mask_, ALL_LEAVES), axis=1)
        return float(self._flat[self._rows + self._lowest[left]].sum())

    def score_many(self, features: FloatArray, depth: np.ndarray) -> FloatArray:
        table = np.column_stack([features, depth])
        total = np.zeros(len(table))
        for number in range(len(self.leaf_)):
            failed = table[:, self.feature_[number]] > self.threshold_[number]
            left = np.bitwise_and.reduce(np.where(failed, self.mask_[number], ALL_LEAVES), axis=1)
            total += self.leaf_[number, self._lowest[left]]
        return total

    def payload(self) -> dict[str, Any]:
        finite = np.where(np.isfinite(self.threshold_), self.threshold_, np.finfo(float).max)
        return {
            "feature": self.feature_.tolist(),
            "threshold": finite.tolist(),
            "mask": self.mask_.tolist(),
            "leaf": self.leaf_.tolist(),
        }

    @classmethod
    def from_payload(cls, payload: dict[str, Any]) -> Self:
        leaf = np.array(payload["leaf"], dtype=np.float64)
        feature = np.array(payload["feature"], dtype=np.int64)
        threshold = np.array(payload["threshold"], dtype=np.float64)
        mask = np.array(payload["mask"], dtype=np.int64)
        nodes = (len(leaf), LEAVES - 1)
        if leaf.ndim != 2 or leaf.shape[1] != LEAVES or feature.shape != nodes:
            raise ValueError("the trees do not have 16 leaves each")
        if threshold.shape != nodes or mask.shape != nodes or not 0 <= feature.min() <= 4:
            raise ValueError("the trees' nodes are malformed")
        scorer = cls(len(leaf))
        scorer._set(feature, threshold, mask, leaf)
        return scorer


def _walk(
    node: dict[str, Any], first: int, nodes: list[tuple[int, float, int]], leaf: FloatArray
) -> int:
    """Number leaves from the left, ``first`` on; returns the number after the last."""
    if "leaf_value" in node and "split_feature" not in node:
        leaf[first] = node["leaf_value"]
        return first + 1
    if node["decision_type"] != "<=":
        raise ValueError("only numerical splits are expected")
    place = len(nodes)
    nodes.append((0, 0.0, 0xFFFF))
    middle = _walk(node["left_child"], first, nodes, leaf)
    last = _walk(node["right_child"], middle, nodes, leaf)
    masked = ((1 << middle) - 1) & ~((1 << first) - 1)
    nodes[place] = (int(node["split_feature"]), float(node["threshold"]), 0xFFFF & ~masked)
    return last
