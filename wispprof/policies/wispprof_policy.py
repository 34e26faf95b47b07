"""The ``wispprof`` batching policy: each step verifies the drafts that earn most per millisecond.

A step is planned in this order (switches and constants: :class:`WispprofSettings`):

1. **Weights.** A token of a session that lags behind its SLO is worth more. A session is boosted if it misses
   an SLO that server-only serving would meet: it weighs more than all others together, so steps shrink
   until it is back on time. A session whose SLO is unreachable has a constant weight.
2. **Ranking.** Drafts in falling order of weighted expected tokens per ms, by linear costs.
3. **Waiting.** A session whose next draft is due stays out if that saves more than it loses.
4. **Deprioritizing.** Sessions whose SLO is unreachable stay out if their tokens do not pay and together they
   would add more than the fixed part of a later step of their own.
5. **Cutoff.** The estimator prices the step with the first 0, 1, 2, … drafts of the ranking, and the
   undrafted step of the most urgent sessions. The highest rate wins.
6. **Prefill.** Prompt chunks join as far as the running sessions' SLOs allow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import compress
from operator import not_
from typing import NamedTuple

import numpy as np

from wispprof.policies.batch_builder import RETRY_MS, BatchBuilder, evenly_spaced, no_batch
from wispprof.policies.cost_model import (
    BoolArray,
    FloatArray,
    IntArray,
    MarginalCostCache,
    MarginalCosts,
    price_batches,
)
from wispprof.policies.draft_selection import BatchArrays, DraftRanking, SessionColumns, Waiting, should_wait
from wispprof.policies.interface import Limits, SessionView, StepPlan, column
from wispprof.policies.prefill import add_prompts
from wispprof.policies.urgency import Urgency
from wispprof.policies.wispprof_settings import WispprofSettings
from wispprof.types import StepTimeEstimator

_READY, _PROMPT_LEFT = column("ready"), column("prompt_left")


class _Decodes(NamedTuple):
    """The decoding sessions of a step. ``drafts``: of each; ``candidates``: the sessions they were chosen
    from; ``wake_ms``: when to plan again if none is chosen; ``tokens``: mean expected tokens of each."""

    sessions: list[SessionView]
    drafts: list[int]
    candidates: list[SessionView]
    wake_ms: float = math.inf
    tokens: float = 1.0


def _split_ready(sessions: list[SessionView]) -> tuple[list[SessionView], list[SessionView]]:
    """The ready sessions that decode, and those that have prompt left."""
    ready = sessions
    if not all(map(_READY, sessions)):
        ready = list(compress(sessions, map(_READY, sessions)))
    prompt_left = list(map(_PROMPT_LEFT, ready))
    if not any(prompt_left):
        return ready, []
    return list(compress(ready, map(not_, prompt_left))), list(compress(ready, prompt_left))


@dataclass
class WispprofPolicy:
    """Stream-mode batching, see the module's docstring."""

    settings: WispprofSettings = field(default_factory=WispprofSettings)
    name: str = field(default="wispprof", init=False)
    stream: bool = field(default=True, init=False)
    _costs: MarginalCostCache = field(default_factory=MarginalCostCache, init=False, repr=False)
    _prompt_backlog: float = field(default=0.0, init=False, repr=False)
    _overhead_ms: float = field(default=0.0, init=False, repr=False)
    _prompt_ms: float = field(default=0.0, init=False, repr=False)
    _last_step: tuple[float, float] | None = field(default=None, init=False, repr=False)

    def plan(
        self, now_ms: float, sessions: list[SessionView], estimator: StepTimeEstimator, limits: Limits
    ) -> StepPlan:
        self._observe_overhead(now_ms)
        running, prompts = _split_ready(sessions)
        if not running and not prompts:
            return no_batch(now_ms, None, "nothing ready")
        if min(limits.max_items, limits.max_tokens, limits.kv_free) < 1:
            return no_batch(now_ms, now_ms + RETRY_MS, "no capacity")
        batch = BatchBuilder(estimator, limits)
        decodes = _Decodes([], [], [])
        if running:
            decodes = self._choose_decodes(now_ms, running, estimator, limits)
            batch.add_decodes(decodes.sessions, decodes.drafts)
        decode_ms = batch.cost.p50_ms
        if prompts:
            add_prompts(batch, now_ms, prompts, decodes.candidates, decodes.tokens, self.settings)
        self._observe_prompts(batch, prompts, decode_ms, decodes)
        if not batch.items:
            wake_ms = min(decodes.wake_ms, now_ms + self.settings.max_wait_ms)
            return no_batch(now_ms, wake_ms, "waiting for drafts")
        self._last_step = now_ms, batch.cost.p50_ms
        return batch.plan("stream")

    # --- what earlier steps showed ----------------------------------------------------------------

    def _observe_overhead(self, now_ms: float) -> None:
        """Average the time between a step's predicted end and the next decision.

        It covers the engine loop's own work and what the prediction lacks. Every step costs that much more,
        so drafts that save steps are worth more.
        """
        if self._last_step is not None:
            begun_ms, p50_ms = self._last_step
            overhead_ms = min(max(now_ms - begun_ms - p50_ms, -p50_ms), p50_ms)
            self._overhead_ms += self.settings.ewma_weight * (overhead_ms - self._overhead_ms)
            self._last_step = None

    def _observe_prompts(
        self, batch: BatchBuilder, prompts: list[SessionView], decode_ms: float, decodes: _Decodes
    ) -> None:
        """Average the share of steps after which prompt tokens are still waiting, and the time of prompts per
        token that each session advances.

        ``decode_ms``: time of the step without its prompts.
        """
        if decodes.sessions:
            prompt_ms = (batch.cost.p50_ms - decode_ms) / decodes.tokens
            self._prompt_ms += self.settings.ewma_weight * (prompt_ms - self._prompt_ms)
        fed = sum([item.prefill for item in batch.items]) if prompts else 0
        backlog = sum([s.prompt_left for s in prompts]) > fed
        self._prompt_backlog += self.settings.ewma_weight * (float(backlog) - self._prompt_backlog)

    # --- which sessions decode, with how many drafts ----------------------------------------------

    def _choose_decodes(
        self, now_ms: float, running: list[SessionView], estimator: StepTimeEstimator, limits: Limits
    ) -> _Decodes:
        settings = self.settings
        sessions, urgency, columns, costs = self._candidates(now_ms, running, estimator, limits)
        # While prompts wait, steps run anyway, so decoding does not pay their fixed part.
        extra_ms = max(0.0, self._overhead_ms) - self._prompt_backlog * costs.fixed_ms
        fixed_ms = max(0.0, costs.fixed_ms + extra_ms)
        weight = self._weights(sessions, urgency, columns, costs, estimator)
        arrays = BatchArrays.of(columns, costs._replace(fixed_ms=fixed_ms), weight)
        everyone = np.ones(len(sessions), dtype=bool)
        ranking = DraftRanking.of(arrays, everyone)
        cutoff, rate = ranking.best()
        drafts = columns.lengths
        if settings.cut_drafts:
            drafts = ranking.drafts(cutoff, len(sessions))

        scheduled, wake_ms = everyone, math.inf
        if settings.wait_for_drafts:
            # A starved session does not wait, nor does it count among those that do.
            slack_ms = np.where(urgency.starved, -math.inf, urgency.slack_ms)
            wait = should_wait(now_ms, sessions, arrays, drafts, rate, slack_ms, costs.all_bound_ms, settings)
            if wait.waiting.any() and self._waiting_pays(arrays, drafts, wait, estimator):
                scheduled, wake_ms = ~wait.waiting, wait.due_ms
        if settings.deprioritize:
            scheduled = self._deprioritize(scheduled, arrays, drafts, rate, urgency, costs.fixed_ms)
        if not scheduled.any():
            idle_tokens = (wake_ms - now_ms) * rate if math.isfinite(wake_ms) else math.inf
            if idle_tokens < float(weight.sum()) * settings.idle_value:
                return _Decodes([], [], sessions, wake_ms)
            scheduled = everyone

        token_limit = min(limits.max_tokens, limits.kv_free)
        item_limit = min(limits.max_items, token_limit)
        scheduled = urgency.most_urgent(scheduled, item_limit)
        items = int(np.count_nonzero(scheduled))
        if items < len(sessions) or len(ranking.order) > token_limit - items:
            ranking = ranking.restrict(arrays, scheduled, token_limit - items)
        undrafted = None
        if settings.undrafted_candidate and items < len(sessions):
            undrafted = urgency.most_urgent(everyone, item_limit)
        scheduled, drafts = self._best_cutoff(arrays, ranking, scheduled, undrafted, estimator, extra_ms)
        chosen = scheduled.nonzero()[0]
        tokens = float(arrays.expected_tokens(drafts)[chosen].sum()) / len(chosen)
        chosen_drafts: list[int] = drafts[chosen].tolist()
        return _Decodes([sessions[idx] for idx in chosen.tolist()], chosen_drafts, sessions, wake_ms, tokens)

    def _candidates(
        self, now_ms: float, running: list[SessionView], estimator: StepTimeEstimator, limits: Limits
    ) -> tuple[list[SessionView], Urgency, SessionColumns, MarginalCosts]:
        """The sessions to choose from: all, or the most urgent if they are more than twice a step's slots."""
        starvation_steps, max_items = self.settings.starvation_steps, limits.max_items
        urgency: Urgency | None = None
        if len(running) > 2 * max_items:
            sample = running[:: len(running) // max_items]
            drafts = sum(len(s.acceptance_probs) for s in sample) // len(sample)
            cached = sum(s.cached for s in sample) // len(sample)
            items = min(len(sample), max_items)
            step_ms = self._costs.get(estimator, items, 1 + drafts, cached).all_bound_ms
            urgency = Urgency.of(now_ms, running, starvation_steps * step_ms)
            everyone = np.ones(len(running), dtype=bool)
            idx = urgency.most_urgent(everyone, 2 * max_items).nonzero()[0]
            running = [running[i] for i in idx.tolist()]
        columns = SessionColumns.of(running)
        costs = columns.marginal_costs(self._costs, estimator, max_items)
        starvation_ms = starvation_steps * costs.all_bound_ms
        if urgency is None:
            urgency = Urgency.of(now_ms, running, starvation_ms)
        else:
            urgency = urgency.take(idx, starvation_ms)
        return running, urgency, columns, costs

    def _weights(
        self,
        sessions: list[SessionView],
        urgency: Urgency,
        columns: SessionColumns,
        costs: MarginalCosts,
        estimator: StepTimeEstimator,
    ) -> FloatArray:
        """Value (n,) of a token of each session."""
        settings, step_ms = self.settings, costs.all_bound_ms
        weight = np.ones(len(sessions))
        if settings.weigh_lag:
            weight += (settings.lag_weight - 1.0) * urgency.lag(step_ms, settings.lag_steps)
        if settings.slo_boost:
            undrafted_ms = self._undrafted_ms(columns, estimator)
            undrafted_ms += max(0.0, self._overhead_ms) + self._prompt_ms
            boost = urgency.slo_boost(sessions, undrafted_ms, step_ms, settings)
            boost_weight = settings.slo_boost_weight * len(sessions) / max(1.0, float(boost.sum()))
            weight = np.maximum(weight, 1.0 + boost_weight * boost)
        if settings.deprioritize:
            weight[urgency.slo_unreachable] = settings.slo_unreachable_weight
        return weight

    @staticmethod
    def _undrafted_ms(columns: SessionColumns, estimator: StepTimeEstimator) -> float:
        """Time of a step in which every session advances by one token."""
        new = np.ones((1, len(columns.cached)), np.int64)
        return float(price_batches(estimator, new, columns.cached)[0][0])

    @staticmethod
    def _waiting_pays(
        arrays: BatchArrays, drafts: IntArray, wait: Waiting, estimator: StepTimeEstimator
    ) -> bool:
        """Whether the estimator agrees that the step without the waiting sessions is shorter.

        If rows are free or padded, it may save less than linear costs say.
        """
        new = np.stack((drafts + 1, np.where(wait.waiting, 0, drafts + 1)))
        p50 = price_batches(estimator, new, arrays.cached)[0]
        linear_ms = float((arrays.undrafted_ms + drafts * arrays.row_ms)[wait.waiting].sum())
        return float(p50[0] - p50[1]) - linear_ms + wait.margin_ms > 0.0

    @staticmethod
    def _deprioritize(
        scheduled: BoolArray,
        arrays: BatchArrays,
        drafts: IntArray,
        rate: float,
        urgency: Urgency,
        fixed_ms: float,
    ) -> BoolArray:
        """The scheduled sessions without those whose SLO is unreachable and whose tokens do not pay.

        They need a step of their own later, with its fixed part. That must cost less than what they add to
        this one, or they starve for nothing.
        """
        unreachable = urgency.slo_unreachable
        if not unreachable.any() or unreachable.all():
            return scheduled
        cost_ms = arrays.undrafted_ms + drafts * arrays.row_ms
        value = arrays.expected_tokens(drafts) * arrays.weight
        out = unreachable & ~urgency.starved & (value < rate * cost_ms)
        return scheduled & ~out if float(cost_ms[out].sum()) > fixed_ms else scheduled

    def _best_cutoff(
        self,
        arrays: BatchArrays,
        ranking: DraftRanking,
        scheduled: BoolArray,
        undrafted: BoolArray | None,
        estimator: StepTimeEstimator,
        extra_ms: float,
    ) -> tuple[BoolArray, IntArray]:
        """(scheduled, drafts), each (n,), with the most tokens per ms by the estimator's prices.

        The candidates are the cutoffs of the ranking and, if given, the step of the ``undrafted`` sessions.
        """
        sessions = len(arrays.cached)
        cutoffs = self._cutoffs(ranking)
        value = ranking.value[cutoffs]
        totals = ranking.totals(cutoffs, arrays.cached, scheduled, undrafted)
        if undrafted is not None:
            value = np.append(value, arrays.weight @ undrafted)
        prices = estimator.predict_totals(totals)
        if prices is None:
            new = [(ranking.drafts(j, sessions) + 1) * scheduled for j in cutoffs.tolist()]
            if undrafted is not None:
                new.append(undrafted.astype(np.int64))
            prices = price_batches(estimator, np.stack(new), arrays.cached)
        # The first of equals: the undrafted step must be better to replace a cutoff.
        best = int((value / np.maximum(prices[0] + extra_ms, 1e-9)).argmax())
        if undrafted is not None and best == len(cutoffs):
            return undrafted, np.zeros(sessions, np.int64)
        return scheduled, ranking.drafts(int(cutoffs[best]), sessions)

    def _cutoffs(self, ranking: DraftRanking) -> IntArray:
        """The cutoffs to price, rising."""
        settings, longest = self.settings, len(ranking.order)
        if not settings.cut_drafts:
            return np.array([0, longest] if settings.undrafted_candidate and longest else [longest])
        best, _ = ranking.best()
        first = 0 if settings.undrafted_candidate else min(1, best)
        if longest <= settings.max_cutoffs:
            return np.arange(first, longest + 1)
        return np.array(sorted(evenly_spaced(first, longest, settings.max_cutoffs // 2) | {best}))
