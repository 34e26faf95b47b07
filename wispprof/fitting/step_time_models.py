"""Step-time models: batch totals to median milliseconds. Baselines, and the fit that linear models share.

``wisp-linear`` follows WISP, ``staircase`` vLLM's start-up profiling, ``forest`` Vidur. Each is learned
by ``fit``, is stored as plain JSON, and predicts from plain numbers.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from typing import Any, Protocol, Self

import numpy as np

from wispprof.errors import FitError
from wispprof.fitting.batch_totals import ArrayTotals, FloatArray, Totals, clipped
from wispprof.fitting.observations import Observations
from wispprof.types import BatchTotals


class StepTimeModel(Protocol):
    """Totals of a batch to its median time.

    ``monotone``: predictions never fall if work is added.
    """

    kind: str
    monotone: bool

    def fit(self, data: Observations) -> Self:
        """Learn from observations and return self."""

    def clone_unfitted(self) -> Self:
        """An unfitted model with the settings that this one's fit chose."""

    def p50(self, totals: Totals) -> float:
        """Median milliseconds of one non-empty batch."""

    def p50_many(self, totals: ArrayTotals) -> FloatArray:
        """:meth:`p50` of n batches, (n,); equal within rounding."""

    def clipped(self, totals: Totals, high: Totals) -> float:
        """:meth:`p50` of the batch cut to ``high``; never falls if work is added."""

    def clipped_many(self, totals: ArrayTotals, high: Totals) -> FloatArray:
        """:meth:`clipped` of n batches, (n,)."""

    def payload(self) -> dict[str, Any]:
        """Everything needed to predict, as JSON."""

    @classmethod
    def from_payload(cls, payload: dict[str, Any]) -> Self:
        """A fitted model from its payload."""


class ClippedMixin:
    """``clipped`` for models that never fall in any single total: cuts total by total."""

    def p50(self, totals: Totals) -> float:
        raise NotImplementedError

    def p50_many(self, totals: ArrayTotals) -> FloatArray:
        raise NotImplementedError

    def clipped(self, totals: Totals, high: Totals) -> float:
        return self.p50(BatchTotals(*map(min, totals, high)))

    def clipped_many(self, totals: ArrayTotals, high: Totals) -> FloatArray:
        return self.p50_many(clipped(totals, high))


def fit_nonnegative(design: FloatArray, times_ms: FloatArray, ridge: float = 1e-6) -> FloatArray:
    """Weights ≥ 0 that minimise the relative error of ``design @ weights`` against ``times_ms``.

    Columns are scaled to one before a small ridge acts, so that units do not decide what is shrunk.
    Two more passes reweight rows by the inverse of their absolute residual: timing noise is skewed, so
    the fit should approach the median.
    """
    from scipy.optimize import nnls

    scale = np.maximum(np.abs(design).max(axis=0), 1e-300)
    relative = design / scale / times_ms[:, None]
    width = design.shape[1]
    shrink = np.sqrt(ridge * len(design)) * np.eye(width) * np.abs(relative).mean(axis=0)
    target = np.concatenate([np.ones(len(design)), np.zeros(width)])
    row_weights = np.ones(len(design))
    weights = np.zeros(width)
    for _ in range(3):
        root = np.sqrt(row_weights)[:, None]
        weights = nnls(
            np.vstack([relative * root, shrink]), target * np.append(root, np.ones(width))
        )[0]
        residual = np.abs(relative @ weights - 1.0)
        row_weights = 1.0 / np.maximum(residual, max(float(np.median(residual)), 1e-4))
        row_weights /= row_weights.mean()
    scaled: FloatArray = weights / scale
    return scaled


