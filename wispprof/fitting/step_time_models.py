"""The manners of every estimator here, and the nonnegative least squares they share.

A *surface* maps the totals of a batch to median milliseconds. It is made by ``fit`` (learned attributes
end in ``_``), lies on disk as plain JSON, and is evaluated from plain numbers alone.

WISP's verification-time estimator (arXiv 2601.11652, section 5): four linear terms.

vLLM's start-up model: time by padded tokens, measured at one context length.

Vidur's way (arXiv 2405.05465, section 4.3): a random forest over batch features.

It can predict less time for more work, so the automatic choice never takes it; it stands here to be
compared with. Training uses scikit-learn, evaluation numpy alone.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Any, Protocol, Self

import numpy as np

from wispprof.errors import FitError
from wispprof.fitting.batch_totals import FloatArray, Totals
from wispprof.fitting.observations import Observations

__all__ = [
    "ClippedMixin",
    "Forest",
    "Staircase",
    "StepTimeModel",
    "WispLinear",
    "fit_nonnegative",
]


class StepTimeModel(Protocol):
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


class ClippedMixin:
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


class WispLinear(ClippedMixin):
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
        step_model = cls()
        coef = [float(v) for v in payload["coef"]]
        if len(coef) != 4 or min(coef) < 0:
            raise FitError("A wisp-linear estimator has four weights ≥ 0.", "Fit it anew.")
        step_model.coef_ = (coef[0], coef[1], coef[2], coef[3])
        return step_model


class Staircase(ClippedMixin):
    """``steps_``: token counts; ``times_``: ms of a step padded to each, never falling.

    The context is the one most shapes were measured at. Beyond the last step time grows in proportion.
    """

    kind = "staircase"
    monotone = True

    def __init__(self) -> None:
        self.steps_: list[float] = []
        self.times_: list[float] = []
        self.context_ = 0.0

    def fit(self, data: Observations) -> Self:
        plain = data.totals[:, 7] == 0
        used = data.take(plain) if plain.sum() >= 4 else data
        mean = used.totals[:, 2] / used.totals[:, 0]
        tokens = np.where(used.padded > 0, used.padded, used.totals[:, 1])
        wanted = np.unique(tokens)
        values, counts = np.unique(np.round(np.log2(1 + mean), 1), return_counts=True)
        modal = values[np.argmax(counts)]
        distance = np.abs(np.log2(1 + mean) - modal)
        self.context_ = float(2**modal - 1)
        times = []
        for count in wanted:
            same = np.flatnonzero(tokens == count)
            nearest = same[distance[same] <= distance[same].min() + 1e-9]
            times.append(float(np.median(used.median_ms[nearest])))
        self.steps_ = [float(c) for c in wanted]
        self.times_ = [float(t) for t in np.maximum.accumulate(times)]
        return self

    def again(self) -> Self:
        return type(self)()

    def p50(self, totals: Totals) -> float:
        place = bisect_left(self.steps_, totals.new)
        if place < len(self.steps_):
            return self.times_[place]
        return self.times_[-1] * totals.new / self.steps_[-1]

    def p50_many(self, totals: FloatArray) -> FloatArray:
        steps, times = np.array(self.steps_), np.array(self.times_)
        place = np.searchsorted(steps, totals[:, 1], side="left")
        inside = times[np.minimum(place, len(times) - 1)]
        beyond = place == len(steps)
        result: FloatArray = np.where(beyond, inside * totals[:, 1] / steps[-1], inside)
        return result

    def payload(self) -> dict[str, Any]:
        return {"steps": self.steps_, "times_ms": self.times_, "context": self.context_}

    @classmethod
    def from_payload(cls, payload: dict[str, Any]) -> Self:
        step_model = cls()
        step_model.steps_ = [float(v) for v in payload["steps"]]
        step_model.times_ = [float(v) for v in payload["times_ms"]]
        step_model.context_ = float(payload["context"])
        if not step_model.steps_ or len(step_model.steps_) != len(step_model.times_):
            raise ValueError("a staircase needs as many times as steps")
        if (
            sorted(step_model.steps_) != step_model.steps_
            or sorted(step_model.times_) != step_model.times_
        ):
            raise ValueError("a staircase never falls")
        return step_model


class Forest(ClippedMixin):
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
        step_model = cls(len(roots))
        step_model._set(roots, parts)
        nodes = np.arange(len(step_model.feature_))
        inner = step_model.feature_ >= 0
        if len({len(p) for p in parts.values()}) != 1 or not len(roots):
            raise ValueError("the forest's arrays differ in length")
        # Children after parents: a walk always ends, whatever the file says.
        if (np.minimum(step_model.left_, step_model.right_)[inner] <= nodes[inner]).any():
            raise ValueError("the forest has a cycle")
        if (np.maximum(step_model.left_, step_model.right_) >= len(nodes)).any():
            raise ValueError("the forest points outside itself")
        return step_model
