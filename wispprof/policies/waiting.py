"""Whether a session should wait for a draft that is due, instead of advancing now.

Advancing now commits one token more for certain but takes the due drafts' first token with it: if that
draft was right, the token would have come anyway, one step later, out of the same read of the cache.
With ``m`` steps until the draft can take part, d_j its cumulative survival (the held tail included)
and k its length, advancing each step instead of waiting wins

    Σ_{j ≤ min(m, k)} (1 - d_j) + max(0, m - k)      tokens

and costs ``m`` reads of the session's cache and ``max(0, m - k)`` rows; the other rows are fed either
way. The session waits where that time, at the going rate, is worth more than those tokens.
"""

from __future__ import annotations

import math

import numpy as np

from wispprof.policies.api import SessionView
from wispprof.policies.marginal import MarginalCosts
from wispprof.policies.tails import Book, BoolArray, FloatArray, IntArray

__all__ = ["waits"]

_MOST_STEPS = 1
"""Steps ahead for which an expected arrival is believed. In simulation (long contexts, near capacity)
waiting for the next step's drafts raised attainment, waiting for later ones lowered it again."""
_SURE = 0.995
"""No draft is taken for surer than this; where reading costs less than the rest, nobody waits."""


def waits(
    now_ms: float,
    decode: list[SessionView],
    book: Book,
    keep: IntArray,
    rate: float,
    slack: FloatArray,
    costs: MarginalCosts,
) -> tuple[BoolArray, float]:
    """(who stays out of this step, when the first of their drafts is due)."""
    out = np.zeros(len(decode), dtype=bool)
    wake_ms = math.inf
    if rate <= 0.0 or not len(decode):
        return out, wake_ms
    used = float((book.lone_ms + keep * book.row_ms).sum())
    step_ms = max(1e-6, costs.fixed_ms + used)
    safety = costs.all_bound_ms
    price = rate / np.maximum(book.weight, 1e-9)
    read, rows = book.read_ms * price, book.row_ms * price
    ends = np.ones(len(decode))
    held_any = np.flatnonzero(book.lengths)
    ends[held_any] = book.alive[held_any, book.lengths[held_any] - 1]
    for index in np.flatnonzero(read > 1.0 - _SURE * ends).tolist():
        session = decode[index]
        due_ms = session.due_ms
        if due_ms is None or not session.due_tail or due_ms < now_ms:
            continue
        steps = max(1, math.ceil((due_ms - now_ms) / step_ms))
        if steps > _MOST_STEPS or slack[index] < steps * step_ms + safety:
            continue
        alive = float(ends[index])
        won = 0.0
        due = session.due_tail
        for place in range(steps):
            if place < len(due):
                alive *= due[place]
                won += 1.0 - alive
            else:
                won += 1.0 - float(rows[index])
        if steps * float(read[index]) > won:
            out[index] = True
            wake_ms = min(wake_ms, due_ms)
    return out, wake_ms
