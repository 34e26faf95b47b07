"""What one more item costs, as plain numbers, so that a thousand candidates can be ranked quickly.

An estimator answers exactly, one addition at a time. Ranking needs no exactness: around the batch at
hand its cost is close to ``fixed + Σ (item + new·row + new·cached·pair + cached·kv)``. Those slopes are
read off the estimator itself by a handful of additions, so any estimator will do. What is finally
chosen is always priced by the estimator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from wispprof.core import StepEstimator
from wispprof.policies.api import Limits, SessionView

__all__ = ["MarginalCosts", "expected_tokens", "marginal_costs"]


class MarginalCosts(NamedTuple):
    """Slopes of the step time (p50, ms) around a batch of everything that is ready.

    ``fixed_bound_ms``: bound of a step with one typical item. ``all_bound_ms``: bound of a step with
    every ready session, as far as the limits allow.
    """

    fixed_ms: float
    item_ms: float
    row_ms: float
    pair_ms: float
    kv_ms: float
    fixed_bound_ms: float
    all_bound_ms: float
    all_ms: float


def expected_tokens(tail: Sequence[float]) -> float:
    """Tokens a session is expected to commit with this tail: 1 + Σ of cumulative survival."""
    total = alive = 1.0
    for survival in tail:
        alive *= survival
        total += alive
    return total


def marginal_costs(
    estimator: StepEstimator, sessions: Sequence[SessionView], limits: Limits
) -> MarginalCosts:
    """Read the slopes of ``estimator`` around a batch of ``sessions``.

    The batch is represented by its mean item, of which at most ``limits.max_items`` fit. Secants over
    half the batch rather than derivatives: a staircase (graph buckets) has no useful derivative.
    """
    count = min(len(sessions), limits.max_items)
    if not count:
        return MarginalCosts(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    cached = sum(s.cached for s in sessions) // len(sessions)
    drafts = sum(len(s.tail) for s in sessions) // len(sessions)
    return mean_costs(estimator, count, 1 + drafts, cached)


def mean_costs(estimator: StepEstimator, items: int, new: int, cached: int) -> MarginalCosts:
    """Slopes around ``items`` equal items of ``new`` tokens over ``cached``."""
    first = estimator.start().add(new, cached)
    batch = first
    for _ in range(items - 1):
        batch = batch.add(new, cached)
    span = max(4, items // 2)
    far = max(256, 2 * cached)
    one = _many(batch, span, 1, 0)
    rows = _many(batch, 1, span, 0)
    keyed = _many(batch, 1, 1, far)
    both = _many(batch, 1, span, far)
    base = batch.p50_ms
    # rows: item + span·row; one: span·(item + row)  →  solve for both
    single, wide = (one - base) / span, rows - base
    row = max(0.0, (wide - single) / (span - 1))
    item = max(0.0, single - row)
    pair = max(0.0, ((both - rows) - (keyed - _many(batch, 1, 1, 0))) / ((span - 1) * far))
    kv = max(0.0, (keyed - _many(batch, 1, 1, 0)) / far - pair)
    used = items * (item + new * (row + pair * cached) + kv * cached)
    return MarginalCosts(
        max(0.0, base - used), item, row, pair, kv, first.bound_ms, batch.bound_ms, base
    )


def _many(batch, count: int, new: int, cached: int) -> float:  # type: ignore[no-untyped-def]
    for _ in range(count):
        batch = batch.add(new, cached)
    return float(batch.p50_ms)
