"""Labelled draft tokens of traces, and the scores learned from them, evaluated after each token.

``threshold`` follows SLED, ``margin-logistic`` vLLM, ``wisp-mlp`` WISP; ``lightgbm`` is this project's.
Training uses scikit-learn and LightGBM; evaluation uses numpy at most.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from wispprof.artifacts.document import LearnedState
from wispprof.artifacts.rows import TracePath
from wispprof.errors import FitError, TooFewOutcomes
from wispprof.fitting.batch_totals import FloatArray
from wispprof.types import DraftFeatures

MINIMUM_PROMPTS = 4
MINIMUM_REJECTIONS = 20


@dataclass(frozen=True)
class TokenRows:
    """Draft tokens up to and including the first rejected one of each proposal.

    ``features`` (n, 4) as :class:`~wispprof.types.DraftFeatures`; ``depth`` (n,) counted from 0;
    ``accepted`` (n,) bool: all tokens before it were accepted, was it too? ``prompt`` (n,) its path.
    """

    features: FloatArray
    depth: np.ndarray
    accepted: np.ndarray
    prompt: np.ndarray

    def __len__(self) -> int:
        return len(self.depth)

    def take(self, mask: np.ndarray) -> TokenRows:
        """The rows under a mask."""
        return TokenRows(self.features[mask], self.depth[mask], self.accepted[mask], self.prompt[mask])

    def joined(self, other: TokenRows) -> TokenRows:
        """Rows of two disjoint sets of paths, their prompts numbered on."""
        first = int(self.prompt.max()) + 1
        return TokenRows(
            np.concatenate([self.features, other.features]),
            np.concatenate([self.depth, other.depth]),
            np.concatenate([self.accepted, other.accepted]),
            np.concatenate([self.prompt, other.prompt + first]),
        )


def token_rows(paths: Sequence[TracePath]) -> TokenRows:
    """Label every draft token whose predecessors in the proposal were all accepted.

    Proposals that run past the end of their path are left out: their outcome is unknown.
    Raises :class:`FitError` for features that are not finite, :class:`TooFewOutcomes` for short answers.
    """
    features, depths, labels, prompts = [], [], [], []
    for number, path in enumerate(paths):
        rows, width = path.scored_rows(), path.depth
        if rows == 0:
            continue
        lengths = np.asarray(path.accepted[:rows])[:, None]
        depth = np.broadcast_to(np.arange(width), (rows, width))
        reached = depth <= lengths
        features.append(np.asarray(path.features[:rows], dtype=np.float64)[reached])
        depths.append(depth[reached])
        labels.append((depth < lengths)[reached])
        prompts.append(np.full(int(reached.sum()), number))
    if not features:
        raise TooFewOutcomes("No answer is longer than a proposal, so no outcome of a draft is known.")
    table = np.concatenate(features)
    if not np.isfinite(table).all():
        raise FitError("The acceptance trace has features that are not finite.", "Take it anew.")
    return TokenRows(table, np.concatenate(depths), np.concatenate(labels), np.concatenate(prompts))


def split_prompts(
    paths: Sequence[TracePath], shares: Sequence[float] = (0.6, 0.2, 0.2), seed: int = 0
) -> list[list[TracePath]]:
    """Divide paths by prompt into parts of about these shares; equal prompts stay together."""
    by_prompt: dict[tuple[int, ...], list[TracePath]] = {}
    for path in paths:
        by_prompt.setdefault(path.prompt, []).append(path)
    if len(by_prompt) < MINIMUM_PROMPTS:
        raise TooFewOutcomes(
            f"{len(by_prompt)} distinct prompts are too few to hold some out; {MINIMUM_PROMPTS} are needed."
        )
    groups = list(by_prompt.values())
    order = np.random.default_rng(seed).permutation(len(groups))
    cuts = np.round(np.cumsum(shares) / sum(shares) * len(groups)).astype(int)
    parts: list[list[TracePath]] = []
    start = 0
    for index, cut in enumerate(cuts):
        # Every part gets at least one prompt, however few there are.
        stop = max(int(cut), start + 1)
        stop = min(stop, len(groups) - (len(cuts) - 1 - index))
        parts.append([path for g in order[start:stop] for path in groups[g]])
        start = stop
    return parts


def check_classes(rows: TokenRows) -> None:
    """Refuse rows with too few rejected or too few accepted tokens."""
    rejected = int((~rows.accepted).sum())
    kept = len(rows) - rejected
    if min(rejected, kept) < MINIMUM_REJECTIONS:
        raise TooFewOutcomes(
            f"{rejected} rejected and {kept} accepted draft tokens are too few of one kind to learn "
            f"from; {MINIMUM_REJECTIONS} of each are needed."
        )
    if bool((np.ptp(rows.features, axis=0) == 0).all()):
        raise FitError("No feature of the draft tokens varies.", "Take the trace anew.")


class Scorer(LearnedState, ABC):
    """Features of a draft token to a score that rises with the chance of acceptance.

    Attributes that end in ``_`` are learned by :meth:`fit`.
    """

    kind: str

    @abstractmethod
    def fit(self, rows: TokenRows) -> Self:
        """Learn from labelled tokens and return self."""

    @abstractmethod
    def score(self, features: DraftFeatures, depth: int) -> float:
        """One token, in microseconds, with numpy at most."""

    @abstractmethod
    def score_many(self, features: FloatArray, depth: np.ndarray) -> FloatArray:
        """Rows (n, 4) and depths (n,); returns (n,), equal to :meth:`score`."""


class Threshold(Scorer):
    """SLED (arXiv 2506.09397): the draft's confidence as it is."""

    kind = "threshold"

    def fit(self, rows: TokenRows) -> Self:
        return self

    def score(self, features: DraftFeatures, depth: int) -> float:
        return features[0]

    def score_many(self, features: FloatArray, depth: np.ndarray) -> FloatArray:
        return features[:, 0]


