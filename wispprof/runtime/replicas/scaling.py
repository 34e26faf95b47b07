"""How many replicas: by the load level that the estimator gives them, not by how many connections they hold.

A connection says little: an edge may hold one for hours and ask for nothing, or run eight sessions over
it. The load level says how much the sessions now decoding stretch a step, which is what a promise feels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from wispprof.policies.load import LOAD_LEVELS

__all__ = ["METRIC", "LoadLevelPolicy", "wanted_replicas"]

METRIC = "load_level"
"""What a replica records of itself, 0 … 4."""


def wanted_replicas(levels: Sequence[float], current: int, low: float, high: float) -> int:
    """Replicas for these load levels, before the deployment's own limits.

    Above ``high`` on average one more for every ``high`` levels there are too many; below ``low`` one
    fewer, if those that stay would not be above ``high`` then. Between the two nothing changes.
    """
    if not levels:
        return current
    total = sum(levels)
    mean = total / len(levels)
    if mean > high:
        return current + max(1, math.floor((total - high * len(levels)) / high))
    if mean < low and current > 1 and total / (current - 1) <= high:
        return current - 1
    return current


class LoadLevelPolicy:
    """Ray Serve's autoscaling policy of a deployment whose replicas record :data:`METRIC`.

    Serve calls it with its context, holds the answer against the deployment's limits, and waits its own
    delays before it acts.
    """

    def __init__(self, low: float = 0.5, high: float = 2.0) -> None:
        if not 0 <= low < high < LOAD_LEVELS:
            raise ValueError(f"0 <= low < high < {LOAD_LEVELS} is needed, got {low} and {high}")
        self.low, self.high = low, high

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        recorded: Mapping[Any, float] = (context.aggregated_metrics or {}).get(METRIC, {})
        current = int(context.target_num_replicas)
        return wanted_replicas(list(recorded.values()), current, self.low, self.high), {}
