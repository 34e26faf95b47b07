"""Vectorised arithmetic of a step: what drafts are worth, which to verify, and which to wait for.

A step maximises expected (weighted) tokens per millisecond. Its cost is a constant plus a sum over items, so
the best draft lengths come from one sort: drafts join in falling order of value per ms while the ratio rises
(the fixed point of Dinkelbach's iteration). A session's own drafts keep their order, because cumulative
acceptance falls from draft to draft and their rows cost the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple, Self

import numpy as np

from wispprof.policies.cost_model import BoolArray, FloatArray, IntArray, MarginalCostCache, MarginalCosts
from wispprof.policies.interface import SessionView, column
from wispprof.policies.wispprof_settings import WispprofSettings
from wispprof.types import BatchTotals, StepTimeEstimator

_ACCEPTANCE_PROBS, _CACHED = column("acceptance_probs"), column("cached")
_STANDING = column("standing")
_MIN_ROW_MS = 1e-12
"""Keeps the order among rows that cost nothing, whose value per ms would be infinite."""
_MIN_STEP_MS = 1e-9


class SessionColumns(NamedTuple):
    """Pending drafts and contexts of n sessions as columns; ``lengths`` (n,): pending drafts of each;
    ``standing`` (n,): probability that they still stand when the step begins."""

    acceptance_probs: list[tuple[float, ...]]
    cached: IntArray
    lengths: IntArray
    standing: FloatArray

    @classmethod
    def of(cls, sessions: Sequence[SessionView]) -> SessionColumns:
        acceptance_probs = list(map(_ACCEPTANCE_PROBS, sessions))
        count = len(acceptance_probs)
        return cls(
            acceptance_probs,
            np.fromiter(map(_CACHED, sessions), np.int64, count),
            np.fromiter(map(len, acceptance_probs), np.int64, count),
            np.fromiter(map(_STANDING, sessions), np.float64, count),
        )

    def take(self, idx: IntArray) -> SessionColumns:
        """The columns of the sessions at ``idx``."""
        acceptance_probs = [self.acceptance_probs[i] for i in idx.tolist()]
        return SessionColumns(acceptance_probs, self.cached[idx], self.lengths[idx], self.standing[idx])

    def marginal_costs(
        self, cache: MarginalCostCache, estimator: StepTimeEstimator, max_items: int
    ) -> MarginalCosts:
        """Marginal costs around a batch of these sessions, represented by their mean."""
        count = len(self.acceptance_probs)
        drafts, cached = int(self.lengths @ self.standing) // count, int(self.cached.sum()) // count
        return cache.get(estimator, min(count, max_items), 1 + drafts, cached)

    def cum_acceptance(self) -> tuple[BoolArray, FloatArray]:
        """(draft exists, cumulative acceptance probability), each (n, most drafts).

        Beyond a session's last draft, the probability stays at that of the last draft.
        """
        exists = np.arange(int(self.lengths.max())) < self.lengths[:, None]
        cum_acceptance = np.ones(exists.shape)
        total = int(self.lengths.sum())
        probs = chain.from_iterable(self.acceptance_probs)
        cum_acceptance[exists] = np.fromiter(probs, np.float64, total)
        cum_acceptance[:, 0] *= self.standing
        np.multiply.accumulate(cum_acceptance, axis=1, out=cum_acceptance)
        return exists, cum_acceptance

    def expected_tokens(self) -> FloatArray:
        """Expected committed tokens (n,) of each session with all its pending drafts."""
        tokens = np.ones(len(self.acceptance_probs))
        if self.lengths.any():
            exists, cum_acceptance = self.cum_acceptance()
            tokens += np.add.accumulate(cum_acceptance * exists, axis=1)[:, -1]
        return tokens


class BatchArrays(NamedTuple):
    """n decoding sessions and their N pending drafts as arrays, session by session.

    Per draft (N,): ``session_idx``; ``depth``: its index among the session's drafts; ``cum_acceptance``:
    P(this draft and all before it accepted).
    Per session (n,): ``tail_acceptance``: P(all its drafts accepted); ``undrafted_ms``: step time that
    it adds without drafts, of which ``read_ms`` for the item and its KV; ``row_ms``: expected time of one
    more draft, which is fed only if the drafts stand (``standing``); ``weight``: value of one of its tokens.
    """

    cached: IntArray
    lengths: IntArray
    session_idx: IntArray
    depth: IntArray
    cum_acceptance: FloatArray
    tail_acceptance: FloatArray
    undrafted_ms: FloatArray
    read_ms: FloatArray
    row_ms: FloatArray
    standing: FloatArray
    weight: FloatArray
    fixed_ms: float

    @classmethod
    def of(cls, columns: SessionColumns, costs: MarginalCosts, weight: FloatArray) -> BatchArrays:
        cached, lengths = columns.cached, columns.lengths
        count, total = len(lengths), int(lengths.sum())
        tail_acceptance = columns.standing
        if total:
            exists, cumulative = columns.cum_acceptance()
            tail_acceptance = cumulative[:, -1]
            session_idx = np.arange(count).repeat(lengths)
            depth = np.arange(total) - (lengths.cumsum() - lengths)[session_idx]
            cum_acceptance = cumulative[exists]
        else:
            session_idx = depth = np.empty(0, np.int64)
            cum_acceptance = np.empty(0)
        read_ms, row_ms = costs.per_item(cached)
        return cls(
            cached,
            lengths,
            session_idx,
            depth,
            cum_acceptance,
            tail_acceptance,
            read_ms + row_ms,
            read_ms,
            row_ms * columns.standing,
            columns.standing,
            weight,
            costs.fixed_ms,
        )

    def expected_tokens(self, drafts: IntArray) -> FloatArray:
        """Expected committed tokens (n,) of each session with its first ``drafts`` (n,) drafts."""
        tokens = np.ones(len(drafts))
        if len(self.cum_acceptance):
            verified = self.cum_acceptance * (self.depth < drafts[self.session_idx])
            tokens += np.bincount(self.session_idx, verified, len(drafts))
        return tokens


class DraftRanking(NamedTuple):
    """M drafts of a step's sessions in falling order of value per ms.

    A *cutoff* j schedules the first j drafts; these are always leading drafts of their sessions.
    ``order``, ``session_idx``, ``depth``, ``standing`` (M,): index into :class:`BatchArrays`, and its columns
    in this order.
    ``value``, ``cost_ms`` (M + 1,): weighted expected tokens and linear step time at the cutoffs 0 … M.
    """

    order: IntArray
    session_idx: IntArray
    depth: IntArray
    standing: FloatArray
    value: FloatArray
    cost_ms: FloatArray

    @classmethod
    def of(cls, arrays: BatchArrays, scheduled: BoolArray, limit: int | None = None) -> Self:
        """Rank the drafts of the sessions in ``scheduled`` (n,). ``limit``: largest cutoff of use."""
        session_idx, cum_acceptance = arrays.session_idx, arrays.cum_acceptance
        density = cum_acceptance * arrays.weight[session_idx]
        density /= np.maximum(arrays.row_ms, _MIN_ROW_MS)[session_idx]
        order = np.negative(density, out=density).argsort(kind="stable")
        candidates = scheduled[session_idx] & (cum_acceptance > 0.0)
        return cls._accumulate(arrays, scheduled, order[candidates[order]][:limit])

    def restrict(self, arrays: BatchArrays, scheduled: BoolArray, limit: int | None = None) -> Self:
        """The ranking of a part of its sessions; the order of their drafts does not change."""
        order = self.order[scheduled[self.session_idx]][:limit]
        return self._accumulate(arrays, scheduled, order)

    @classmethod
    def _accumulate(cls, arrays: BatchArrays, scheduled: BoolArray, order: IntArray) -> Self:
        session_idx = arrays.session_idx[order]
        value, cost_ms = np.empty(len(order) + 1), np.empty(len(order) + 1)
        value[0] = arrays.weight @ scheduled
        cost_ms[0] = arrays.fixed_ms + arrays.undrafted_ms @ scheduled
        np.multiply(arrays.cum_acceptance[order], arrays.weight[session_idx], out=value[1:])
        cost_ms[1:] = arrays.row_ms[session_idx]
        np.add.accumulate(value, out=value)
        np.add.accumulate(cost_ms, out=cost_ms)
        standing = arrays.standing[session_idx]
        return cls(order, session_idx, arrays.depth[order], standing, value, cost_ms)

    def best(self) -> tuple[int, float]:
        """(the cutoff with the highest rate by linear costs, the smallest of equals; that rate)."""
        cutoff = int((self.value / np.maximum(self.cost_ms, _MIN_STEP_MS)).argmax())
        return cutoff, float(self.value[cutoff] / max(self.cost_ms[cutoff], _MIN_STEP_MS))

    def drafts(self, cutoff: int, sessions: int) -> IntArray:
        """Drafts of each of ``sessions`` sessions at a cutoff."""
        counts: IntArray = np.bincount(self.session_idx[:cutoff], minlength=sessions)
        return counts

    def totals(
        self, cutoffs: IntArray, cached: IntArray, scheduled: BoolArray, undrafted: BoolArray | None = None
    ) -> BatchTotals[Any]:
        """Expected totals (m,) of the steps at the cutoffs (m,), all with the same scheduled sessions.

        If ``undrafted`` (n,) is given, the last of m + 1 totals is its step, in which nobody has drafts.
        """
        cached_of = cached * scheduled
        items, sum_cached = int(np.count_nonzero(scheduled)), int(cached_of.sum())
        # The undrafted step, then what each draft adds.
        new, max_new = np.empty(len(self.value)), np.empty(len(self.value))
        new_cached, new_sq = np.empty(len(self.value)), np.empty(len(self.value))
        new[0], new_cached[0], new_sq[0], max_new[0] = items, sum_cached, items, 1.0
        new[1:] = self.standing
        new_cached[1:] = cached_of[self.session_idx] * self.standing
        np.add(self.depth, 2, out=max_new[1:])
        new_sq[1:] = (2.0 * max_new[1:] - 1.0) * self.standing
        count = len(cutoffs)
        totals = BatchTotals.empty(count if undrafted is None else count + 1)
        totals.items[:] = items
        totals.sum_new[:count] = np.add.accumulate(new)[cutoffs]
        totals.sum_cached[:] = sum_cached
        totals.sum_new_cached[:count] = np.add.accumulate(new_cached)[cutoffs]
        totals.sum_new_sq[:count] = np.add.accumulate(new_sq)[cutoffs]
        totals.max_cached[:] = cached_of.max()
        totals.max_new[:count] = np.maximum.accumulate(max_new)[cutoffs]
        totals.prefill[:] = 0.0
        if undrafted is not None:
            cached_of = cached[undrafted]
            items, sum_cached = len(cached_of), int(cached_of.sum())
            last = (items, items, sum_cached, sum_cached, items, cached_of.max(), 1.0, 0.0)
            for column, total in zip(totals, last, strict=True):
                column[-1] = total
        return totals


def token_rate(arrays: BatchArrays, scheduled: BoolArray, drafts: IntArray) -> float:
    """Weighted tokens per ms of a step by linear costs; 0 if it is empty."""
    cost_ms = arrays.fixed_ms + float((arrays.undrafted_ms + drafts * arrays.row_ms) @ scheduled)
    value = float((arrays.expected_tokens(drafts) * arrays.weight) @ scheduled)
    return value / cost_ms if cost_ms > 0 and value > 0 else 0.0


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
    """Choose the sessions that wait for a draft that is due, instead of advancing now.

    Advancing now commits one more token for certain, but makes the due draft's first token useless. If that
    draft was right, its token would come one step later, from the same KV read. With d = P(all pending drafts
    and the due draft's first token accepted), advancing now gains ``1 - d`` tokens and costs one KV read.

    A session waits if that read is worth more than those tokens at the current token rate, and more than
    its share of the fixed step time: waiting makes steps shorter, so the fixed part is paid more often.

    A due draft must arrive before the shortened step ends. The earliest due are taken first, as many as that
    step still reaches. The token rate is then that of the remaining sessions; both are iterated until
    they agree.

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
