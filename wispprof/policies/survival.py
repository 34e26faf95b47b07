"""Survival of a draft token where no fitted predictor is at hand.

A draft model's top-1 probability is itself an estimate of the chance that the target agrees: for a
distilled draft it is roughly calibrated, and for any draft it ranks tokens well. It stands in until a
predictor is fitted from an acceptance trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from wispprof.core import DraftFeatures

__all__ = ["ConfidenceSurvival", "DepthSurvival"]


@dataclass(frozen=True, slots=True)
class ConfidenceSurvival:
    """Survival = the draft's own top-1 probability, kept inside ``[floor, ceiling]``."""

    floor: float = 0.02
    ceiling: float = 0.98

    def survival(self, features: DraftFeatures, depth: int) -> float:
        return min(self.ceiling, max(self.floor, features.confidence))

    def survival_batch(self, features: np.ndarray, depth: np.ndarray) -> np.ndarray:
        clipped: np.ndarray = np.clip(np.asarray(features)[:, 0], self.floor, self.ceiling)
        return clipped


@dataclass(frozen=True, slots=True)
class DepthSurvival:
    """Survival by depth alone, from a trace's cumulative table (the last entry's ratio goes on).

    ``cumulative[j]`` = share of rounds whose first j+1 drafts were all accepted, as
    ``AcceptanceTrace.survival_by_position`` gives it.
    """

    cumulative: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.cumulative or not all(0 <= c <= 1 for c in self.cumulative):
            raise ValueError("cumulative survival needs at least one value, all within 0 … 1")

    @classmethod
    def of(cls, cumulative: Sequence[float]) -> DepthSurvival:
        return cls(tuple(float(c) for c in cumulative))

    def conditional(self, depth: int) -> float:
        """P(draft number ``depth`` accepted | those before it were)."""
        depth = min(depth, len(self.cumulative) - 1)
        before = self.cumulative[depth - 1] if depth else 1.0
        return self.cumulative[depth] / before if before > 0 else 0.0

    def survival(self, features: DraftFeatures, depth: int) -> float:
        return self.conditional(depth)

    def survival_batch(self, features: np.ndarray, depth: np.ndarray) -> np.ndarray:
        table = np.array([self.conditional(d) for d in range(len(self.cumulative))])
        looked_up: np.ndarray = table[np.minimum(np.asarray(depth, dtype=int), len(table) - 1)]
        return looked_up