class MarginLogistic(Scorer):
    """A logistic line over the margin between the two best logits. ``weights_``: slope, intercept."""

    kind = "margin-logistic"

    weights_: tuple[float, float]

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


@dataclass(frozen=True, slots=True)
class DenseLayer:
    """Weights (inputs, outputs) and bias (outputs,) of one layer."""

    weights: FloatArray
    bias: FloatArray


class WispMlp(Scorer):
    """Two hidden layers and a logit (arXiv 2601.11652, section 4; widths are not published).

    ``layers_``: (weights, bias) of each layer, with the standardisation of the inputs folded into the
    first. Inputs are the four features and the depth in the round.
    """

    kind = "wisp-mlp"

    hidden_: tuple[int, int] = (32, 16)
    layers_: list[DenseLayer]

    def fit(self, rows: TokenRows) -> Self:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.neural_network import MLPClassifier

        table = np.column_stack([rows.features, rows.depth])
        mean, spread = table.mean(axis=0), np.maximum(table.std(axis=0), 1e-9)
        network = MLPClassifier(
            self.hidden_,
            # Proposals at neighbouring positions are similar, so rows overstate the data: a strong penalty
            # and few passes beat early stopping (AUC 0.917 against 0.893 on the reference pair).
            alpha=2.0,
            batch_size=min(256, len(rows)),
            learning_rate_init=3e-3,
            max_iter=12,
            random_state=0,
        )
        with warnings.catch_warnings():
            # Training stops at max_iter on purpose: held-out error is flat long before.
            warnings.simplefilter("ignore", ConvergenceWarning)
            network.fit((table - mean) / spread, rows.accepted)
        first, *others = zip(network.coefs_, network.intercepts_, strict=True)
        weights, bias = (np.asarray(part, dtype=np.float64) for part in first)
        standardised = DenseLayer(weights / spread[:, None], bias - (mean / spread) @ weights)
        self.layers_ = [standardised, *(DenseLayer(*layer) for layer in others)]
        return self

    def finish(self) -> None:
        first, second = self.hidden_
        widths = [layer.weights.shape for layer in self.layers_]
        if widths != [(5, first), (first, second), (second, 1)]:
            raise ValueError(f"layers of shapes {widths} are not a three-layer predictor")

    def score(self, features: DraftFeatures, depth: int) -> float:
        first, second, last = self.layers_
        hidden = np.array((*features, depth)) @ first.weights
        hidden += first.bias
        hidden = np.maximum(hidden, 0.0, out=hidden) @ second.weights
        hidden += second.bias
        return float((np.maximum(hidden, 0.0, out=hidden) @ last.weights)[0] + last.bias[0])

    def score_many(self, features: FloatArray, depth: np.ndarray) -> FloatArray:
        *inner, last = self.layers_
        hidden: FloatArray = np.column_stack([features, depth])
        for layer in inner:
            hidden = np.maximum(hidden @ layer.weights + layer.bias, 0.0)
        result: FloatArray = (hidden @ last.weights + last.bias)[:, 0]
        return result


