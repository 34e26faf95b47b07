"""The ``wispprof`` speculation controller: optimal stopping with what is known now.

*Round mode.* A round commits ``1 + Σ cumulative acceptance`` tokens and takes ``k·draft + RTT +
server``. At the best rate ρ that this edge can reach now, one more draft pays if its cumulative
acceptance probability exceeds ``ρ·draft_ms`` plus the server's cost of its row (the plan's stop value).
k = 0 is a choice too.

*Stream mode.* Nobody waits for a draft, so the only question is how far drafting ahead is useful: until the
reply to what was sent can be back, and while the cumulative acceptance probability is worth a draft
step. If the server hardly ever accepts its drafts, the edge stops drafting for a while.

The plan limits both: its k or draft-ahead is the maximum, and its k = 0 is obeyed.

*Trees* replace the chain of either mode where a forward over several nodes takes about as long as one over a
single node (:meth:`WispprofController.shape`).
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect
from collections.abc import Callable

from wispprof.artifacts.plan import DraftRow, Plan
from wispprof.policies.controllers import ConfidenceAcceptance
from wispprof.policies.interface import RoundContext, TreeShape
from wispprof.policies.tree_shapes import MeasuredShapes
from wispprof.types import DraftFeatures, RejectionPredictor

DraftRowLookup = Callable[[RoundContext], DraftRow | None]

_EWMA_WEIGHT = 0.1
_PRIOR = 0.7
"""Acceptance probability at each depth before any draft was seen."""
_TRIAL_COMMITS = 40
"""Commits after which a stream is judged. Measured: by 16, one accepted token in twenty looks like none."""
_PAUSE_COMMITS = 12
"""Commits for which a stream pauses if drafting did not pay, doubling up to 8 times this."""


class PlannedRows:
    """From a round's RTT, load level, SLO and context to the plan's row for a device."""

    def __init__(self, plan: Plan, device: str, mode: str = "stream") -> None:
        self._plan = plan
        self._device = device
        self._mode = mode
        # The next context begins where it is nearer by ratio.
        self._bounds = [math.sqrt(a * b) for a, b in itertools.pairwise(plan.contexts)]
        self._rows: dict[tuple[int, int, float, int], DraftRow] = {}

    def __call__(self, context: RoundContext) -> DraftRow:
        plan = self._plan
        speed = context.slo.tokens_per_s if context.slo is not None else max(plan.slo_classes)
        # RTT is measured all the time; values within 5 % mean the same row.
        rtt_step = round(20.0 * math.log(max(context.rtt_ms, 0.1)))
        cached = plan.contexts[bisect(self._bounds, context.committed_len)]
        key = (rtt_step, context.load_level, speed, cached)
        row = self._rows.get(key)
        if row is None:
            row = plan.draft_row(self._device, context.rtt_ms, context.load_level, speed, self._mode, cached)
            self._rows[key] = row
        return row


class WispprofController:
    """One controller per session.

    ``rows``: the plan, see :class:`PlannedRows`; without it only measurements decide. ``k_max``:
    most drafts of a round. ``draft_ahead_max``: farthest draft-ahead of a stream.
    ``min_cum_acceptance``: least cumulative acceptance probability worth a draft step. ``min_accepted``:
    accepted drafts per commit below which a stream pauses. ``hysteresis``: relative gain in rate that a
    new k needs, so that k does not flap. ``node_ms``: what each further node adds to a forward of the draft
    model, ``inf`` if only a plan may name trees; ``None``: the drafter, or the server, has none.
    """

    name = "wispprof"

    def __init__(
        self,
        predictor: RejectionPredictor | None = None,
        rows: DraftRowLookup | None = None,
        *,
        stream: bool = True,
        k_max: int = 16,
        draft_ahead_max: int = 32,
        min_cum_acceptance: float = 0.01,
        min_accepted: float = 0.02,
        hysteresis: float = 0.03,
        node_ms: float | None = None,
    ) -> None:
        self.predictor = predictor or ConfidenceAcceptance()
        self.rows = rows
        self.row: DraftRow | None = None
        self.stream = stream
        self.k_max = k_max
        self.draft_ahead_max = draft_ahead_max
        self.min_cum_acceptance = min_cum_acceptance
        self.min_accepted = min_accepted
        self.hysteresis = hysteresis
        self.node_ms = node_ms
        self.k = 0
        self._prob_by_depth = [_PRIOR] * k_max
        self._pending_probs: list[float] = []  # of the drafts that are not decided yet
        self._cum_acceptance = 1.0
        self._last_prob = 1.0
        self._stop = min_cum_acceptance
        self._budget = 0
        self._k_chosen = False
        self._drafted = self._accepted = self._commits = 0
        self._pause_left = 0
        self._next_pause = _PAUSE_COMMITS
        self._shapes = None if node_ms is None else MeasuredShapes(node_ms, stream)

    def shape(self, context: RoundContext) -> TreeShape | None:
        """The tree to draft where nodes of the device and rows of the server are cheap; ``None``: a chain.

        A plan's row decides by the server's own costs; without one,
        :class:`~wispprof.policies.tree_shapes.MeasuredShapes`.
        """
        if self._shapes is None:
            return None
        row = self.rows(context) if self.rows is not None else None
        if row is not None:
            return TreeShape(row.nodes, row.depth, row.width, row.beams) if row.nodes else None
        return self._shapes.choose(context, self._prob_by_depth[0])

    def begin(self, context: RoundContext) -> int:
        self.row = self.rows(context) if self.rows is not None else None
        self._last_prob = 1.0
        if self.stream:
            ahead = context.draft_ahead
            self._pending_probs = self._pending_probs[-ahead:] if ahead else []
            self._cum_acceptance = math.prod(self._pending_probs)
            self._budget = self._stream_budget(context)
        else:
            self._pending_probs.clear()
            self._cum_acceptance = 1.0
            self._budget = self._round_budget(context)
        return self._budget

    def go_on(self, depth: int, features: DraftFeatures) -> bool:
        self._last_prob = prob = self.predictor.acceptance_prob(features, depth)
        self._pending_probs.append(prob)
        self._cum_acceptance = cum_acceptance = self._cum_acceptance * prob
        self._drafted += 1
        by_depth, k_max = self._prob_by_depth, self.k_max
        if not self.stream and depth < k_max:
            by_depth[depth] += _EWMA_WEIGHT * (prob - by_depth[depth])
        depth += 1
        if depth >= self._budget:
            return False
        return cum_acceptance * by_depth[depth if depth < k_max else -1] >= self._stop

    def acceptance_prob(self) -> float:
        return self._last_prob

    def finish(self, drafted: int, accepted: int) -> None:
        if self.stream:
            if self._pause_left:
                self._pause_left -= 1
            elif self._drafted:
                self._commits += 1
                self._accepted += accepted

    # --- rounds -------------------------------------------------------------------------------

    def _round_budget(self, context: RoundContext) -> int:
        """Most drafts of the round. Also sets the stop value that ends it earlier."""
        row = self.row
        if row is not None and row.k == 0:
            self.k = 0
            return 0
        k_max = self.k_max if row is None else min(row.k, self.k_max)
        undrafted_ms = context.rtt_ms + context.server_ms
        best_k, best_rate = 0, 1.0 / max(undrafted_ms, 1e-6)
        current_rate = best_rate
        tokens = cum_acceptance = 1.0
        for k in range(1, self.k_max + 1):
            cum_acceptance *= self._prob_by_depth[k - 1]
            tokens += cum_acceptance
            rate = tokens / max(undrafted_ms + k * context.draft_ms, 1e-6)
            if k == self.k:
                current_rate = rate
            if rate > best_rate:
                best_k, best_rate = k, rate
        if not self._k_chosen or best_rate > current_rate * (1.0 + self.hysteresis):
            self.k = best_k
            self._k_chosen = True
        # The plan's stop value is the server's cost of a row plus the drafting time that the plan assumed.
        row_cost = 0.0
        if row is not None and row.round_ms > 0:
            row_cost = max(0.0, row.stop - row.commits / row.round_ms * row.draft_ms)
        stop = best_rate * context.draft_ms + row_cost
        self._stop = min(0.95, max(self.min_cum_acceptance, stop))
        # The stop value ends rounds; k decides whether there is one and limits it loosely.
        return min(k_max, 2 * self.k) if self.k else 0

    # --- streams ------------------------------------------------------------------------------

    def _stream_budget(self, context: RoundContext) -> int:
        """How many more drafts are of use before the next commit can arrive here."""
        row = self.row
        self._stop = self.min_cum_acceptance
        if (row is not None and row.k == 0) or self._paused():
            return 0
        in_flight = (context.rtt_ms + context.server_ms) / max(context.draft_ms, 1e-3)
        draft_ahead = min(self.draft_ahead_max, 4 + 2 * math.ceil(in_flight))
        if row is not None:
            draft_ahead = min(draft_ahead, row.draft_ahead)
        if self._cum_acceptance * self._prob_by_depth[0] < self._stop:
            return 0
        return max(0, draft_ahead - context.draft_ahead)

    def _paused(self) -> bool:
        if self._pause_left > 0:
            return True
        if self._commits >= _TRIAL_COMMITS:
            # Per commit, not per draft: one rejection discards all drafts behind it.
            accepted = self._accepted / self._commits
            self._drafted = self._accepted = self._commits = 0
            if accepted < self.min_accepted:
                self._pause_left = self._next_pause
                self._next_pause = min(8 * _PAUSE_COMMITS, 2 * self._next_pause)
                return True
            self._next_pause = _PAUSE_COMMITS
        return False
