"""What drafting takes, read from an edge profile's rows: steps by context, and rounds after a rest."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from wispprof.artifacts.rows import EdgeRow

__all__ = ["RESTED_MS", "of_kind", "rested_share", "resume_ms", "row_ms"]

RESTED_MS = 6.0
"""A pause from which on a device counts as rested: threads sleep, caches and clocks have cooled. Shorter
ones cost their share: 35 % after 2 ms, 72 % after 4, 88 % after 7 on a CPU of two cores (docs/notes.md)."""


def of_kind(rows: Iterable[EdgeRow], kind: str) -> tuple[EdgeRow, ...]:
    """Rows of one kind by rising context."""
    found = (row for row in rows if row.kind == kind)
    return tuple(sorted(found, key=lambda row: (row.context, row.tokens)))


def row_ms(rows: Iterable[EdgeRow], kind: str, context: int) -> float | None:
    """Median of the rows of this kind, interpolated between their contexts, held flat outside them; None
    without such rows."""
    return _between([(row.context, row.median_ms) for row in of_kind(rows, kind)], context)


def resume_ms(rows: Iterable[EdgeRow], context: int) -> float:
    """What a rest adds to the drafting after it: a ``round`` less as many draft steps over the same
    context, never negative, interpolated; 0 where no rounds were measured."""
    listed = list(rows)
    added = [
        (row.context, max(0.0, row.median_ms - row.tokens * step_ms))
        for row in of_kind(listed, "round")
        if (step_ms := row_ms(listed, "draft_step", row.context)) is not None
    ]
    return _between(added, context) or 0.0


def rested_share(rested_ms: float) -> float:
    """How much of :func:`resume_ms` drafting pays after a pause this long: proportional up to
    :data:`RESTED_MS`, all of it beyond."""
    return min(1.0, max(0.0, rested_ms) / RESTED_MS)


def _between(points: Sequence[tuple[int, float]], context: int) -> float | None:
    """Interpolated between points by rising context, held flat outside them; None without points."""
    if not points:
        return None
    if context <= points[0][0]:
        return points[0][1]
    for (low, low_ms), (high, high_ms) in itertools.pairwise(points):
        if context <= high:
            return low_ms + (context - low) / max(1, high - low) * (high_ms - low_ms)
    return points[-1][1]
