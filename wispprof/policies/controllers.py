"""Survival of a draft token where no fitted predictor is at hand.

A draft model's top-1 probability is itself an estimate of the chance that the target agrees: for a
distilled draft it is roughly calibrated, and for any draft it ranks tokens well. It stands in until a
predictor is fitted from an acceptance trace.

Speculation controllers with a fixed rule: ``fixed``, ``sled`` and ``wisp``.

All of them answer :meth:`acceptance_prob` for the token just judged, because the server may trim tails under
any of them; without a fitted predictor the draft's own confidence stands in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from wispprof.policies.api import RoundContext
from wispprof.types import DraftFeatures, RejectionPredictor

__all__ = [
    "ConfidenceAcceptance",
    "DepthAcceptance",
    "FixedController",
    "SledController",
    "WispController",
]


@dataclass(frozen=True, slots=True)
class ConfidenceAcceptance:
    """Survival = the draft's own top-1 probability, kept inside ``[floor, ceiling]``."""

    floor: float = 0.02
    ceiling: float = 0.98

    def acceptance_prob(self, features: DraftFeatures, depth: int) -> float:
        return min(self.ceiling, max(self.floor, features.confidence))

    def acceptance_prob_batch(self, features: np.ndarray, depth: np.ndarray) -> np.ndarray:
        clipped: np.ndarray = np.clip(np.asarray(features)[:, 0], self.floor, self.ceiling)
        return clipped


@dataclass(frozen=True, slots=True)
class DepthAcceptance:
    """Survival by depth alone, from a trace's cumulative table (the last entry's ratio goes on).

    ``cumulative[j]`` = share of rounds whose first j+1 drafts were all accepted, as
    ``AcceptanceTrace.cum_acceptance_by_position`` gives it.
    """

    cumulative: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.cumulative or not all(0 <= c <= 1 for c in self.cumulative):
            raise ValueError(
                "cumulative acceptance probability needs at least one value, all within 0 … 1"
            )

    @classmethod
    def of(cls, cumulative: Sequence[float]) -> DepthAcceptance:
        return cls(tuple(float(c) for c in cumulative))

    def conditional(self, depth: int) -> float:
        """P(draft number ``depth`` accepted | those before it were)."""
        depth = min(depth, len(self.cumulative) - 1)
        before = self.cumulative[depth - 1] if depth else 1.0
        return self.cumulative[depth] / before if before > 0 else 0.0

    def acceptance_prob(self, features: DraftFeatures, depth: int) -> float:
        return self.conditional(depth)

    def acceptance_prob_batch(self, features: np.ndarray, depth: np.ndarray) -> np.ndarray:
        table = np.array([self.conditional(d) for d in range(len(self.cumulative))])
        looked_up: np.ndarray = table[np.minimum(np.asarray(depth, dtype=int), len(table) - 1)]
        return looked_up


class FixedController:
    """Draft ``k`` tokens, whatever they look like. ``k == 0`` never drafts."""

    name = "fixed"

    def __init__(self, k: int = 4, predictor: RejectionPredictor | None = None) -> None:
        if k < 0:
            raise ValueError(f"k must not be negative, got {k}")
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
        return more and self._acceptance_prob >= self.threshold
