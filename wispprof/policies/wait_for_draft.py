"""Which sessions wait for a draft that is due, instead of advancing now.

Advancing now commits one more token for certain, but makes the due draft's first token useless. If that draft
was right, its token would come one step later, from the same KV read. With d = P(all pending drafts and the
due draft's first token accepted), advancing now gains ``1 - d`` tokens and costs one KV read.

A session waits if that read is worth more than those tokens at the current token rate, and more than its
share of the fixed step time: waiting makes steps shorter, so the fixed part is paid more often.

A due draft must arrive before the shortened step ends. The earliest due are taken first, as many as that step
still reaches. The token rate is then that of the remaining sessions; both are iterated until they agree.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from wispprof.policies.cost_model import BoolArray, FloatArray, IntArray
from wispprof.policies.draft_selection import BatchArrays, token_rate
from wispprof.policies.interface import SessionView
from wispprof.policies.wispprof_settings import WispprofSettings


class Waiting(NamedTuple):
    """``waiting`` (n,): who stays out of this step. ``due_ms``: when the first of their drafts is due.
    ``margin_ms``: how much less the step may shrink than linear costs say for waiting to pay."""

    waiting: BoolArray
    due_ms: float = math.inf
    margin_ms: float = 0.0


def should_wait(
    now_ms: float,
    sessions: list[SessionView],
    arrays: BatchArrays,
    drafts: IntArray,
    rate: float,
    slack_ms: FloatArray,
    step_bound_ms: float,
    settings: WispprofSettings,
) -> Waiting:
    """Choose the sessions that wait.

    ``drafts`` (n,): drafts of each session in a step of all, ``rate``: weighted tokens per ms of that step.
    ``slack_ms`` (n,): a session waits only if its slack covers that step and a whole ``step_bound_ms``.
    """
    count, tail_acceptance = len(sessions), arrays.tail_acceptance
    nobody = np.zeros(count, dtype=bool)
    if rate <= 0.0:
        return Waiting(nobody)
    cost_ms = arrays.undrafted_ms + drafts * arrays.row_ms
    step_ms = max(1e-6, arrays.fixed_ms + float(cost_ms.sum()))
    fixed_share_ms = settings.wait_fixed_share * arrays.fixed_ms / count
    # At the rate with everybody in, the surest draft must be worth waiting for.
    min_loss = (1.0 - settings.wait_max_acceptance * tail_acceptance) * arrays.weight
    able = rate * np.maximum(arrays.read_ms - fixed_share_ms, 0.0) > min_loss
    able &= slack_ms >= step_ms + step_bound_ms
    candidates: list[tuple[int, float, float]] = []
    for idx in able.nonzero()[0].tolist():
        session = sessions[idx]
        due_ms, due_probs = session.due_ms, session.due_acceptance_probs
        if due_ms is not None and due_probs and now_ms <= due_ms <= now_ms + step_ms:
            acceptance = float(tail_acceptance[idx]) * due_probs[0]
            candidates.append((idx, due_ms - now_ms, acceptance))
    if not candidates:
        return Waiting(nobody)
    candidates.sort(key=lambda candidate: candidate[1])
    due_idx = np.array([candidate[0] for candidate in candidates])
    due_in_ms = np.array([candidate[1] for candidate in candidates])
    acceptance_of = np.array([candidate[2] for candidate in candidates])
    loss = (1.0 - acceptance_of) * arrays.weight[due_idx]
    saved_ms = arrays.read_ms[due_idx] - fixed_share_ms
    waiting = nobody
    for _ in range(settings.wait_iterations):
        pays = rate * saved_ms > loss
        remaining_ms = step_ms - (cost_ms[due_idx] * pays).cumsum()
        chosen = nobody.copy()
        chosen[due_idx[pays & (due_in_ms <= remaining_ms)]] = True
        if bool((chosen == waiting).all()):
            break
        waiting = chosen
        rate = token_rate(arrays, ~waiting, drafts)
    mine = waiting[due_idx]
    if rate <= 0.0 or not mine.any():
        return Waiting(nobody)
    margin_ms = float((saved_ms - loss / rate)[mine].sum())
    return Waiting(waiting, now_ms + float(due_in_ms[mine][0]), margin_ms)
