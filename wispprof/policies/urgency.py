"""How urgently each session needs the step: slack, lag behind its SLO, starvation."""

from __future__ import annotations

import math
from operator import attrgetter
from typing import NamedTuple, Self

import numpy as np

from wispprof.policies.cost_model import BoolArray, FloatArray, IntArray
from wispprof.policies.interface import SessionView, column
from wispprof.policies.wispprof_settings import WispprofSettings

_DEADLINE, _ARRIVED = column("deadline_ms"), column("arrived_ms")
_SLO_UNREACHABLE, _COMMITTED = column("slo_unreachable"), column("committed")
_SPEED, _TOKENS_LEFT = attrgetter("slo.tokens_per_s"), column("tokens_left")


class Urgency(NamedTuple):
    """Urgency of n sessions, (n,) each.

    ``slack_ms``: time to its deadline. ``slo_unreachable``: no schedule can meet its SLO. ``waited_ms``:
    time since it became ready. ``starved``: it waited so long that it is scheduled whatever its value.
    ``rank``: lower goes first: starved sessions, then by slack, then those whose SLO is unreachable.
    """

    slack_ms: FloatArray
    slo_unreachable: BoolArray
    waited_ms: FloatArray
    starved: BoolArray
    rank: FloatArray

    @classmethod
    def of(cls, now_ms: float, sessions: list[SessionView], starvation_ms: float) -> Self:
        count = len(sessions)
        waited_ms = now_ms - np.fromiter(map(_ARRIVED, sessions), np.float64, count)
        slack_ms = np.fromiter(map(_DEADLINE, sessions), np.float64, count) - now_ms
        slo_unreachable = np.fromiter(map(_SLO_UNREACHABLE, sessions), np.bool_, count)
        return cls._ranked(slack_ms, slo_unreachable, waited_ms, starvation_ms)

    def take(self, idx: IntArray, starvation_ms: float) -> Self:
        """The urgency of the sessions at ``idx``."""
        return self._ranked(self.slack_ms[idx], self.slo_unreachable[idx], self.waited_ms[idx], starvation_ms)

    @classmethod
    def _ranked(
        cls, slack_ms: FloatArray, slo_unreachable: BoolArray, waited_ms: FloatArray, starvation_ms: float
    ) -> Self:
        starved = waited_ms > starvation_ms
        rank = np.where(slo_unreachable, math.inf, slack_ms)
        rank[starved] = -math.inf
        return cls(slack_ms, slo_unreachable, waited_ms, starved, rank)

    def lag(self, step_ms: float, lag_steps: float) -> FloatArray:
        """How far each session (n,) lags behind its SLO, 0 … 1.

        0 with ``lag_steps`` steps of slack or more, 1 if it is as many steps late.
        """
        if step_ms <= 0.0:
            return np.zeros(len(self.slack_ms))
        lag = 0.5 - self.slack_ms / (2.0 * lag_steps * step_ms)
        return np.minimum(np.maximum(lag, 0.0), 1.0)

    def slo_boost(
        self, sessions: list[SessionView], undrafted_ms: float, step_ms: float, settings: WispprofSettings
    ) -> FloatArray:
        """How much each session (n,) needs short steps, 0 … 1.

        ``undrafted_ms``: what it takes until everybody has advanced by one token, prompts included. To the
        end of its generation a session needs that for each token left. The SLO must allow that time, give or
        take what the estimate may be off. The boost then grows as the next deadline comes near.

        0 if the SLO is unreachable, whatever the schedule or by undrafted steps; if the session meets it at
        its speed so far, give or take as much; or if it is well ahead: its next drafts make up for a long
        step. ``step_ms``: time of a step with the pending drafts.
        """
        count = len(sessions)
        token_ms = 1000.0 / np.fromiter(map(_SPEED, sessions), np.float64, count)
        committed = np.fromiter(map(_COMMITTED, sessions), np.float64, count)
        left = np.fromiter(map(_TOKENS_LEFT, sessions), np.float64, count)
        generation_ms = token_ms * committed
        allowed_ms = self.slack_ms - token_ms + left * token_ms  # until its last token is due
        spare_ms = allowed_ms - left * undrafted_ms
        error_ms = settings.boost_error * undrafted_ms * left
        # Time per token so far. The first tokens say little: some are counted that take undrafted steps.
        known = settings.boost_speed_tokens
        so_far_ms = generation_ms - self.slack_ms + known * undrafted_ms
        so_far_ms /= np.maximum(committed - 1.0, 0.0) + known
        boosted = (
            (spare_ms >= -error_ms)
            & ((1.0 + settings.boost_error) * so_far_ms * left > allowed_ms)
            & ~self.slo_unreachable
            & (self.slack_ms < settings.boost_ahead_share * generation_ms)
        )
        first, last = settings.boost_full_steps, settings.boost_none_steps
        nearness = (last - self.slack_ms / max(step_ms, 1e-9)) / (last - first)
        boost: FloatArray = boosted * np.minimum(np.maximum(nearness, 0.0), 1.0) ** 2
        return boost

    def most_urgent(self, scheduled: BoolArray, limit: int) -> BoolArray:
        """The ``limit`` most urgent of the sessions in ``scheduled`` (n,)."""
        idx = scheduled.nonzero()[0]
        if len(idx) <= limit:
            return scheduled
        kept = np.zeros(len(scheduled), dtype=bool)
        kept[idx[self.rank[idx].argpartition(limit - 1)[:limit]]] = True
        return kept
