"""The ``wispprof`` policy once more, as its docstrings say it: loops over sessions, drafts and prompts, every
candidate priced whole by ``estimator.predict``. Slow, and obvious; the tests compare its decisions with the
policy's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from reference_step import Costs, Keep, Step, linear_costs, price, read_prompts, value_of

from wispprof.policies import Limits, ScheduledItem, SessionView
from wispprof.policies.cost_model import expected_tokens
from wispprof.policies.wispprof_settings import WispprofSettings
from wispprof.types import StepTimeEstimator

__all__ = ["Decision", "ReferencePolicy"]


class Choice(NamedTuple):
    """Drafts by session, the candidates, when to plan again; as in :class:`Decision`."""

    keep: Keep = {}
    seen: Sequence[SessionView] = ()
    wake_ms: float = math.inf
    weights: dict[str, float] = {}
    extra_ms: float = 0.0


class Decision(NamedTuple):
    """``weights``: what a token of each session that was looked at is worth; ``extra_ms``: what a step costs
    besides the estimator's price."""

    scheduled: dict[str, ScheduledItem]
    wake_ms: float | None = None
    weights: dict[str, float] = {}
    extra_ms: float = 0.0


@dataclass
class ReferencePolicy:
    """Asked with the same questions one after another, it remembers what the policy remembers."""

    settings: WispprofSettings = field(default_factory=WispprofSettings)
    between_ms: float = 0.0
    backlog: float = 0.0
    prompt_ms: float = 0.0
    last: tuple[float, float] | None = None

    def plan(
        self,
        now_ms: float,
        sessions: Sequence[SessionView],
        estimator: StepTimeEstimator,
        limits: Limits,
    ) -> Decision:
        if self.last is not None:
            # What passes between a step's predicted end and the next decision, up to the step itself.
            began_ms, p50_ms = self.last
            gap_ms = min(max(now_ms - began_ms - p50_ms, -p50_ms), p50_ms)
            self.between_ms += 0.05 * (gap_ms - self.between_ms)
            self.last = None
        decode = [s for s in sessions if s.ready and not s.prompt_left]
        prompts = [s for s in sessions if s.ready and s.prompt_left]
        if not decode and not prompts:
            return Decision({})
        if min(limits.max_items, limits.max_tokens, limits.kv_free) < 1:
            return Decision({}, now_ms + 1.0)
        step = Step(estimator, limits)
        choice, won = Choice(), []
        if decode:
            choice = self.choose(now_ms, decode, estimator, limits)
            for s in choice.seen:
                if s.session in choice.keep:
                    drafts = choice.keep[s.session]
                    step.join(s, ScheduledItem(s.session, drafts=drafts))
                    won.append(expected_tokens(s.acceptance_probs[:drafts]))
        decode_ms, gain = step.price()[0], sum(won) / len(won) if won else 1.0
        if prompts:
            read_prompts(step, now_ms, prompts, choice.seen, gain, self.settings)
        if won:
            self.prompt_ms += 0.05 * ((step.price()[0] - decode_ms) / gain - self.prompt_ms)
        fed = sum(m.prefill for m in step.scheduled.values())
        waiting = sum(s.prompt_left for s in prompts) > fed
        self.backlog += 0.05 * (float(waiting) - self.backlog)
        if step.scheduled:
            self.last = now_ms, step.price()[0]
            return Decision(step.scheduled, None, choice.weights, choice.extra_ms)
        return Decision({}, max(min(choice.wake_ms, now_ms + 50.0), now_ms + 0.1))

    # --- who decodes, with how much ---------------------------------------------------------------

    def choose(
        self,
        now_ms: float,
        decode: list[SessionView],
        estimator: StepTimeEstimator,
        limits: Limits,
    ) -> Choice:
        settings, free_slots = self.settings, limits.max_items
        if len(decode) > 2 * free_slots:
            sample = linear_costs(estimator, decode[:: len(decode) // free_slots], free_slots)
            needy = self.by_need(now_ms, decode, sample.bound)[: 2 * free_slots]
            decode = [s for s in decode if s in needy]
        costs = linear_costs(estimator, decode, free_slots)
        extra_ms = max(0.0, self.between_ms) - self.backlog * costs.fixed
        around = costs._replace(fixed=max(0.0, costs.fixed + extra_ms))
        weight = self.weights(now_ms, decode, costs, estimator)
        ranking = self.ranking(decode, around, weight)

        # By linear costs: the length that makes the highest rate, and that rate.
        best, rate = self.linear_best(decode, ranking, around, weight)
        keep = drafts_of(decode, ranking[:best])
        if not settings.cut_drafts:
            keep = {s.session: len(s.acceptance_probs) for s in decode}

        starved = {s.session for s in decode if self.starved(now_ms, s, costs.bound)}
        out, wake_ms = set(), math.inf
        if settings.wait_for_drafts:
            out, wake_ms = self.waiters(
                now_ms, decode, keep, rate, around, costs.bound, weight, estimator, starved
            )
        if settings.deprioritize and 0 < sum(s.slo_unreachable for s in decode) < len(decode):
            poor = []
            for s in decode:
                won = expected_tokens(s.acceptance_probs[: keep[s.session]]) * weight[s.session]
                spent = around.spent(s, keep[s.session])
                if s.slo_unreachable and s.session not in starved and won < rate * spent:
                    poor.append((s.session, spent))
            if sum(spent for _, spent in poor) > costs.fixed:
                out = out | {name for name, _ in poor}
        members = [s for s in decode if s.session not in out]
        if not members:
            if (wake_ms - now_ms) * rate < 0.1 * sum(weight.values()):
                return Choice({}, decode, wake_ms)
            members = decode

        token_limit = min(limits.max_tokens, limits.kv_free)
        most = min(free_slots, token_limit)
        members = self.by_need(now_ms, members, costs.bound)[:most]
        names = {s.session for s in members}
        ranked = [d for d in ranking if d[0] in names][: token_limit - len(members)]
        candidates = [drafts_of(members, ranked[:length]) for length in range(len(ranked) + 1)]
        if not settings.undrafted_candidate:
            least, _ = self.linear_best(members, ranked, around, weight)
            candidates = candidates[min(1, least) :]
        if not settings.cut_drafts:
            candidates = [candidates[-1]]
            if settings.undrafted_candidate and ranked:
                candidates.insert(0, drafts_of(members, []))
        if settings.undrafted_candidate and len(members) < len(decode):
            candidates.append(drafts_of(self.by_need(now_ms, decode, costs.bound)[:most], []))
        values = [value_of(decode, c, weight, estimator, extra_ms) for c in candidates]
        chosen = candidates[values.index(max(values))]
        return Choice(chosen, decode, wake_ms, weight, extra_ms)

    def starved(self, now_ms: float, s: SessionView, bound_ms: float) -> bool:
        """Left out for so many steps that it takes part whatever it is worth."""
        return now_ms - s.arrived_ms > self.settings.starvation_steps * bound_ms

    def by_need(self, now_ms: float, sessions: Sequence[SessionView], bound_ms: float) -> list[SessionView]:
        """Starved sessions first, then by slack, then those whose SLO is unreachable."""

        def rank(s: SessionView) -> float:
            if self.starved(now_ms, s, bound_ms):
                return -math.inf
            return math.inf if s.slo_unreachable else s.deadline_ms

        return sorted(sessions, key=rank)

    def weights(
        self, now_ms: float, decode: Sequence[SessionView], costs: Costs, estimator: StepTimeEstimator
    ) -> dict[str, float]:
        """What a token of each session is worth."""
        settings, step_ms = self.settings, costs.bound
        undrafted_ms = price(decode, {s.session: 0 for s in decode}, estimator)
        undrafted_ms += max(0.0, self.between_ms) + self.prompt_ms
        weight, urgency = {}, {}
        for s in decode:
            slack_ms, token_ms = s.deadline_ms - now_ms, 1000.0 / s.slo.tokens_per_s
            # Two steps in hand: not behind at all; as many late: all the way.
            behind = min(max(0.5 - slack_ms / (4.0 * step_ms), 0.0), 1.0)
            weight[s.session] = 1.0 + (settings.lag_weight - 1.0) * behind * settings.weigh_lag
            # Steps without drafts would take so long to the end, and leave so much of the time until it.
            needed_ms = s.tokens_left * undrafted_ms
            spare_ms = slack_ms + (s.tokens_left - 1) * token_ms - needed_ms
            error_ms = settings.boost_error * needed_ms
            first, last = settings.boost_full_steps, settings.boost_none_steps
            urgency[s.session] = min(max((last - slack_ms / step_ms) / (last - first), 0.0), 1.0) ** 2
            ahead = slack_ms >= settings.boost_ahead_share * token_ms * s.committed
            # So long it has taken since its first token, and would take to its last at that speed.
            known, so_far_ms = settings.boost_speed_tokens, token_ms * s.committed - slack_ms
            usual_ms = (so_far_ms + known * undrafted_ms) / (max(s.committed - 1, 0) + known)
            usual_ms *= (1.0 + settings.boost_error) * s.tokens_left
            on_time = usual_ms <= slack_ms + (s.tokens_left - 1) * token_ms
            if s.slo_unreachable or spare_ms < -error_ms or on_time or ahead:
                urgency[s.session] = 0.0
        together = settings.slo_boost_weight * len(decode) / max(1.0, sum(urgency.values()))
        for s in decode:
            if settings.slo_boost:
                boosted = 1.0 + together * urgency[s.session]
                weight[s.session] = max(weight[s.session], boosted)
            if settings.deprioritize and s.slo_unreachable:
                weight[s.session] = settings.slo_unreachable_weight
        return weight

    @staticmethod
    def ranking(
        decode: Sequence[SessionView], costs: Costs, weight: dict[str, float]
    ) -> list[tuple[str, float]]:
        """(whose draft, weighted tokens it is expected to bring), in falling order of that per ms."""
        drafts = []
        for s in decode:
            cum_acceptance = 1.0
            for acceptance_prob in s.acceptance_probs:
                cum_acceptance *= acceptance_prob
                if cum_acceptance > 0.0:
                    brings = cum_acceptance * weight[s.session]
                    drafts.append((brings / max(costs.draft(s), 1e-12), s.session, brings))
        drafts.sort(key=lambda draft: -draft[0])
        return [(name, brings) for _, name, brings in drafts]

    @staticmethod
    def linear_best(
        members: Sequence[SessionView],
        ranking: Sequence[tuple[str, float]],
        costs: Costs,
        weight: dict[str, float],
    ) -> tuple[int, float]:
        """(how many drafts make the highest rate by the linear costs, the fewest of equals; that rate)."""
        depth = {s.session: costs.draft(s) for s in members}
        worth = sum(weight[s.session] for s in members)
        spent = costs.fixed + sum(costs.spent(s, 0) for s in members)
        best, rate = 0, worth / max(spent, 1e-9)
        for length, (name, brings) in enumerate(ranking, 1):
            worth, spent = worth + brings, spent + depth[name]
            if worth / max(spent, 1e-9) > rate:
                best, rate = length, worth / max(spent, 1e-9)
        return best, rate

    @staticmethod
    def waiters(
        now_ms: float,
        decode: Sequence[SessionView],
        keep: Keep,
        rate: float,
        costs: Costs,
        safety_ms: float,
        weight: dict[str, float],
        estimator: StepTimeEstimator,
        starved: set[str],
    ) -> tuple[set[str], float]:
        """(who waits for a draft that is due, when the first of those is due)."""
        spent = {s.session: costs.spent(s, keep[s.session]) for s in decode}
        whole_ms = max(1e-6, costs.fixed + sum(spent.values()))
        company_ms = costs.fixed / len(decode)
        due, lost, saved = [], {}, {}
        for s in decode:
            if s.session in starved or s.due_ms is None or not s.due_acceptance_probs:
                continue
            in_time = now_ms <= s.due_ms <= now_ms + whole_ms
            if not in_time or s.deadline_ms - now_ms < whole_ms + safety_ms:
                continue
            held = math.prod(s.acceptance_probs)
            lost[s.session] = (1.0 - held * s.due_acceptance_probs[0]) * weight[s.session]
            saved[s.session] = costs.read(s) - company_ms
            # However sure its draft, at the rate with everybody in it must be worth the wait.
            if rate * max(saved[s.session], 0.0) > (1.0 - 0.995 * held) * weight[s.session]:
                due.append(s)
        due.sort(key=lambda s: s.due_ms)
        out: set[str] = set()
        for _ in range(8):
            left_ms, again = whole_ms, set()
            for s in due:
                if rate * saved[s.session] > lost[s.session]:
                    left_ms -= spent[s.session]
                    if s.due_ms - now_ms > left_ms:
                        break
                    again.add(s.session)
            if again == out:
                break
            out, worth, time = again, 0.0, costs.fixed
            for s in decode:
                if s.session not in out:
                    worth += expected_tokens(s.acceptance_probs[: keep[s.session]]) * weight[s.session]
                    time += spent[s.session]
            rate = worth / time if time > 0 and worth > 0 else 0.0
        if rate <= 0.0 or not out:
            return set(), math.inf
        # The step must really become shorter: by what linear costs say, less what waiting gains anyway.
        everybody = price(decode, keep, estimator)
        others = price(decode, {n: k for n, k in keep.items() if n not in out}, estimator)
        linear_ms = sum(spent[name] for name in out)
        margin_ms = sum(saved[name] - lost[name] / rate for name in out)
        if everybody - others - linear_ms + margin_ms <= 0.0:
            return set(), math.inf
        return out, min(s.due_ms for s in decode if s.session in out)


def drafts_of(members: Sequence[SessionView], taken: Sequence[tuple[str, float]]) -> Keep:
    """Drafts that each member keeps when these are taken."""
    keep = dict.fromkeys((s.session for s in members), 0)
    for name, _ in taken:
        keep[name] += 1
    return keep
