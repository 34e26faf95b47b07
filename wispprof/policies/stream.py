"""The ``wispprof`` batching policy: every step chooses how much of each tail to verify now.

Its pieces, each of which can be switched off (:class:`StreamSettings`):

*trim*: the tails that maximise expected tokens per ms (:mod:`wispprof.policies.tails`).
*wait*: a session whose next draft is due stays out where reading its cache once instead of twice is
worth more than the token it might lose (:mod:`wispprof.policies.waiting`).
*slack*: tokens of sessions that fall behind their promise weigh more, so those that ran ahead give up
drafts for their sake. They are not left out: that pinned everybody at the promised speed and cost more
tokens than it saved promises. (``in_time`` adds a hard rule: no step so long that a session misses the
due time of its next token. It is off: promises count over a whole generation, and short steps for one
token's sake cost more sessions their promise than they save.)
*size_prefill*: prompt chunks as large as no running session minds (:mod:`wispprof.policies.prefill`).
*demote_hopeless*: tokens of sessions whose promise is lost weigh little, and such sessions stay out
where together they would add more to the step than the fixed part of a step of their own.
*floor*: the plan of centralized serving is always among the candidates.

The candidates are priced exactly by the estimator, on its median for throughput and on its bound for
deadlines, so the linear costs that made them decide nothing by themselves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from operator import attrgetter

import numpy as np

from wispprof.core import StepEstimator
from wispprof.policies.api import Limits, SessionView, StepPlan
from wispprof.policies.build import StepBuilder, eligible, idle
from wispprof.policies.marginal import Slopes, price_batches
from wispprof.policies.prefill import add_prompts
from wispprof.policies.tails import Book, BoolArray, Columns, FloatArray, IntArray, keep_at, solve
from wispprof.policies.waiting import waits

__all__ = ["StreamSettings", "Wispprof"]

_DEADLINE, _ARRIVED = attrgetter("deadline_ms"), attrgetter("arrived_ms")
_HOPELESS = attrgetter("hopeless")
_RETRY_MS = 1.0
_FEW = 96
"""Up to this many sessions several candidates are priced; beyond, one more row hardly shows."""
_SCALES = (0.0, 0.5, 0.75, 1.0, 1.5, 2.5)
_MANY_SCALES = (1.0, 2.5)
_BLEND = 0.05


@dataclass(frozen=True, slots=True)
class StreamSettings:
    """Switches of the pieces, and their few constants.

    ``catch_up``: weight of a token of a session that is far behind; 1 switches weighing off.
    ``hopeless_weight``: of one whose promise is lost. ``patience``: a session left out for this many
    steps takes part whatever it is worth. ``first_token``: target of a first token that nothing was promised
    for, in times of reading its prompt alone on the server.
    """

    trim: bool = True
    wait: bool = True
    slack: bool = True
    size_prefill: bool = True
    demote_hopeless: bool = True
    floor: bool = True
    in_time: bool = False
    catch_up: float = 4.0
    hopeless_weight: float = 0.25
    patience: float = 8.0
    first_token: float = 4.0


@dataclass
class Wispprof:
    """Stream-mode batching. ``settings`` switches its pieces."""

    settings: StreamSettings = field(default_factory=StreamSettings)
    name: str = field(default="wispprof", init=False)
    stream: bool = field(default=True, init=False)
    _slopes: Slopes = field(default_factory=Slopes, init=False, repr=False)
    _backlog: float = field(default=0.0, init=False, repr=False)

    def plan(
        self,
        now_ms: float,
        sessions: list[SessionView],
        estimator: StepEstimator,
        limits: Limits,
    ) -> StepPlan:
        ready = eligible(sessions)
        decode = [s for s in ready if not s.prompt_left]
        prompts = [s for s in ready if s.prompt_left]
        if not decode and not prompts:
            return idle(now_ms, None, "idle")
        if min(limits.max_items, limits.max_tokens, limits.kv_free) < 1:
            return idle(now_ms, now_ms + _RETRY_MS, "no room")
        build = StepBuilder(estimator, limits)
        wake_ms, gain = math.inf, 1.0
        if decode:
            chosen, keep, wake_ms, gain = self._choose(
                now_ms, decode, estimator, limits, bool(prompts)
            )
            for index in chosen:
                build.add_decode(decode[index], keep[index])
        if prompts:
            sized, patience = self.settings.size_prefill, self.settings.first_token
            add_prompts(build, now_ms, prompts, decode, gain, sized=sized, patience=patience)
        fed = sum(m.prefill for m in build.members)
        backlog = sum([s.prompt_left for s in prompts]) > fed
        self._backlog += _BLEND * (float(backlog) - self._backlog)
        if build.members:
            return build.plan("stream")
        return idle(now_ms, min(wake_ms, now_ms + 50.0), "waiting for drafts")

    # --- who decodes, with how much -----------------------------------------------------------

    def _choose(
        self,
        now_ms: float,
        decode: list[SessionView],
        estimator: StepEstimator,
        limits: Limits,
        company: bool,
    ) -> tuple[list[int], list[int], float, float]:
        """(indices in order of need, drafts kept by index, when to ask again if nobody advances,
        expected tokens per member)."""
        count = len(decode)
        settings = self.settings
        columns = Columns.of(decode)
        costs = columns.slopes(self._slopes, estimator, limits.max_items)
        slack = np.fromiter(map(_DEADLINE, decode), np.float64, count) - now_ms
        idle_ms = now_ms - np.fromiter(map(_ARRIVED, decode), np.float64, count)
        lost = np.fromiter(map(_HOPELESS, decode), np.bool_, count)
        horizon = 2.0 * costs.all_bound_ms
        weight = self._weights(decode, slack, lost, horizon)
        # Steps that waiting prompts call for anyway have paid their fixed part: decoding then costs only what
        # it adds, and a draft must beat what a lone advance earns for that.
        sunk_ms = self._backlog * costs.fixed_ms
        book = Book.build(columns, costs._replace(fixed_ms=costs.fixed_ms - sunk_ms), weight)
        everyone = np.ones(count, dtype=bool)
        stale = idle_ms > settings.patience * costs.all_bound_ms
        if settings.trim:
            rate, keep = solve(book, everyone)
        else:
            keep = book.lengths
            rate = solve(book, everyone)[0]
        members = everyone.copy()
        wake_ms = math.inf
        if settings.wait:
            out, due_ms, margin_ms = waits(
                now_ms, decode, book, keep, rate, slack, costs.all_bound_ms
            )
            out &= ~stale
            if out.any() and self._waiting_pays(book, keep, out, margin_ms, estimator):
                members, wake_ms = ~out, due_ms
        if settings.demote_hopeless and bool((~lost).any()):
            out = lost & ~stale & (_net(book, keep, rate) < 0.0)
            # Left out, they need a step of their own later, and its fixed part is paid again: that must
            # cost less than what they add to this one, or they starve for nothing.
            if float((book.lone_ms + keep * book.row_ms)[out].sum()) > costs.fixed_ms:
                members &= ~out
        if not members.any() and not self._pays_to_idle(now_ms, decode, book, keep, rate, wake_ms):
            members = everyone
        if not members.any() and not company:
            return [], [], wake_ms, 1.0
        need = np.lexsort((-book.gains[np.arange(count), keep], slack, ~stale))
        members, keep = self._fit(members, keep, need, limits)
        members, keep = self._best(
            book, members, keep, rate, slack, lost, estimator, limits, need, sunk_ms
        )
        order: list[int] = need[members[need]].tolist()
        gains = book.gains[order, keep[order]]
        gain = float(gains.mean()) if order else 1.0
        return order, keep.tolist(), wake_ms, gain

    def _weights(
        self, decode: list[SessionView], slack: FloatArray, lost: BoolArray, horizon: float
    ) -> FloatArray:
        """Worth of a session's tokens: 1 while its slack exceeds the horizon, rising to ``catch_up``
        when it is as far behind as it should be ahead."""
        weight = np.ones(len(decode))
        if self.settings.slack and horizon > 0:
            behind = np.clip(1.0 - slack / horizon, 0.0, 2.0) / 2.0
            weight += (self.settings.catch_up - 1.0) * behind
        if self.settings.demote_hopeless:
            weight[lost] = self.settings.hopeless_weight
        return weight

    @staticmethod
    def _waiting_pays(
        book: Book, keep: IntArray, out: BoolArray, margin_ms: float, estimator: StepEstimator
    ) -> bool:
        """Whether the step without the waiters is really shorter, by the estimator: where rows are free
        or padded it may save less than the linear costs promised, and then nobody waits."""
        new = np.stack((keep + 1, np.where(out, 0, keep + 1)))
        p50 = price_batches(estimator, new, book.cached)[0]
        promised_ms = float((book.lone_ms + keep * book.row_ms)[out].sum())
        return float(p50[0] - p50[1]) - promised_ms + margin_ms > 0.0

    @staticmethod
    def _pays_to_idle(
        now_ms: float,
        decode: list[SessionView],
        book: Book,
        keep: IntArray,
        rate: float,
        wake_ms: float,
    ) -> bool:
        """Whether waiting for the first due draft, the server idle, still beats starting now."""
        if not math.isfinite(wake_ms):
            return False
        return (wake_ms - now_ms) * rate < float(book.weight.sum()) * 0.1

    @staticmethod
    def _fit(
        members: BoolArray, keep: IntArray, need: IntArray, limits: Limits
    ) -> tuple[BoolArray, IntArray]:
        """Cut to the limits: the least needy leave, then the longest tails are shortened."""
        room = min(limits.max_tokens, limits.kv_free)
        inside = need[members[need]]
        dropped = inside[min(limits.max_items, room) :]
        members = members.copy()
        members[dropped] = False
        keep = keep * members
        spare = room - int(members.sum())
        while int(keep.sum()) > spare:
            most = int(keep.max())
            widest = np.flatnonzero(keep == most)
            excess = int(keep.sum()) - spare
            keep[widest[:excess]] = most - 1
        return members, keep

    def _best(
        self,
        book: Book,
        members: BoolArray,
        keep: IntArray,
        rate: float,
        slack: FloatArray,
        lost: BoolArray,
        estimator: StepEstimator,
        limits: Limits,
        need: IntArray,
        sunk_ms: float,
    ) -> tuple[BoolArray, IntArray]:
        """Price candidates exactly and take the best: fewest promises broken, then the best rate."""
        masks, keeps = [members], [keep]
        if self.settings.trim:
            scales = _SCALES if len(keep) <= _FEW else _MANY_SCALES
            for scale in scales:
                if scale != 1.0:
                    mask, cut = self._fit(members, keep_at(book, rate * scale), need, limits)
                    masks.append(mask)
                    keeps.append(cut)
        if self.settings.floor:
            mask, cut = self._fit(np.ones_like(members), np.zeros_like(keep), need, limits)
            masks.append(mask)
            keeps.append(cut)
        inside, kept = np.array(masks), np.array(keeps)
        new = np.where(inside, kept + 1, 0)
        p50, bound = price_batches(estimator, new, book.cached)
        gains = np.take_along_axis(book.gains[None], kept[..., None], axis=2)[..., 0]
        rates = (gains * book.weight * inside).sum(axis=1) / np.maximum(p50 - sunk_ms, 1e-9)
        if self.settings.slack and self.settings.in_time:
            # Who stays out is answered by the next step at the earliest.
            finish = np.where(inside, bound[:, None], 2.0 * bound[:, None])
            in_time = (slack >= bound.min()) & ~lost
            broken = ((finish > slack) & in_time).sum(axis=1)
        else:
            broken = np.zeros(len(p50), dtype=np.int64)
        best = int(np.lexsort((-rates, broken))[0])
        return inside[best], kept[best]


def _net(book: Book, keep: IntArray, rate: float) -> FloatArray:
    """What each session's part is worth beyond the time it takes, at the going rate."""
    gains = book.gains[np.arange(len(keep)), keep] * book.weight
    net: FloatArray = gains - rate * (book.lone_ms + keep * book.row_ms)
    return net
