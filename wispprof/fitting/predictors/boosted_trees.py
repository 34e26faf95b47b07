"""A boosted-tree predictor, trained by LightGBM and run by numpy in one pass over all its nodes.

Evaluation follows QuickScorer (Lucchese et al., SIGIR 2015): every node is tested at once, each test
that fails strikes out the leaves of its left subtree, and the leftmost leaf that remains is the answer.
With at most 16 leaves a tree's leaves fit one 16-bit mask.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from wispprof.fitting.batch_totals import FloatArray
from wispprof.fitting.predictors.training_rows import TokenRows
from wispprof.types import DraftFeatures

__all__ = ["BoostedTrees"]

LEAVES = 16
ALL = 0xFFFF


def _lowest_bits() -> NDArray[np.int8]:
    mask = np.arange(1 << LEAVES, dtype=np.int64)
    lowest = np.zeros(1 << LEAVES, dtype=np.int8)
    for bit in range(LEAVES - 1, -1, -1):
        lowest[(mask >> bit) & 1 == 1] = bit
    return lowest


class BoostedTrees:
    """``feature_``, ``threshold_``, ``strike_`` (trees, nodes) and ``leaf_`` (trees, 16)."""

    kind = "lightgbm"

    def __init__(self, trees: int = 60, seed: int = 0) -> None:
        self.trees = trees
        self.seed = seed
        empty = np.zeros((0, LEAVES - 1))
        self._set(empty.astype(np.int64), empty, empty.astype(np.int64), np.zeros((0, LEAVES)))

    def _set(
        self, feature: np.ndarray, threshold: FloatArray, strike: np.ndarray, leaf: FloatArray
    ) -> None:
        self.feature_ = feature
        self.threshold_ = threshold
        self.strike_ = strike.astype(np.uint16)
        self.leaf_ = leaf
        self._lowest = _lowest_bits()
        self._rows = np.arange(len(leaf)) * LEAVES
        self._flat = leaf.reshape(-1)

    def fit(self, rows: TokenRows) -> Self:
        import lightgbm

        table = np.column_stack([rows.features, rows.depth]).astype(np.float64)
        parameters = {
            "objective": "binary",
            # Small trees and large leaves, for the reason given in the perceptron.
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
        strike = np.full(shape, ALL, dtype=np.int64)
        leaf = np.zeros((len(trees), LEAVES))
        for number, root in enumerate(trees):
            nodes: list[tuple[int, float, int]] = []
            _walk(root, 0, nodes, leaf[number])
            for place, (column, limit, mask) in enumerate(nodes):
                feature[number, place], threshold[number, place] = column, limit
                strike[number, place] = mask
        self._set(feature, threshold, strike, leaf)
        return self

    def score(self, features: DraftFeatures, depth: int) -> float:
        failed = np.array((*features, depth))[self.feature_] > self.threshold_
        left = np.bitwise_and.reduce(np.where(failed, self.strike_, ALL16), axis=1)
        return float(self._flat[self._rows + self._lowest[left]].sum())

    def score_many(self, features: FloatArray, depth: np.ndarray) -> FloatArray:
        table = np.column_stack([features, depth])
        total = np.zeros(len(table))
        for number in range(len(self.leaf_)):
            failed = table[:, self.feature_[number]] > self.threshold_[number]
            left = np.bitwise_and.reduce(np.where(failed, self.strike_[number], ALL16), axis=1)
            total += self.leaf_[number, self._lowest[left]]
        return total

    def payload(self) -> dict[str, Any]:
        finite = np.where(np.isfinite(self.threshold_), self.threshold_, np.finfo(float).max)
        return {
            "feature": self.feature_.tolist(),
            "threshold": finite.tolist(),
            "strike": self.strike_.tolist(),
            "leaf": self.leaf_.tolist(),
        }

    @classmethod
    def from_payload(cls, payload: dict[str, Any]) -> Self:
        leaf = np.array(payload["leaf"], dtype=np.float64)
        feature = np.array(payload["feature"], dtype=np.int64)
        threshold = np.array(payload["threshold"], dtype=np.float64)
        strike = np.array(payload["strike"], dtype=np.int64)
        nodes = (len(leaf), LEAVES - 1)
        if leaf.ndim != 2 or leaf.shape[1] != LEAVES or feature.shape != nodes:
            raise ValueError("the trees do not have 16 leaves each")
        if threshold.shape != nodes or strike.shape != nodes or not 0 <= feature.min() <= 4:
            raise ValueError("the trees' nodes are malformed")
        scorer = cls(len(leaf))
        scorer._set(feature, threshold, strike, leaf)
        return scorer


ALL16 = np.uint16(ALL)


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
    nodes.append((0, 0.0, ALL))
    middle = _walk(node["left_child"], first, nodes, leaf)
    last = _walk(node["right_child"], middle, nodes, leaf)
    struck = ((1 << middle) - 1) & ~((1 << first) - 1)
    nodes[place] = (int(node["split_feature"]), float(node["threshold"]), ALL & ~struck)
    return last
