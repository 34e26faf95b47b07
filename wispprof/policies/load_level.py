"""Load level: one small number with the same meaning for server, edge, simulator and plan.

The *slowdown* of the sessions that decode now is a ratio of step times: all of them advance by one
undrafted token, over one of them alone. It is 1 on an idle server. It stays near 1 while the fixed part of
a step dominates, and grows once rows and KV reads bind. It needs no hardware constants.

The *load level* is the number of :data:`LOAD_BOUNDS` that the slowdown has reached: 0 … 4.
"""

from __future__ import annotations

from collections.abc import Iterable

from wispprof.types import StepTimeEstimator

LOAD_BOUNDS: tuple[float, ...] = (1.15, 1.5, 2.25, 4.0)
LOAD_LEVELS = len(LOAD_BOUNDS) + 1

_HYSTERESIS = 0.05


def slowdown(estimator: StepTimeEstimator, cached: Iterable[int]) -> float:
    """Undrafted step time of sessions with these cached tokens, over that of their mean alone."""
    batch = estimator.start()
    count = total = 0
    for tokens in cached:
        batch = batch.add(1, tokens)
        count += 1
        total += tokens
    if count < 2:
        return 1.0
    alone = estimator.start().add(1, total // count).p50_ms
    return max(1.0, batch.p50_ms / alone) if alone > 0 else 1.0


def load_level(slowdown: float, previous: int | None = None) -> int:
    """Load level of a slowdown.

    With ``previous``, the level changes only if the slowdown is 5 % past the bound, so that edges do not
    alternate between two rows of the plan.
    """
    level = sum(slowdown >= bound for bound in LOAD_BOUNDS)
    if previous is None or level == previous:
        return level
    if level > previous:
        above = LOAD_BOUNDS[previous:]
        return previous + sum(slowdown >= bound * (1 + _HYSTERESIS) for bound in above)
    return sum(slowdown >= bound * (1 - _HYSTERESIS) for bound in LOAD_BOUNDS[:previous])


def representative_slowdown(level: int) -> float:
    """The slowdown for which the plan computes a level: the geometric mean of its bounds."""
    if not 0 <= level < LOAD_LEVELS:
        raise ValueError(f"load level must be 0 … {LOAD_LEVELS - 1}, got {level}")
    edges = (1.0, *LOAD_BOUNDS, LOAD_BOUNDS[-1] ** 2 / LOAD_BOUNDS[-2])
    if level == 0:
        return 1.0
    return float((edges[level] * edges[level + 1]) ** 0.5)
