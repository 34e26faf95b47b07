"""The server's account of one session: committed tokens, draft tail, cache length, deadline.

Pure: no clock, no I/O, no torch. The step loop of the runtime and the simulator drive the same object:

    merge() as draft frames arrive · view() for the policy · feed() for the engine · apply() its outcome

Positions count from the start of the session, prompt included; the *frontier* is the committed length,
so the next token to decide stands at position ``committed_len``. The tail always begins at the frontier.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from wispprof.policies.interface import ScheduledItem, SessionView
from wispprof.sessions.commit_result import CommitResult, DraftCounters
from wispprof.sessions.draft_arrivals import DraftArrivals
from wispprof.sessions.slo import SloTracker
from wispprof.types import Slo, StepInput, VerifyResult

__all__ = ["SessionState"]


# What the engine works on now: tokens fed, drafts among them, whether it decides; the epoch, the deadline and
# since when the session waited, as they were when the step began.
_Flight = tuple[int, int, bool, int, float, float]


class SessionState:
    """State of one generation on the server.

    ``tokens``: prompt and everything committed, the last ``generated`` of them output. ``max_new``
    bounds the whole output, ``generated`` included. ``stop``: token ids that end the session (the stop
    token itself is committed). ``stream``: the server may advance the session at any time; otherwise
    (round mode) only once its round has arrived. ``undrafted`` sessions are always ready.
    ``max_pending_drafts`` bounds the drafts held; it equals the lead an edge is allowed, so an edge that keeps
    to its lead never meets it. ``floor_ms``: the least time any token can take, for ``slo_unreachable``.
    """

    def __init__(
        self,
        session: str,
        tokens: Sequence[int],
        *,
        slo: Slo,
        max_new: int,
        max_context: int,
        now_ms: float,
        generated: int = 0,
        stop: Sequence[int] = (),
        stream: bool = False,
        undrafted: bool = False,
        cached: int = 0,
        max_pending_drafts: int = 64,
        floor_ms: float = 0.0,
    ) -> None:
        if not tokens or not 0 <= generated < len(tokens):
            raise ValueError(f"{len(tokens)} tokens cannot hold {generated} generated ones")
        if len(tokens) >= max_context or generated >= max_new:
            raise ValueError(
                f"nothing left to generate: {len(tokens)} of {max_context} context tokens and "
                f"{generated} of {max_new} new tokens are used"
            )
        if not 0 <= cached < len(tokens):
            raise ValueError(f"{cached} cached tokens leave none of {len(tokens)} to feed")
        self.session = session
        self.tokens = list(tokens)
        self.generated = generated
        self.max_new = max_new
        self.max_context = max_context
        self._end = min(len(tokens) - generated + max_new, max_context)
        self.stop = frozenset(stop)
        self.stream = stream
        self.undrafted = undrafted
        self.cached = cached
        self.max_pending_drafts = max_pending_drafts
        self.floor_ms = floor_ms
        self.epoch = 0
        self.finished = ""
        self.pending_drafts: list[int] = []
        self.pending_acceptance_probs: list[float] = []
        self.counters = DraftCounters()
        self.slo_tracker = SloTracker(slo, now_ms)
        self.arrivals = DraftArrivals()
        self._min_epoch = 0
        self._started = False
        self._waiting_from_ms = now_ms
        self._round_at = -1
        self._round_deadline_ms = math.inf
        self._flight: _Flight | None = None
        self._flight_withdrawn = False
        self._started_ms = math.nan
        self._view: SessionView | None = None
        self._view_until_ms = math.inf

    # --- what it is ---------------------------------------------------------------------------

    @property
    def slo(self) -> Slo:
        return self.slo_tracker.slo

    @property
    def committed_len(self) -> int:
        """Committed length."""
        return len(self.tokens)

    @property
    def prompt_left(self) -> int:
        """Tokens to prefill before the next one can be decided; 0 while decoding.

        A decoding session has exactly its pending token without KV. A fresh one, and one whose KV
        was taken away, prefills up to and with its last token, which emits.
        """
        left = len(self.tokens) - self.cached
        return left if left > 1 or not self._started else 0

    @property
    def ready(self) -> bool:
        """Whether it may take part in the next step."""
        if self.finished or self._flight is not None:
            return False
        free = self.stream or self.undrafted or not self._started
        return free or self._round_at >= len(self.tokens)

    @property
    def in_flight(self) -> bool:
        return self._flight is not None

    @property
    def waiting_from_ms(self) -> float:
        """Since when it waits: its request, its round, or its last commit."""
        return self._waiting_from_ms

    @property
    def tokens_left(self) -> int:
        """The most tokens it may still commit."""
        return self._end - len(self.tokens)

    # --- drafts arrive ------------------------------------------------------------------------

    def merge(
        self,
        epoch: int,
        base: int,
        tokens: Sequence[int],
        acceptance_prob: Sequence[float],
        now_ms: float,
        slack_ms: float,
        draft_ms: float,
    ) -> str:
        """Take a draft frame into the tail, by position; returns why some of it was dropped, "" where nothing
        was (see :class:`~wispprof.sessions.commit_result.DraftCounters`).

        ``acceptance_prob``: P(accepted | those before were), one float per token. ``slack_ms``: what the
        edge has left before this round must be answered (round mode). Idempotent; never changes
        what will be committed, and never raises on a frame's content.
        """
        count = len(tokens)
        if len(acceptance_prob) != count:
            raise ValueError(
                f"{count} drafts came with {len(acceptance_prob)} acceptance probabilities"
            )
        if self.finished:
            return self._drop("finished", count)
        if epoch != self.epoch or epoch < self._min_epoch:
            if epoch < max(self._min_epoch, self.epoch):
                return self._drop("epoch", len(tokens))
            self._clear_tail()
            self.epoch = epoch
        committed_len = len(self.tokens)
        if base >= committed_len:
            if not self.stream:
                self._round_arrived(now_ms, slack_ms)
            held = len(self.pending_drafts)
            if base == committed_len + held and count <= self.max_pending_drafts - held:
                # What nearly every frame is: the next drafts, nothing known of them yet.
                self._take(tokens, acceptance_prob, now_ms, draft_ms)
                return ""
            overlap = 0
        else:
            overlap = min(committed_len - base, len(tokens))
            if base < 0 or list(tokens[:overlap]) != self.tokens[base : base + overlap]:
                self._contradicted(now_ms)
                return self._drop("contradiction", len(tokens))
        return self._extend_tail(base, tokens, acceptance_prob, overlap, now_ms, draft_ms)

    def _extend_tail(
        self,
        base: int,
        tokens: Sequence[int],
        acceptance_prob: Sequence[float],
        overlap: int,
        now_ms: float,
        draft_ms: float,
    ) -> str:
        place = max(0, base - len(self.tokens))
        if place > len(self.pending_drafts):
            return self._drop("gap", len(tokens))
        known = min(len(self.pending_drafts) - place, len(tokens) - overlap)
        if (
            known
            and list(tokens[overlap : overlap + known])
            != self.pending_drafts[place : place + known]
        ):
            return self._drop("conflict", len(tokens))
        fresh = slice(
            overlap + known, overlap + known + self.max_pending_drafts - len(self.pending_drafts)
        )
        lost = len(tokens) - overlap - known - len(tokens[fresh])
        self._take(tokens[fresh], acceptance_prob[fresh], now_ms, draft_ms)
        return self._drop("overflow", lost) if lost else ""

    def _take(
        self,
        tokens: Sequence[int],
        acceptance_prob: Sequence[float],
        now_ms: float,
        draft_ms: float,
    ) -> None:
        """Append new drafts; the tail has room for them."""
        if not tokens:
            return
        for chance in acceptance_prob:
            if not 0.0 <= chance <= 1.0:
                acceptance_prob = [
                    p if 0.0 <= p <= 1.0 else float(p > 1.0) for p in acceptance_prob
                ]
                break
        self.pending_drafts += tokens
        self.pending_acceptance_probs += acceptance_prob
        self.counters.drafted += len(tokens)
        self.arrivals.arrived(now_ms, acceptance_prob, draft_ms)
        self._view = None

    def _round_arrived(self, now_ms: float, slack_ms: float) -> None:
        """Round mode: from now on it may take part. (A stream may at any time, and its pace sets its
        deadlines.)"""
        deadline = now_ms + slack_ms if math.isfinite(slack_ms) else math.inf
        if self._round_at < len(self.tokens):
            self._round_at = len(self.tokens)
            self._waiting_from_ms = now_ms
            self._round_deadline_ms = deadline
            self._view = None
        elif deadline < self._round_deadline_ms:
            self._round_deadline_ms = deadline
            self._view = None

    def _drop(self, reason: str, tokens: int) -> str:
        self.counters.dropped[reason] += tokens
        self.counters.frames[reason] += 1
        return reason

    def _clear_tail(self) -> None:
        self.counters.wasted += len(self.pending_drafts)
        self._flight_withdrawn = True
        self.pending_drafts.clear()
        self.pending_acceptance_probs.clear()
        self._view = None

    def _contradicted(self, now_ms: float) -> None:
        self._clear_tail()
        self._min_epoch = self.epoch + 1
        self.arrivals.contradicted(now_ms)

    # --- a step takes it ----------------------------------------------------------------------

    def view(self, now_ms: float) -> SessionView:
        """What the batching policy may know of it now. Kept until something changes."""
        if self._view is None or now_ms >= self._view_until_ms:
            self._view = self._look(now_ms)
        return self._view

    def _look(self, now_ms: float) -> SessionView:
        slo_tracker, committed, cached = self.slo_tracker, len(self.tokens), self.cached
        prompt_left = committed - cached
        if prompt_left == 1 and self._started:
            prompt_left = 0
        tokens_left = self._end - committed
        hopeless_from = slo_tracker.slo_unreachable_from_ms(tokens_left, self.floor_ms)
        slo_unreachable = now_ms >= hopeless_from
        until_ms = math.inf if slo_unreachable else hopeless_from
        drafting = self.stream and not self.undrafted
        due_ms: float | None = None
        due_acceptance_probs: tuple[float, ...] = ()
        if drafting and not prompt_left:
            due_ms, due_acceptance_probs, expires_ms = self.arrivals.due(now_ms)
            if expires_ms < until_ms:
                until_ms = expires_ms
        self._view_until_ms = until_ms
        # The target's own token always comes on top, so the last token needs no draft.
        useful = 0 if prompt_left else tokens_left - 1
        # By place, as everything that is made once a commit: keywords triple what it costs.
        return SessionView(
            self.session,
            slo_tracker.slo,
            cached,
            self._waiting_from_ms,
            self.deadline_ms,
            prompt_left,
            tuple(self.pending_acceptance_probs[:useful]),
            self.ready,
            drafting,
            due_ms,
            due_acceptance_probs,
            self.generated,
            slo_unreachable,
        )

    @property
    def deadline_ms(self) -> float:
        """When the next commit must leave the server to keep the promise."""
        rounds = self._started and not (self.stream or self.undrafted)
        return self._round_deadline_ms if rounds else self.slo_tracker.deadline_ms

    def feed(self, member: ScheduledItem, now_ms: float = math.nan) -> StepInput:
        """The tokens to give to the engine for this part in a step; :meth:`apply` must follow.

        Raises ``ValueError`` on a part that the session cannot take: that is a policy's defect.
        """
        if self._flight is not None or self.finished:
            raise ValueError(f"session {self.session} is in a step already, or has ended")
        left = self.prompt_left
        if left:
            if member.drafts or not 0 < member.prefill <= left:
                raise ValueError(f"{member} does not fit a session with {left} prompt tokens left")
            fed = self.tokens[self.cached : self.cached + member.prefill]
            drafts, needs_logits = 0, member.prefill == left
        else:
            pending_drafts, drafts, needs_logits = self.pending_drafts, member.drafts, True
            useful = min(len(pending_drafts), self.tokens_left - 1) if pending_drafts else 0
            if member.prefill or not 0 <= drafts <= useful:
                raise ValueError(f"{member} does not fit a session with {useful} useful drafts")
            fed = [self.tokens[-1], *pending_drafts[:drafts]] if drafts else self.tokens[-1:]
            self.counters.cut_drafts += useful - drafts
        waiting_from_ms = self._waiting_from_ms
        self._flight = len(fed), drafts, needs_logits, self.epoch, self.deadline_ms, waiting_from_ms
        self._flight_withdrawn = False
        self._started_ms = now_ms
        self._view = None
        return StepInput(self.session, fed, drafts, needs_logits)

    def cancel(self) -> None:
        """The step did not happen: nothing was fed."""
        self._flight = None
        self._view = None

    def apply(self, outcome: VerifyResult, now_ms: float) -> CommitResult:
        """Commit what the engine decided, cut where the session ends, and reconcile the tail."""
        flight = self._flight
        if flight is None:
            raise ValueError(f"session {self.session} took part in no step")
        fed, drafts, needs_logits, epoch, deadline_ms, queued_from_ms = flight
        _, accepted, decided = outcome
        if len(decided) != (accepted + 1 if needs_logits else 0):
            raise ValueError(f"{outcome} does not answer a feed with emit={needs_logits}")
        self._flight = None
        self._view = None
        self.cached += fed - drafts + accepted
        queue_ms = max(0.0, self._started_ms - queued_from_ms)
        if not needs_logits:
            return CommitResult(self.session, epoch, self.committed_len, (), 0, 0, queue_ms)
        first = self.slo_tracker.first_ms is None
        tokens = self._append(decided)
        accepted = min(accepted, len(tokens))
        self.slo_tracker.commit(len(tokens), now_ms)
        self._reconcile(tokens, accepted, now_ms)
        self.counters.steps += 1
        self._started = True
        self._waiting_from_ms = now_ms
        committed_len, rollback = len(self.tokens), None
        if self.cached > committed_len:
            rollback = self.cached = committed_len
        return CommitResult(
            self.session,
            epoch,
            committed_len,
            tokens,
            accepted,
            drafts,
            queue_ms,
            self.finished,
            rollback,
            first,
            now_ms - deadline_ms,
        )

    def _append(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        if not self.stop and len(tokens) < self.tokens_left:
            self.tokens += tokens
            self.generated += len(tokens)
            return tokens
        kept: list[int] = []
        for token in tokens:
            kept.append(token)
            self.tokens.append(token)
            self.generated += 1
            if token in self.stop:
                self.finished = "stop"
            elif self.generated >= self.max_new:
                self.finished = "length"
            elif len(self.tokens) >= self.max_context:
                self.finished = "context"
            if self.finished:
                break
        return tuple(kept)

    def _reconcile(self, new: Sequence[int], accepted: int, now_ms: float) -> None:
        """Hold the tail against what was committed: it stays as far as it agrees, or goes."""
        counters, pending_drafts = self.counters, self.pending_drafts
        agreed = 0
        for ours, theirs in zip(new, pending_drafts, strict=False):
            if ours != theirs:
                break
            agreed += 1
        contradicted = agreed < len(new) and agreed < len(pending_drafts)
        counters.accepted += accepted
        if self._flight_withdrawn:
            # These drafts left the tail while the engine verified them: they were booked as wasted.
            counters.wasted -= accepted
            counters.matched += agreed
        else:
            counters.matched += agreed - accepted
        if contradicted:
            del pending_drafts[:agreed]
            self._contradicted(now_ms)
        elif agreed:
            del pending_drafts[:agreed], self.pending_acceptance_probs[:agreed]
        if self.finished:
            self._clear_tail()

    def abandon(self) -> None:
        """Nobody wants the rest: held drafts are booked as wasted, nothing more is committed."""
        self._flight = None
        self._clear_tail()
        self.finished = self.finished or "abandoned"

    # --- its cache ----------------------------------------------------------------------------

    def adopted(self, cached: int) -> None:
        """Before its first step: the engine already holds the first ``cached`` tokens (a prefix that
        another session left). At least one token is left to feed."""
        if self._started or self._flight is not None or not 0 <= cached < len(self.tokens):
            raise ValueError(f"cannot adopt {cached} cached tokens now")
        self.cached = cached
        self._view = None

    def evicted(self, cached: int = 0) -> None:
        """The engine keeps only the first ``cached`` tokens of it: the rest is prefilled again."""
        if self._flight is not None or not 0 <= cached <= self.cached:
            raise ValueError(f"cannot cut {self.cached} cached tokens to {cached} now")
        self.cached = cached
        self._view = None
