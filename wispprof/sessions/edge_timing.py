"""What a session's edge knows of time: draft step, server, and the slack left in a round."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from wispprof.policies.api import RoundContext
from wispprof.types import Slo

__all__ = ["EdgeTiming"]

_WEIGHT = 0.25
_FIRST_GUESS_MS = 10.0
_MARGIN = 0.25


class EdgeTiming:
    """Running means of one session's times, and the WISP budget of a round.

    The budget of a round is its expected tokens over the promised speed. It runs from the arrival of
    the last commit, so drafting and waiting at the edge are counted as they really took; what is left
    after the link's round trip is the server's to queue and verify in. With ``carry`` it runs from the
    moment the last committed token was due instead: what a session ran ahead counts for it, and what it
    fell behind against it.

    ``draft_ms``: a draft step; ``server_ms``: queueing and verifying; guesses until one was met.
    """

    def __init__(self, slo: Slo, carry: bool = False) -> None:
        self._slo = slo
        self._carry = carry
        self._due_ms = 0.0
        self.draft_ms = self.server_ms = _FIRST_GUESS_MS
        self._drafted = self._served = False
        self._waited_ms = 0.0
        self._since_ms: float | None = None
        self._sent_ms: float | None = None
        self._heard_ms = 0.0

    def drafted(self, draft_ms: float, waited_ms: float = 0.0) -> None:
        """A draft step took this long, after it had waited for a device that other sessions share."""
        usual = self.draft_ms if self._drafted else draft_ms
        self.draft_ms = usual + _WEIGHT * (draft_ms - usual)
        self._drafted = True
        self._waited_ms += _WEIGHT * (waited_ms - self._waited_ms)

    def sent(self, now_ms: float) -> None:
        """A draft frame left."""
        self._sent_ms = now_ms

    def left_ms(self, now_ms: float, rtt_ms: float) -> float:
        """How long until the commit of what was sent last is expected, at least a quarter of the usual
        wait where it is overdue; ``inf`` before anything was sent."""
        if self._sent_ms is None:
            return math.inf
        usual = rtt_ms + self.server_ms
        return max(self._sent_ms + usual - now_ms, usual / 4.0)

    def may_hold(self, now_ms: float, rtt_ms: float) -> bool:
        """Stream mode: whether drafts that leave together with the next one are still in time for the
        step that they would be in time for now; no, while the server's pace is not known.

        The last commit left the server half a round trip before it came here. From then on the server
        takes this session into a step once every :attr:`server_ms`, and what is to be in it must have left
        half a round trip earlier. The last quarter of the period is kept for what nobody knows: jitter,
        and steps that are shorter than usual.
        """
        return self.holds(rtt_ms)(now_ms)

    def holds(self, rtt_ms: float) -> Callable[[float], bool]:
        """:meth:`may_hold` of any moment, for as long as this object is told nothing new."""
        if not self._served:
            return _never
        period, last_seen_ms = max(self.server_ms, 1e-3), self._heard_ms
        needed_ms, kept_ms = self.draft_ms + self._waited_ms, _MARGIN * period

        def hold(now_ms: float) -> bool:
            return needed_ms <= period - (now_ms - last_seen_ms + rtt_ms) % period - kept_ms

        return hold

    def committed(self, now_ms: float, server_ms: float, tokens: int = 1) -> None:
        """``tokens`` were committed; the server spent ``server_ms`` queueing and verifying."""
        self._heard_ms = now_ms
        if self._since_ms is None:
            self._due_ms = now_ms + (tokens - 1) * self._slo.tpot_ms
        else:  # the first commit's time is the prefill's
            usual = self.server_ms if self._served else server_ms
            self.server_ms = usual + _WEIGHT * (server_ms - usual)
            self._served = True
            self._due_ms += tokens * self._slo.tpot_ms
        self._since_ms = self._due_ms if self._carry else now_ms

    def context(self, rtt_ms: float, load_level: int, draft_ahead: int) -> RoundContext:
        """What a controller is told when a round begins."""
        # By place: this is built at every stretch, and keywords cost more than the rest of it.
        return RoundContext(
            self.draft_ms, rtt_ms, self.server_ms, load_level, draft_ahead, self._slo
        )

    def slack_ms(self, acceptance_prob: Sequence[float], now_ms: float, rtt_ms: float) -> float:
        """Remaining slack of a round that leaves now: expected tokens / speed − draft − network − waited.

        ``acceptance_prob``: of each draft, given those before it. Negative where the promise is already late.
        """
        expected, product = 1.0, 1.0
        for value in acceptance_prob:
            product *= value
            expected += product
        since = now_ms if self._since_ms is None else self._since_ms
        return expected * self._slo.tpot_ms - (now_ms - since) - rtt_ms


def _never(now_ms: float) -> bool:
    return False
