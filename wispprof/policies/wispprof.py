"""The ``wispprof`` batching policy: every step chooses how much of each tail to verify now.

Its pieces, each of which can be switched off (:class:`WispprofSettings`):

*trim*: the tails that maximise expected tokens per ms (:mod:`wispprof.policies.draft_selection`).
*wait*: a session whose next draft is due stays out where reading its cache once instead of twice is
worth more than the token it might lose (:mod:`wispprof.policies.wait_for_draft`).
*slack*: tokens of sessions that fall behind their promise weigh more, so those that ran ahead give up
drafts for their sake. They are not left out: that pinned everybody at the promised speed and cost more
tokens than it saved promises.
*rescue*: a session that falls behind a promise which server-only serving would keep in this company weighs
as much as all others together, and more: steps shrink towards undrafted ones until it is back on time.
*size_prefill*: prompt chunks as large as no running session minds (:mod:`wispprof.policies.prefill`).
*demote_hopeless*: tokens of sessions whose promise is lost weigh what those of sessions on time do, however
late they are, and such sessions stay out where together they would add more to the step than the fixed part
of a step of their own.
*floor*: the plan of server-only serving is always among the candidates.

Linear costs only say in which order drafts earn their time. How many of them join is decided by the
estimator itself, which prices the step with the first of them, the first two, … and with none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import compress
from operator import not_
from typing import NamedTuple

import numpy as np

from wispprof.policies.api import Limits, SessionView, StepPlan, column
from wispprof.policies.batch_builder import StepBuilder, no_batch, spread
from wispprof.policies.cost_model import MarginalCostCache, MarginalCosts, price_batches
from wispprof.policies.draft_selection import (
    BatchArrays,
    BoolArray,
    Columns,
    DraftRanking,
    FloatArray,
    IntArray,
    typical_costs,
    undrafted_totals,
)
from wispprof.policies.prefill import add_prompts
from wispprof.policies.urgency import Urgency
from wispprof.policies.wait_for_draft import should_wait
from wispprof.types import BatchTotals, StepTimeEstimator

__all__ = ["Wispprof", "WispprofSettings"]

_READY, _LEFT = column("ready"), column("prompt_left")
_RETRY_MS = 1.0
_LONG = 64
"""Ladders up to this long are priced rung by rung, longer ones at about half as many places."""
_BLEND = 0.05


@dataclass(frozen=True, slots=True)
class WispprofSettings:
    """Switches of the pieces, and their few constants.

    ``catch_up``: weight of a token of a session that is far behind; 1 switches weighing off.
    ``rescue_weight``: what those that need rescue weigh together, in times of all sessions of the step.
    ``slo_unreachable_weight``: of one whose promise is lost. ``patience``: a session left out for this many
    steps takes part whatever it is worth. ``first_token``: target of a first token that nothing was promised
    for, in times of reading its prompt alone on the server.
    """

    trim: bool = True
    wait: bool = True
    slack: bool = True
    slo_boost: bool = True
    size_prefill: bool = True
    demote_hopeless: bool = True
    floor: bool = True
    catch_up: float = 4.0
    rescue_weight: float = 2.5
    slo_unreachable_weight: float = 1.0
    patience: float = 8.0
    first_token: float = 4.0


class _Choice(NamedTuple):
    """Who decodes, with how many drafts each; who was looked at: the neediest, all where they are few; when
    to ask again if nobody decodes; tokens expected of each."""

    sessions: list[SessionView]
    keep: list[int]
    seen: list[SessionView]
    wake_ms: float = math.inf
    gain: float = 1.0


def _sorted(sessions: list[SessionView]) -> tuple[list[SessionView], list[SessionView]]:
    """Those that may take part: who decodes, and who has a prompt to read."""
    ready = sessions
    if not all(map(_READY, sessions)):
        ready = list(compress(sessions, map(_READY, sessions)))
    left = list(map(_LEFT, ready))
    if not any(left):
        return ready, []
    return list(compress(ready, map(not_, left))), list(compress(ready, left))


@dataclass
class Wispprof:
    """Stream-mode batching. ``settings`` switches its pieces."""

    settings: WispprofSettings = field(default_factory=WispprofSettings)
    name: str = field(default="wispprof", init=False)
    stream: bool = field(default=True, init=False)
    _slopes: MarginalCostCache = field(default_factory=MarginalCostCache, init=False, repr=False)
    _backlog: float = field(default=0.0, init=False, repr=False)
    _between_ms: float = field(default=0.0, init=False, repr=False)
    _last: tuple[float, float] | None = field(default=None, init=False, repr=False)

    def plan(
        self,
        now_ms: float,
        sessions: list[SessionView],
        estimator: StepTimeEstimator,
        limits: Limits,
    ) -> StepPlan:
        self._note_gap(now_ms)
        decode, prompts = _sorted(sessions)
        if not decode and not prompts:
            return no_batch(now_ms, None, "no_batch")
        if min(limits.max_items, limits.max_tokens, limits.kv_free) < 1:
            return no_batch(now_ms, now_ms + _RETRY_MS, "no room")
        build = StepBuilder(estimator, limits)
        wake_ms, gain = math.inf, 1.0
        if decode:
            chosen, keep, decode, wake_ms, gain = self._choose(now_ms, decode, estimator, limits)
            build.add_decodes(chosen, keep)
        if prompts:
            sized, patience = self.settings.size_prefill, self.settings.first_token
            add_prompts(build, now_ms, prompts, decode, gain, sized=sized, patience=patience)
        fed = sum([m.prefill for m in build.members]) if prompts else 0
        backlog = sum([s.prompt_left for s in prompts]) > fed
        self._backlog += _BLEND * (float(backlog) - self._backlog)
        if build.members:
            self._last = now_ms, build.cost.p50_ms
            return build.plan("stream")
        return no_batch(now_ms, min(wake_ms, now_ms + 50.0), "waiting for drafts")

    def _note_gap(self, now_ms: float) -> None:
        """What passes from a step's predicted end to the next decision: the loop's own work and whatever the
        prediction lacks. A step costs that much more, so a draft that saves one is worth more."""
        if self._last is not None:
            began_ms, p50_ms = self._last
            gap_ms = min(max(now_ms - began_ms - p50_ms, -p50_ms), p50_ms)
            self._between_ms += _BLEND * (gap_ms - self._between_ms)
            self._last = None

    # --- who decodes, with how much -----------------------------------------------------------

    def _choose(
        self,
        now_ms: float,
        decode: list[SessionView],
        estimator: StepTimeEstimator,
        limits: Limits,
    ) -> _Choice:
        settings, free_slots = self.settings, limits.max_items
        whole: Urgency | None = None
        if len(decode) > 2 * free_slots:
            # A step holds a part of them: twice as many as it holds are looked at, the neediest.
            sample = decode[:: len(decode) // free_slots]
            bound_ms = typical_costs(sample, self._slopes, estimator, free_slots).all_bound_ms
            whole = Urgency.of(now_ms, decode, settings.patience * bound_ms)
            places = whole.first(np.ones(len(decode), dtype=bool), 2 * free_slots).nonzero()[0]
            decode = [decode[place] for place in places.tolist()]
        count = len(decode)
        columns = Columns.of(decode)
        costs = columns.marginal_costs(self._slopes, estimator, free_slots)
        patience_ms = settings.patience * costs.all_bound_ms
        need = whole.take(places, patience_ms) if whole else Urgency.of(now_ms, decode, patience_ms)
        # Steps that waiting prompts call for anyway have paid their fixed part: decoding then costs only what
        # it adds, and a draft must beat what a lone advance earns for that.
        extra_ms = max(0.0, self._between_ms) - self._backlog * costs.fixed_ms
        fixed_ms = max(0.0, costs.fixed_ms + extra_ms)
        weight = self._weights(decode, need, columns, costs)
        arrays = BatchArrays.build(columns, costs._replace(fixed_ms=fixed_ms), weight)
        everyone = np.ones(count, dtype=bool)
        ranking = DraftRanking.of(arrays, everyone)
        best = ranking.best
        rate = float(ranking.worth[best] / max(ranking.spent_ms[best], 1e-9))
        keep = ranking.keep(best, count) if settings.trim else columns.lengths
        members, wake_ms = everyone, math.inf
        if settings.wait:
            # Who takes part whatever it is worth has no time to wait, and is no waiter to count with.
            slack = np.where(need.starved, -math.inf, need.slack)
            out, due_ms, margin_ms = should_wait(
                now_ms, decode, arrays, keep, rate, slack, costs.all_bound_ms
            )
            if out.any() and self._waiting_pays(arrays, keep, out, margin_ms, estimator):
                members, wake_ms = ~out, due_ms
        if settings.demote_hopeless and need.lost.any() and not need.lost.all():
            members = self._demoted(members, arrays, keep, rate, need, costs.fixed_ms)
        if not members.any() and not self._pays_to_idle(now_ms, arrays, rate, wake_ms):
            members = everyone
        if not members.any():
            return _Choice([], [], decode, wake_ms)
        room = min(limits.max_tokens, limits.kv_free)
        most = min(free_slots, room)
        members = need.first(members, most)
        inside = int(np.count_nonzero(members))
        if inside < count or len(ranking.owner) > room - inside:
            ranking = ranking.among(arrays, members, room - inside)
        lone = need.first(everyone, most) if settings.floor and inside < count else None
        members, keep = self._best(arrays, ranking, members, lone, estimator, extra_ms)
        chosen = members.nonzero()[0]
        gain = float(arrays.gains(keep)[chosen].sum()) / len(chosen)
        kept: list[int] = keep[chosen].tolist()
        return _Choice([decode[place] for place in chosen.tolist()], kept, decode, wake_ms, gain)

    def _weights(
        self, decode: list[SessionView], need: Urgency, columns: Columns, costs: MarginalCosts
    ) -> FloatArray:
        """What a token of each session (n,) is worth."""
        settings, step_ms = self.settings, costs.all_bound_ms
        weight = np.ones(len(decode))
        if settings.slack:
            weight += (settings.catch_up - 1.0) * need.behind(step_ms)
        if settings.slo_boost:
            read_ms, row_ms = costs.over(columns.cached)
            undrafted_ms = costs.fixed_ms + max(0.0, self._between_ms)
            undrafted_ms += float((read_ms + row_ms).sum())
            urgency = need.urgency(decode, undrafted_ms, step_ms)
            together = settings.rescue_weight * len(decode) / max(1.0, float(urgency.sum()))
            weight = np.maximum(weight, 1.0 + together * urgency)
        if settings.demote_hopeless:
            weight[need.lost] = settings.slo_unreachable_weight
        return weight

    @staticmethod
    def _demoted(
        members: BoolArray,
        arrays: BatchArrays,
        keep: IntArray,
        rate: float,
        need: Urgency,
        fixed_ms: float,
    ) -> BoolArray:
        """The members without those whose promise is lost and whose tokens do not pay at the going rate.
        Left out, they need a step of their own later, and its fixed part is paid again: that must cost
        less than what they add to this one, or they starve for nothing."""
        spent = arrays.lone_ms + keep * arrays.row_ms
        out = need.lost & ~need.starved & (arrays.gains(keep) * arrays.weight < rate * spent)
        return members & ~out if float(spent[out].sum()) > fixed_ms else members

    @staticmethod
    def _waiting_pays(
        arrays: BatchArrays,
        keep: IntArray,
        out: BoolArray,
        margin_ms: float,
        estimator: StepTimeEstimator,
    ) -> bool:
        """Whether the step without the waiters is really shorter, by the estimator: where rows are free
        or padded it may save less than the linear costs promised, and then nobody waits."""
        new = np.stack((keep + 1, np.where(out, 0, keep + 1)))
        p50 = price_batches(estimator, new, arrays.cached)[0]
        promised_ms = float((arrays.lone_ms + keep * arrays.row_ms)[out].sum())
        return float(p50[0] - p50[1]) - promised_ms + margin_ms > 0.0

    @staticmethod
    def _pays_to_idle(now_ms: float, arrays: BatchArrays, rate: float, wake_ms: float) -> bool:
        """Whether waiting for the first due draft, the server idle, still beats starting now."""
        if not math.isfinite(wake_ms):
            return False
        return (wake_ms - now_ms) * rate < float(arrays.weight.sum()) * 0.1

    def _best(
        self,
        arrays: BatchArrays,
        ranking: DraftRanking,
        members: BoolArray,
        lone: BoolArray | None,
        estimator: StepTimeEstimator,
        extra_ms: float,
    ) -> tuple[BoolArray, IntArray]:
        """The length of the ladder at which tokens per ms are most, by the estimator's own prices; or
        everybody undrafted (``lone``) where that is better still."""
        count = len(arrays.cached)
        taken = self._rungs(ranking)
        worth = ranking.worth[taken]
        others: list[BoolArray] = []
        if lone is not None:
            others, worth = [lone], np.append(worth, arrays.weight @ lone)
        totals = ranking.totals(taken, arrays.cached, members)
        if lone is not None:
            undrafted = np.array([undrafted_totals(arrays.cached, lone)], dtype=np.float64).T
            totals = BatchTotals(*np.concatenate([totals, undrafted], axis=1))
        priced = estimator.predict_totals(totals)
        if priced is not None:
            p50 = priced[0]
        else:
            steps = [(ranking.keep(j, count) + 1) * members for j in taken.tolist()]
            p50 = price_batches(estimator, np.stack([*steps, *others]), arrays.cached)[0]
        # The first of equals: everybody undrafted must be better than a ladder to replace it.
        best = int((worth / np.maximum(p50 + extra_ms, 1e-9)).argmax())
        if lone is not None and best == len(taken):
            return lone, np.zeros(count, np.int64)
        return members, ranking.keep(int(taken[best]), count)

    def _rungs(self, ranking: DraftRanking) -> IntArray:
        """How many drafts the candidates take, rising."""
        longest = len(ranking.owner)
        if not self.settings.trim:
            return np.array([0, longest] if self.settings.floor and longest else [longest])
        best = ranking.best
        first = 0 if self.settings.floor else min(1, best)
        if longest <= _LONG:
            return np.arange(first, longest + 1)
        return np.array(sorted(spread(first, longest, _LONG // 2) | {best}))