LEAVES = 16
ALL_LEAVES = np.uint16(0xFFFF)


def _lowest_bits() -> NDArray[np.int8]:
    """The place of the lowest set bit of every 16-bit mask."""
    mask = np.arange(1, 1 << LEAVES, dtype=np.int64)
    return np.append(0, np.log2(mask & -mask)).astype(np.int8)


class BoostedTrees(Scorer):
    """Boosted trees, trained by LightGBM and evaluated by numpy in one pass over all nodes (QuickScorer,
    Lucchese et al., SIGIR 2015): each failed test masks out the leaves of its left subtree, and the
    leftmost remaining leaf is the answer. At most 16 leaves fit one 16-bit mask.

    One token takes 11 µs, with LightGBM's own ``predict`` 29 µs (60 trees, one x86 core).

    ``feature_``, ``threshold_``, ``mask_`` (trees, nodes) and ``leaf_`` (trees, 16).
    """

    kind = "lightgbm"

    feature_: NDArray[np.int64]
    threshold_: FloatArray
    mask_: NDArray[np.uint16]
    leaf_: FloatArray

    def __init__(self, trees: int = 60) -> None:
        self.trees = trees

    def finish(self) -> None:
        leaf = self.leaf_
        nodes = (len(leaf), LEAVES - 1)
        if leaf.ndim != 2 or leaf.shape[1] != LEAVES or self.feature_.shape != nodes:
            raise ValueError("the trees do not have 16 leaves each")
        if self.threshold_.shape != nodes or self.mask_.shape != nodes:
            raise ValueError("the trees' nodes are malformed")
        if not 0 <= self.feature_.min() <= self.feature_.max() <= 4:
            raise ValueError("the trees test unknown features")
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
            "seed": 0,
            "num_threads": 1,
            "deterministic": True,
            "verbosity": -1,
        }
        model = lightgbm.train(
            parameters, lightgbm.Dataset(table, label=rows.accepted.astype(float)), self.trees
        )
        trees = [t["tree_structure"] for t in model.dump_model()["tree_info"]]
        shape = (len(trees), LEAVES - 1)
        self.feature_ = np.zeros(shape, dtype=np.int64)
        self.threshold_ = np.full(shape, np.finfo(float).max)
        self.mask_ = np.full(shape, ALL_LEAVES)
        self.leaf_ = np.zeros((len(trees), LEAVES))
        for number, root in enumerate(trees):
            nodes: list[tuple[int, float, int]] = []
            _walk(root, 0, nodes, self.leaf_[number])
            for place, (feature, threshold, mask) in enumerate(nodes):
                self.feature_[number, place] = feature
                self.threshold_[number, place] = threshold
                self.mask_[number, place] = mask
        self.finish()
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


def _walk(node: dict[str, Any], first: int, nodes: list[tuple[int, float, int]], leaf: FloatArray) -> int:
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