class WispLinear(ClippedMixin):
    """WISP's estimator (arXiv 2601.11652, section 5), with all weights ≥ 0:

    ``a·Σ new + b·Σ new·(cached + new) + c·Σ cached + d``.

    ``coef_``: (4,) milliseconds per token, per token pair, per cached token, and per step.
    """

    kind = "wisp-linear"
    monotone = True

    def __init__(self) -> None:
        self.coef_: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)

    def fit(self, data: Observations) -> Self:
        totals = data.totals
        pairs = totals.sum_new_cached + totals.sum_new_sq
        design = [totals.sum_new, pairs, totals.sum_cached, np.ones(len(data))]
        a, b, c, d = fit_nonnegative(np.stack(design, axis=1), data.median_ms).tolist()
        self.coef_ = (a, b, c, d)
        return self

    def clone_unfitted(self) -> Self:
        return type(self)()

    def p50(self, totals: Totals) -> float:
        a, b, c, d = self.coef_
        _, new, cached, new_cached, new_sq, *_ = totals
        return a * new + b * (new_cached + new_sq) + c * cached + d

    def p50_many(self, totals: ArrayTotals) -> FloatArray:
        a, b, c, d = self.coef_
        # The operations of :meth:`p50` in its order: both must round alike.
        result: FloatArray = (
            a * totals.sum_new
            + b * (totals.sum_new_cached + totals.sum_new_sq)
            + c * totals.sum_cached
            + d
        )
        return result

    def payload(self) -> dict[str, Any]:
        return {"coef": list(self.coef_)}

    @classmethod
    def from_payload(cls, payload: dict[str, Any]) -> Self:
        model = cls()
        coef = [float(v) for v in payload["coef"]]
        if len(coef) != 4 or min(coef) < 0:
            raise FitError("A wisp-linear estimator has four weights ≥ 0.", "Fit it anew.")
        model.coef_ = (coef[0], coef[1], coef[2], coef[3])
        return model


class Staircase(ClippedMixin):
    """Time by padded tokens, measured at one context length, as vLLM profiles itself at start-up.

    ``steps_``: token counts; ``times_``: ms of a step padded to each, never falling. The context is the
    one that most shapes were measured at. Beyond the last step, time grows in proportion.
    """

    kind = "staircase"
    monotone = True

    def __init__(self) -> None:
        self.steps_: list[float] = []
        self.times_: list[float] = []
        self.context_ = 0.0

    def fit(self, data: Observations) -> Self:
        plain = data.totals.prefill == 0
        used = data.take(plain) if plain.sum() >= 4 else data
        mean = used.totals.sum_cached / used.totals.items
        tokens = np.where(used.padded > 0, used.padded, used.totals.sum_new)
        values, counts = np.unique(np.round(np.log2(1 + mean), 1), return_counts=True)
        modal = values[np.argmax(counts)]
        distance = np.abs(np.log2(1 + mean) - modal)
        self.context_ = float(2**modal - 1)
        steps = np.unique(tokens)
        times = []
        for count in steps:
            same = np.flatnonzero(tokens == count)
            nearest = same[distance[same] <= distance[same].min() + 1e-9]
            times.append(float(np.median(used.median_ms[nearest])))
        self.steps_ = steps.tolist()
        self.times_ = np.maximum.accumulate(times).tolist()
        return self

    def clone_unfitted(self) -> Self:
        return type(self)()

    def p50(self, totals: Totals) -> float:
        place = bisect_left(self.steps_, totals.sum_new)
        if place < len(self.steps_):
            return self.times_[place]
        return self.times_[-1] * totals.sum_new / self.steps_[-1]

    def p50_many(self, totals: ArrayTotals) -> FloatArray:
        steps, times = np.array(self.steps_), np.array(self.times_)
        place = np.searchsorted(steps, totals.sum_new, side="left")
        padded = times[np.minimum(place, len(times) - 1)]
        beyond = padded * totals.sum_new / steps[-1]
        result: FloatArray = np.where(place == len(steps), beyond, padded)
        return result

    def payload(self) -> dict[str, Any]:
        return {"steps": self.steps_, "times_ms": self.times_, "context": self.context_}

    @classmethod
    def from_payload(cls, payload: dict[str, Any]) -> Self:
        model = cls()
        model.steps_ = [float(v) for v in payload["steps"]]
        model.times_ = [float(v) for v in payload["times_ms"]]
        model.context_ = float(payload["context"])
        if not model.steps_ or len(model.steps_) != len(model.times_):
            raise ValueError("a staircase needs as many times as steps")
        if sorted(model.steps_) != model.steps_ or sorted(model.times_) != model.times_:
            raise ValueError("a staircase never falls")
        return model


