"""The ``wispprof`` speculation controller: optimal stopping with what is known now.

*Round mode.* A round earns ``1 + Σ survival`` tokens and takes ``drafts·draft + link + server``. At the
best rate ρ this edge can have (over its own running survival by depth, the draft step, the round trip and
the server's time as they are now), one more draft pays iff its cumulative acceptance probability exceeds
``ρ·draft_ms`` plus what its row costs the server (the plan's stop value where there is a plan). k = 0 is
among the choices; a new k must beat the old one by ``hysteresis``, so that k does not flap.

*Stream mode.* Drafting costs the link nothing and nobody waits for it, so the question is only how far
ahead is of use: until the reply to what is out can be back, and while the chance that everything before
it holds is worth a draft step. A device whose drafts are hardly ever accepted, because the server
overtakes them, stops drafting and tries again now and then.

The plan bounds both: its k or lead is the most, its k = 0 is obeyed.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from wispprof.artifacts.plan import DraftRow, Plan
from wispprof.policies.api import RoundContext
from wispprof.policies.controllers import ConfidenceAcceptance
from wispprof.types import DraftFeatures, RejectionPredictor

__all__ = ["RowOf", "WispprofController", "rows_of"]

RowOf = Callable[[RoundContext], DraftRow | None]

_WEIGHT = 0.1
_PRIOR = 0.7
_TRIAL = 40
"""Commits after which a stream is judged by what its drafts won of them."""
_REST = 12
"""Commits that a stream rests for after drafting did not pay, doubling up to 8 times this."""


def rows_of(plan: Plan, device: str, mode: str = "stream") -> RowOf:
    """The plan's row for whatever a device meets: round trip, load level and SLO of the round."""

    known: dict[tuple[int, int, float], DraftRow] = {}

    def row(context: RoundContext) -> DraftRow:
        speed = context.slo.tokens_per_s if context.slo is not None else max(plan.slo_classes)
        # Round trips are measured anew all the time; within 5 % they mean the same row.
        rtt_step = round(20.0 * math.log(max(context.rtt_ms, 0.1)))
        key = (rtt_step, context.load_level, speed)
        if key not in known:
            known[key] = plan.draft_row(device, context.rtt_ms, context.load_level, speed, mode)
        return known[key]

    return row


class WispprofController:
    """One per session. ``rows``: the plan, see :func:`rows_of`; without it only measurements decide.

    ``k_max``: longest round. ``lead_max``: farthest draft_ahead of a stream. ``floor``: least cumulative
    survival worth drafting for. ``pays``: accepted drafts per commit under which a stream rests.
    """

    name = "wispprof"

    def __init__(
        self,
        predictor: RejectionPredictor | None = None,
        rows: RowOf | None = None,
        *,
        stream: bool = True,
        k_max: int = 16,
        lead_max: int = 32,
        floor: float = 0.01,
        pays: float = 0.02,
        hysteresis: float = 0.03,
    ) -> None:
        self.predictor = predictor or ConfidenceAcceptance()
        self.rows = rows
        self.row: DraftRow | None = None
        self.stream = stream
        self.k_max = k_max
        self.lead_max = lead_max
        self.floor = floor
        self.pays = pays
        self.hysteresis = hysteresis
        self.k = 0
        self._by_depth = [_PRIOR] * k_max
        self._held: list[float] = []  # survival of the drafts that are out, in order
        self._alive = 1.0
        self._last = 1.0
        self._stop = floor
        self._most = 0
        self._settled = False
        self._drafted = self._accepted = self._commits = 0
        self._rest = 0
        self._next_rest = _REST

    # --- the contract -------------------------------------------------------------------------

    def begin(self, context: RoundContext) -> int:
        self.row = self.rows(context) if self.rows is not None else None
        self._last = 1.0
        if self.stream:
            self._held = self._held[-context.draft_ahead :] if context.draft_ahead else []
            self._alive = math.prod(self._held)
            self._most = self._stream_budget(context)
        else:
            self._held.clear()
            self._alive = 1.0
            self._most = self._round_budget(context)
        return self._most

    def go_on(self, depth: int, features: DraftFeatures) -> bool:
        self._last = self.predictor.acceptance_prob(features, depth)
        self._held.append(self._last)
        self._alive *= self._last
        self._drafted += 1
        if not self.stream and depth < self.k_max:
            self._by_depth[depth] += _WEIGHT * (self._last - self._by_depth[depth])
        depth += 1
        if depth >= self._most:
            return False
        ahead = self._by_depth[depth] if depth < self.k_max else self._by_depth[-1]
        return self._alive * ahead >= self._stop

    def acceptance_prob(self) -> float:
        return self._last

    def finish(self, drafted: int, accepted: int) -> None:
        if self.stream:
            if self._rest:
                self._rest -= 1
            elif self._drafted:
                self._commits += 1
                self._accepted += accepted

    # --- rounds -------------------------------------------------------------------------------

    def _round_budget(self, context: RoundContext) -> int:
        """Most drafts of the round, and the stop value that goes with it."""
        row = self.row
        if row is not None and row.k == 0:
            self.k = 0
            return 0
        most = self.k_max if row is None else min(row.k, self.k_max)
        away = context.rtt_ms + context.server_ms
        best, best_rate = 0, 1.0 / max(away, 1e-6)
        now_rate = best_rate
        tokens = alive = 1.0
        for k in range(1, self.k_max + 1):
            alive *= self._by_depth[k - 1]
            tokens += alive
            rate = tokens / max(away + k * context.draft_ms, 1e-6)
            if k == self.k:
                now_rate = rate
            if rate > best_rate:
                best, best_rate = k, rate
        if not self._settled or best_rate > now_rate * (1.0 + self.hysteresis):
            self.k = best
            self._settled = True
        own = best_rate * context.draft_ms
        # The plan's stop value holds the price of the row beside the drafting time it assumed.
        planned = 0.0
        if row is not None and row.round_ms > 0:
            planned = max(0.0, row.stop - row.commits / row.round_ms * row.draft_ms)
        self._stop = min(0.95, max(self.floor, own + planned))
        # The stop value ends rounds; k only decides whether there is one, and bounds it loosely.
        return min(most, 2 * self.k) if self.k else 0

    # --- streams ------------------------------------------------------------------------------

    def _stream_budget(self, context: RoundContext) -> int:
        """How many more drafts are of use before the next commit can be known here."""
        row = self.row
        self._stop = self.floor
        if (row is not None and row.k == 0) or self._resting():
            return 0
        reach = (context.rtt_ms + context.server_ms) / max(context.draft_ms, 1e-3)
        draft_ahead = min(self.lead_max, 4 + 2 * math.ceil(reach))
        if row is not None:
            draft_ahead = min(draft_ahead, row.draft_ahead)
        if self._alive * self._ahead(0) < self._stop:
            return 0
        return max(0, draft_ahead - context.draft_ahead)

    def _resting(self) -> bool:
        if self._rest > 0:
            return True
        if self._commits >= _TRIAL:
            # Per commit, not per draft: how many drafts one rejection takes with it is the lead's affair.
            won = self._accepted / self._commits
            self._drafted = self._accepted = self._commits = 0
            if won < self.pays:
                self._rest, self._next_rest = self._next_rest, min(8 * _REST, 2 * self._next_rest)
                return True
            self._next_rest = _REST
        return False

    def _ahead(self, depth: int) -> float:
        """Expected survival of a token that is not drafted yet."""
        return self._by_depth[min(depth, self.k_max - 1)]
