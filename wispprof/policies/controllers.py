"""Speculation controllers with a fixed rule: ``fixed``, ``sled`` and ``wisp``.

All of them answer :meth:`survival` for the token just judged, because the server may trim tails under
any of them; without a fitted predictor the draft's own confidence stands in.
"""

from __future__ import annotations

from wispprof.core import DraftFeatures, RejectionPredictor
from wispprof.policies.api import RoundContext
from wispprof.policies.survival import ConfidenceSurvival

__all__ = ["FixedController", "SledController", "WispController"]


class FixedController:
    """Draft ``k`` tokens, whatever they look like. ``k == 0`` never drafts."""

    name = "fixed"

    def __init__(self, k: int = 4, predictor: RejectionPredictor | None = None) -> None:
        if k < 0:
            raise ValueError(f"k must not be negative, got {k}")
        self.k = k
        self.predictor = predictor or ConfidenceSurvival()
        self._survival = 1.0

    def begin(self, context: RoundContext) -> int:
        self._survival = 1.0
        return self.k

    def go_on(self, depth: int, features: DraftFeatures) -> bool:
        self._survival = self.predictor.survival(features, depth)
        return depth + 1 < self.k

    def survival(self) -> float:
        return self._survival

    def finish(self, drafted: int, accepted: int) -> None:
        """Nothing to learn."""


class SledController(FixedController):
    """Draft while the draft's confidence stays at or above ``threshold``, at most ``k_max`` tokens.

    The token under the threshold is sent too: it has been drafted, and one row costs the server
    little (SLED, arXiv 2506.09397, leaves this open).
    """

    name = "sled"

    def __init__(
        self, threshold: float = 0.5, k_max: int = 8, predictor: RejectionPredictor | None = None
    ) -> None:
        super().__init__(k_max, predictor)
        self.threshold = threshold

    def go_on(self, depth: int, features: DraftFeatures) -> bool:
        return super().go_on(depth, features) and features.confidence >= self.threshold


class WispController(FixedController):
    """Stop at the first token the predictor takes for a rejection: survival under ``threshold``.

    The flagged token is sent (the paper leaves it open; see :class:`SledController`).
    """

    name = "wisp"

    def __init__(
        self,
        predictor: RejectionPredictor | None = None,
        threshold: float = 0.5,
        k_max: int = 8,
    ) -> None:
        super().__init__(k_max, predictor)
        self.threshold = threshold

    def go_on(self, depth: int, features: DraftFeatures) -> bool:
        more = super().go_on(depth, features)
        return more and self._survival >= self.threshold
