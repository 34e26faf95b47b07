"""Vidur's way (arXiv 2405.05465, section 4.3): a random forest over batch features.

It can predict less time for more work, so the automatic choice never takes it; it stands here to be
compared with. Training uses scikit-learn, evaluation numpy alone.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np

from wispprof.fitting.base import Boxed
from wispprof.fitting.features import FloatArray, Totals
from wispprof.fitting.rows import Observations

__all__ = ["Forest"]


class Forest(Boxed):
    """Nodes of all trees in one array each: ``feature_`` (-1: leaf), ``threshold_``, ``left_``,
    ``right_``, ``value_``; ``roots_`` (trees,)."""

    kind = "forest"
    monotone = False

    def __init__(self, trees: int = 48, seed: int = 0) -> None:
        self.trees = trees
        self.seed = seed
        self.roots_ = np.zeros(0, dtype=np.int64)
        self.feature_ = np.zeros(0, dtype=np.int64)
        self.threshold_: FloatArray = np.zeros(0)
        self.left_ = np.zeros(0, dtype=np.int64)
        self.right_ = np.zeros(0, dtype=np.int64)
        self.value_: FloatArray = np.zeros(0)

    def fit(self, data: Observations) -> Self:
        from sklearn.ensemble import RandomForestRegressor

        model = RandomForestRegressor(self.trees, random_state=self.seed, n_jobs=1)
        model.fit(data.totals, data.median_ms)
        roots, start = [], 0
        parts: dict[str, list[np.ndarray]] = {k: [] for k in ("f", "t", "l", "r", "v")}
        for estimator in model.estimators_:
            tree = estimator.tree_
            leaf = tree.children_left < 0
            roots.append(start)
            parts["f"].append(np.where(leaf, -1, tree.feature))
            parts["t"].append(np.where(leaf, 0.0, tree.threshold))
            parts["l"].append(np.where(leaf, 0, tree.children_left + start))
            parts["r"].append(np.where(leaf, 0, tree.children_right + start))
            parts["v"].append(np.where(leaf, tree.value[:, 0, 0], 0.0))
            start += tree.node_count
        joined = {name: np.concatenate(values) for name, values in parts.items()}
        self._set(np.array(roots), joined)
        return self

    def _set(self, roots: np.ndarray, parts: dict[str, np.ndarray]) -> None:
        self.roots_ = roots.astype(np.int64)
        self.feature_, self.left_, self.right_ = (
            parts[k].astype(np.int64) for k in ("f", "l", "r")
        )
        self.threshold_, self.value_ = (parts[k].astype(np.float64) for k in ("t", "v"))

    def again(self) -> Self:
        return type(self)(self.trees, self.seed)

    def p50(self, totals: Totals) -> float:
        return float(self.p50_many(np.array([totals], dtype=np.float64))[0])

    def p50_many(self, totals: FloatArray) -> FloatArray:
        node = np.broadcast_to(self.roots_, (len(totals), len(self.roots_))).copy()
        row = np.arange(len(totals))[:, None]
        while True:
            feature = self.feature_[node]
            inner = feature >= 0
            if not inner.any():
                break
            low = totals[row, np.maximum(feature, 0)] <= self.threshold_[node]
            node = np.where(inner, np.where(low, self.left_[node], self.right_[node]), node)
        result: FloatArray = self.value_[node].mean(axis=1)
        return result

    def payload(self) -> dict[str, Any]:
        return {
            "roots": self.roots_.tolist(),
            "feature": self.feature_.tolist(),
            "threshold": self.threshold_.tolist(),
            "left": self.left_.tolist(),
            "right": self.right_.tolist(),
            "value": self.value_.tolist(),
        }

    @classmethod
    def from_payload(cls, payload: dict[str, Any]) -> Self:
        whole, real = np.int64, np.float64
        parts = {
            "f": np.array(payload["feature"], whole),
            "t": np.array(payload["threshold"], real),
            "l": np.array(payload["left"], whole),
            "r": np.array(payload["right"], whole),
            "v": np.array(payload["value"], real),
        }
        roots = np.array(payload["roots"], dtype=np.int64)
        surface = cls(len(roots))
        surface._set(roots, parts)
        nodes = np.arange(len(surface.feature_))
        inner = surface.feature_ >= 0
        if len({len(p) for p in parts.values()}) != 1 or not len(roots):
            raise ValueError("the forest's arrays differ in length")
        # Children after parents: a walk always ends, whatever the file says.
        if (np.minimum(surface.left_, surface.right_)[inner] <= nodes[inner]).any():
            raise ValueError("the forest has a cycle")
        if (np.maximum(surface.left_, surface.right_) >= len(nodes)).any():
            raise ValueError("the forest points outside itself")
        return surface