class Forest(ClippedMixin):
    """A random forest over batch features, as in Vidur (arXiv 2405.05465, section 4.3).

    It can predict less time for more work, so ``auto`` never chooses it; it is a baseline. It is trained
    by scikit-learn and evaluated by numpy, so that an estimator on disk is JSON.
    Nodes of all trees in one array each: ``feature_`` (-1: leaf), ``threshold_``, ``left_``, ``right_``,
    ``value_``; ``roots_`` (trees,).
    """

    kind = "forest"
    monotone = False
    _nodes: Mapping[str, type[np.generic]] = {
        "feature": np.int64,
        "threshold": np.float64,
        "left": np.int64,
        "right": np.int64,
        "value": np.float64,
    }

    def __init__(self, trees: int = 48, seed: int = 0) -> None:
        self.trees = trees
        self.seed = seed
        self._set(np.zeros(0), {name: np.zeros(0) for name in self._nodes})

    def fit(self, data: Observations) -> Self:
        from sklearn.ensemble import RandomForestRegressor

        model = RandomForestRegressor(self.trees, random_state=self.seed, n_jobs=1)
        model.fit(np.column_stack(data.totals), data.median_ms)
        roots, start = [], 0
        parts: dict[str, list[np.ndarray]] = {name: [] for name in self._nodes}
        for estimator in model.estimators_:
            tree = estimator.tree_
            leaf = tree.children_left < 0
            roots.append(start)
            parts["feature"].append(np.where(leaf, -1, tree.feature))
            parts["threshold"].append(np.where(leaf, 0.0, tree.threshold))
            parts["left"].append(np.where(leaf, 0, tree.children_left + start))
            parts["right"].append(np.where(leaf, 0, tree.children_right + start))
            parts["value"].append(np.where(leaf, tree.value[:, 0, 0], 0.0))
            start += tree.node_count
        self._set(np.array(roots), {name: np.concatenate(p) for name, p in parts.items()})
        return self

    def _set(self, roots: np.ndarray, parts: dict[str, np.ndarray]) -> None:
        self.roots_ = roots.astype(np.int64)
        self.feature_ = parts["feature"].astype(np.int64)
        self.threshold_ = parts["threshold"].astype(np.float64)
        self.left_ = parts["left"].astype(np.int64)
        self.right_ = parts["right"].astype(np.int64)
        self.value_ = parts["value"].astype(np.float64)

    def clone_unfitted(self) -> Self:
        return type(self)(self.trees, self.seed)

    def p50(self, totals: Totals) -> float:
        return float(self.p50_many(BatchTotals.stack([totals]))[0])

    def p50_many(self, totals: ArrayTotals) -> FloatArray:
        table = np.column_stack(totals)
        node = np.broadcast_to(self.roots_, (len(table), len(self.roots_))).copy()
        row = np.arange(len(table))[:, None]
        while True:
            feature = self.feature_[node]
            inner = feature >= 0
            if not inner.any():
                break
            low = table[row, np.maximum(feature, 0)] <= self.threshold_[node]
            node = np.where(inner, np.where(low, self.left_[node], self.right_[node]), node)
        result: FloatArray = self.value_[node].mean(axis=1)
        return result

    def payload(self) -> dict[str, Any]:
        nodes = {name: getattr(self, f"{name}_").tolist() for name in self._nodes}
        return {"roots": self.roots_.tolist(), **nodes}

    @classmethod
    def from_payload(cls, payload: dict[str, Any]) -> Self:
        parts = {name: np.array(payload[name], kind) for name, kind in cls._nodes.items()}
        roots = np.array(payload["roots"], dtype=np.int64)
        model = cls(len(roots))
        model._set(roots, parts)
        nodes = np.arange(len(model.feature_))
        inner = model.feature_ >= 0
        if len({len(p) for p in parts.values()}) != 1 or not len(roots):
            raise ValueError("the forest's arrays differ in length")
        # Children after parents: a walk always ends, whatever the file says.
        if (np.minimum(model.left_, model.right_)[inner] <= nodes[inner]).any():
            raise ValueError("the forest has a cycle")
        if (np.maximum(model.left_, model.right_) >= len(nodes)).any():
            raise ValueError("the forest points outside itself")
        return model
