"""An acceptance probability by depth alone: a predictor whose answers a test knows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from wispprof.types import DraftFeatures


@dataclass(frozen=True)
class DepthAcceptance:
    """``cumulative[j]``: share of rounds whose first j+1 drafts were all accepted;
    the last ratio continues."""

    cumulative: tuple[float, ...]

    def acceptance_prob(self, features: DraftFeatures, depth: int) -> float:
        depth = min(depth, len(self.cumulative) - 1)
        before = self.cumulative[depth - 1] if depth else 1.0
        return self.cumulative[depth] / before if before > 0 else 0.0

    def acceptance_prob_batch(self, features: np.ndarray, depth: np.ndarray) -> np.ndarray:
        rows = zip(features.tolist(), depth.tolist(), strict=True)
        return np.array([self.acceptance_prob(DraftFeatures(*row), d) for row, d in rows])
