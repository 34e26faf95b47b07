"""What the edge of one session knows about time: draft steps, the server, and the slack left in a round."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from wispprof.policies.interface import RoundContext
from wispprof.types import Slo

_WEIGHT = 0.25
_INITIAL_MS = 10.0
_MARGIN = 0.25


class HoldRule(NamedTuple):
    """Drafts may be held while the next one (``needed_ms``) is ready before the server's step, less a
    margin."""

    needed_ms: float
    period_ms: float
    margin_ms: float
    last_commit_ms: float
    rtt_ms: float


class EdgeTiming:
    """Running means of one session's times, and the WISP time budget of a round.

    The budget of a round is its expected tokens over the SLO's speed. It starts when the last commit arrives,
    so real drafting and waiting times count. What remains after the link's round trip is the server's to
    queue and verify in. With ``carry`` the budget starts when the last committed token was due instead: a
    session that is ahead of its SLO has more time, one that lags has less.

    ``draft_ms``: a draft step. ``server_ms``: queueing and verifying. Both are guesses until one was
    measured.
    """

    def __init__(self, slo: Slo, carry: bool = False) -> None:
        self._slo = slo
        self._carry = carry
        self._due_ms = 0.0
        self.draft_ms = self.server_ms = _INITIAL_MS
        self._drafted = self._verified = False
        self._waited_ms = 0.0
        self._budget_from_ms: float | None = None
        self._sent_ms: float | None = None
        self._last_commit_ms = 0.0

    def drafted(self, draft_ms: float, waited_ms: float = 0.0) -> None:
        """A draft step took ``draft_ms``, after it waited for a device that other sessions share."""
        mean = self.draft_ms if self._drafted else draft_ms
        self.draft_ms = mean + _WEIGHT * (draft_ms - mean)
        self._drafted = True
        self._waited_ms += _WEIGHT * (waited_ms - self._waited_ms)

    def sent(self, now_ms: float) -> None:
        """A draft frame left."""
        self._sent_ms = now_ms

    def committed(self, now_ms: float, server_ms: float, tokens: int = 1) -> None:
        """``tokens`` were committed; the server spent ``server_ms`` queueing and verifying."""
        self._last_commit_ms = now_ms
        if self._budget_from_ms is None:
            self._due_ms = now_ms + (tokens - 1) * self._slo.tpot_ms
        else:  # the first commit's time is the prefill's
            mean = self.server_ms if self._verified else server_ms
            self.server_ms = mean + _WEIGHT * (server_ms - mean)
            self._verified = True
            self._due_ms += tokens * self._slo.tpot_ms
        self._budget_from_ms = self._due_ms if self._carry else now_ms

    def until_commit_ms(self, now_ms: float, rtt_ms: float) -> float:
        """Time until the commit of the last frame is expected; negative if it is overdue, ``inf`` before
        anything was sent."""
        return math.inf if self._sent_ms is None else self._sent_ms + rtt_ms + self.server_ms - now_ms

    def left_ms(self, now_ms: float, rtt_ms: float) -> float:
        """:meth:`until_commit_ms`, and at least a quarter of the usual wait, also if it is overdue."""
        return max(self.until_commit_ms(now_ms, rtt_ms), (rtt_ms + self.server_ms) / 4.0)

    def may_hold(self, now_ms: float, rtt_ms: float) -> bool:
        """Stream mode: whether drafts that wait for the next one still reach the same server step.

        ``False`` until the server's step period is known. The last commit left the server half a round trip
        before it arrived. From then on the server takes this session into a step once every
        :attr:`server_ms`; drafts for that step must leave half a round trip earlier. The last quarter of the
        period is a margin for jitter and for steps that are shorter than usual.
        """
        needed_ms, period_ms, margin_ms, last_commit_ms, rtt_ms = self.hold_rule(rtt_ms)
        phase_ms = (now_ms - last_commit_ms + rtt_ms) % period_ms
        return needed_ms <= period_ms - phase_ms - margin_ms

    def hold_rule(self, rtt_ms: float) -> HoldRule:
        """What :meth:`may_hold` depends on besides the time, valid until the next measurement."""
        if not self._verified:
            return HoldRule(math.inf, 1.0, 0.0, 0.0, rtt_ms)
        period_ms = max(self.server_ms, 1e-3)
        return HoldRule(
            self.draft_ms + self._waited_ms, period_ms, _MARGIN * period_ms, self._last_commit_ms, rtt_ms
        )

    def context(
        self, rtt_ms: float, load_level: int, draft_ahead: int, committed_len: int = 0
    ) -> RoundContext:
        """The controller's context of a round."""
        # By position: keywords cost more than the rest of the call.
        return RoundContext(
            self.draft_ms,
            rtt_ms,
            self.server_ms,
            load_level,
            draft_ahead,
            self._slo,
            committed_len,
            self._drafted,
        )

    def slack_ms(self, acceptance_prob: Sequence[float], now_ms: float, rtt_ms: float) -> float:
        """Remaining slack of a round that leaves now: expected tokens / speed − time since the last commit −
        network. Negative if the session already lags.

        ``acceptance_prob``: of each draft, given those before it.
        """
        expected, product = 1.0, 1.0
        for value in acceptance_prob:
            product *= value
            expected += product
        since_ms = now_ms if self._budget_from_ms is None else self._budget_from_ms
        return expected * self._slo.tpot_ms - (now_ms - since_ms) - rtt_ms
