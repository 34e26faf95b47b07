"""Whether a session should wait for a draft that is due, instead of advancing now.

Advancing now commits one token more for certain but takes the due draft's first token with it: if that
draft was right, the token would have come anyway, one step later, out of the same read of the cache.
With d the chance that the held tail and the due draft's first token all hold, advancing now wins
``1 - d`` tokens and costs one read of the session's cache. The session waits where that read, at the
going rate, is worth more than those tokens, and more than its ``share`` of a step's fixed part besides:
who waits makes the step shorter, so that the fixed part is paid more often and the drafts of all the
others have less time to come.

A draft is waited for only if it comes before the step that is left ends. That step is shorter the more
sessions wait, so the earliest due are taken first, as many as the step without them still reaches: with
one order of arrival and a step that only shrinks there is exactly one such number. The going rate is
taken of the members that remain, and the waiters again by that rate, until both stand.
"""

from __future__ import annotations

import math

import numpy as np

from wispprof.policies.api import SessionView
from wispprof.policies.draft_selection import BatchArrays, BoolArray, FloatArray, IntArray, rate_of

__all__ = ["should_wait"]

_ROUNDS = 8
_SURE = 0.995
"""No draft is taken for surer than this; where reading costs less than the rest, nobody waits."""


def should_wait(
    now_ms: float,
    decode: list[SessionView],
    arrays: BatchArrays,
    keep: IntArray,
    rate: float,
    slack: FloatArray,
    safety_ms: float,
    share: float = 1.0,
) -> tuple[BoolArray, float, float]:
    """(who stays out of this step, when the first of their drafts is due, and the most that this step
    may cost above what the linear costs say it does for waiting still to pay, in ms).

    ``rate``: what a ms is worth with everybody in. ``slack`` (n,): ms to each deadline;
    who has less than the step and ``safety_ms`` left does not wait.
    """
    count, ends = len(decode), arrays.ends
    nobody = np.zeros(count, dtype=bool)
    if rate <= 0.0:
        return nobody, math.inf, 0.0
    spent = arrays.lone_ms + keep * arrays.row_ms
    whole_ms = max(1e-6, arrays.fixed_ms + float(spent.sum()))
    company = share * arrays.fixed_ms / count
    # Whoever would not wait for the surest of drafts at the rate with everybody in does not wait, though the
    # rate may rise when others do.
    able = rate * np.maximum(arrays.read_ms - company, 0.0) > (1.0 - _SURE * ends) * arrays.weight
    able &= slack >= whole_ms + safety_ms
    places: list[int] = []
    due: list[float] = []
    odds: list[float] = []
    for index in able.nonzero()[0].tolist():
        session = decode[index]
        due_ms = session.due_ms
        if (
            due_ms is None
            or not session.due_acceptance_probs
            or not now_ms <= due_ms <= now_ms + whole_ms
        ):
            continue
        places.append(index)
        due.append(due_ms - now_ms)
        odds.append(float(ends[index]) * session.due_acceptance_probs[0])
    if not places:
        return nobody, math.inf, 0.0
    where, due_in, d = np.array(places), np.array(due), np.array(odds)
    order = due_in.argsort(kind="stable")
    where, due_in, d = where[order], due_in[order], d[order]
    lost = (1.0 - d) * arrays.weight[where]
    saved_ms = arrays.read_ms[where] - company
    out = nobody
    for _ in range(_ROUNDS):
        pays = rate * saved_ms > lost
        left_ms = whole_ms - (spent[where] * pays).cumsum()
        reached = pays & (due_in <= left_ms)
        again = nobody.copy()
        again[where[reached]] = True
        if bool((again == out).all()):
            break
        out = again
        rate = rate_of(arrays, ~out, keep)
    taken = out[where]
    if rate <= 0.0 or not taken.any():
        return nobody, math.inf, 0.0
    margin_ms = float((saved_ms - lost / rate)[taken].sum())
    return out, now_ms + float(due_in[taken][0]), margin_ms
