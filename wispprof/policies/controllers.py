"""Speculation controllers with a fixed rule (``fixed``, ``sled``, ``wisp``), and predictors without a fit.

Every controller answers :meth:`acceptance_prob` for the last token, because the server may cut drafts
under any of them. Without a fitted predictor it is the draft model's top-1 probability: for a distilled
draft roughly calibrated, and for any draft a good ranking.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from wispprof.policies.interface import RoundContext, TreeShape
from wispprof.policies.tree_shapes import MeasuredShapes
from wispprof.types import DraftFeatures, RejectionPredictor

_ACCEPTANCE = 0.7
"""Of the draft's first candidate, where nothing says more."""


@dataclass(frozen=True, slots=True)
class ConfidenceAcceptance:
    """The draft model's top-1 probability, clipped to ``[low, high]``."""

    low: float = 0.02
    high: float = 0.98

    def acceptance_prob(self, features: DraftFeatures, depth: int) -> float:
        return min(self.high, max(self.low, features.confidence))

    def acceptance_prob_batch(self, features: np.ndarray, depth: np.ndarray) -> np.ndarray:
        clipped: np.ndarray = np.clip(np.asarray(features)[:, 0], self.low, self.high)
        return clipped

    def candidate_acceptance(
        self, features: DraftFeatures, probs: Sequence[float] | np.ndarray, depth: int
    ) -> np.ndarray:
        return share_rejection(np.array(self.acceptance_prob(features, depth)), np.asarray(probs, float))

    def candidate_acceptance_batch(
        self, features: np.ndarray, probs: np.ndarray, depth: np.ndarray
    ) -> np.ndarray:
        return share_rejection(self.acceptance_prob_batch(features, depth), np.asarray(probs, float))


def share_rejection(first: np.ndarray, probs: np.ndarray) -> np.ndarray:
    """Acceptance probabilities (…, w) of candidates from the first one's (…) and the draft's ``probs``:
    if the target rejects the first, it takes the others in proportion to these."""
    left = np.maximum(1.0 - probs[..., :1], probs[..., 1:].sum(-1, keepdims=True))
    others = (1.0 - first[..., None]) * probs[..., 1:] / np.maximum(left, 1e-9)
    return np.concatenate((first[..., None], others), -1)[..., : probs.shape[-1]]


class FixedController:
    """Always draft ``k`` tokens; 0 never drafts."""

    name = "fixed"

    def __init__(self, k: int = 4, predictor: RejectionPredictor | None = None) -> None:
        if k < 0:
            raise ValueError(f"k must be at least 0, got {k}")
        self.k = k
        self.predictor = predictor or ConfidenceAcceptance()
        self._acceptance_prob = 1.0

    def begin(self, context: RoundContext) -> int:
        self._acceptance_prob = 1.0
        return self.k

    def go_on(self, depth: int, features: DraftFeatures) -> bool:
        self._acceptance_prob = self.predictor.acceptance_prob(features, depth)
        return depth + 1 < self.k

    def acceptance_prob(self) -> float:
        return self._acceptance_prob

    def finish(self, drafted: int, accepted: int) -> None:
        """Nothing to learn."""


class SledController(FixedController):
    """Draft while the draft's confidence stays at or above ``threshold``, at most ``k_max`` tokens.

    The token below the threshold is sent too, because it is drafted already and one row costs the server
    little. The paper (SLED, arXiv 2506.09397) leaves this open.
    """

    name = "sled"

    def __init__(
        self, threshold: float = 0.5, k_max: int = 8, predictor: RejectionPredictor | None = None
    ) -> None:
        super().__init__(k_max, predictor)
        self.threshold = threshold

    def go_on(self, depth: int, features: DraftFeatures) -> bool:
        return super().go_on(depth, features) and features.confidence >= self.threshold


class SpecEdgeController(FixedController):
    """Trees of one shape, SpecEdge's (arXiv 2505.17052): in each of ``depth`` forwards of the draft model at
    most ``beams`` nodes get ``width`` children, and the best ``nodes`` of all are sent.

    With ``node_ms``, what each further node adds to a forward, that shape is a bound: trees take the shape
    within it that is fastest by what the edge measures."""

    name = "specedge"

    def __init__(
        self,
        nodes: int = 32,
        depth: int = 4,
        width: int = 16,
        beams: int = 32,
        predictor: RejectionPredictor | None = None,
        node_ms: float | None = None,
    ) -> None:
        super().__init__(depth, predictor)
        self.node_ms = node_ms or 0.0
        self._shape = TreeShape(nodes, depth, width, beams)
        self._measured = None if node_ms is None else MeasuredShapes(node_ms, False, self._shape)

    def shape(self, context: RoundContext) -> TreeShape | None:
        if self._measured is None:
            return self._shape
        return self._measured.choose(context, _ACCEPTANCE)


class WispController(FixedController):
    """Stop at the first predicted rejection: acceptance probability below ``threshold``.

    That token is sent too (WISP, arXiv 2601.11652, leaves this open; see :class:`SledController`).
    """

    name = "wisp"

    def __init__(
        self, predictor: RejectionPredictor | None = None, threshold: float = 0.5, k_max: int = 8
    ) -> None:
        super().__init__(k_max, predictor)
        self.threshold = threshold

    def go_on(self, depth: int, features: DraftFeatures) -> bool:
        more = super().go_on(depth, features)
        return more and self._acceptance_prob >= self.threshold
