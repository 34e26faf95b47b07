"""The server's account of one session: committed tokens, draft tail, cache length, deadline.

Pure: no clock, no I/O, no torch. The step loop of the runtime and the simulator drive the same object:

    merge() as draft frames arrive · view() for the policy · feed() for the engine · apply() its outcome

Positions count from the start of the session, prompt included; the *frontier* is the committed length,
so the next token to decide stands at position ``frontier``. The tail always begins at the frontier.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from wispprof.policies.api import Member, SessionView
from wispprof.sessions.commit_result import Committed, Tally
from wispprof.sessions.draft_arrivals import Arrivals
from wispprof.sessions.slo import Pace
from wispprof.types import Feed, Outcome, Slo

__all__ = ["ServerSession"]


# What the engine works on now: tokens fed, drafts among them, whether it decides; the epoch, the deadline and
# since when the session waited, as they were when the step began.
_Flight = tuple[int, int, bool, int, float, float]


class ServerSession:
    """State of one generation on the server.

    ``tokens``: prompt and everything committed, the last ``generated`` of them output. ``max_new``
    bounds the whole output, ``generated`` included. ``stop``: token ids that end the session (the stop
    token itself is committed). ``stream``: the server may advance the session at any time; otherwise
    (round mode) only once its round has arrived. ``undrafted`` sessions are always ready.
    ``max_tail`` bounds the drafts held; it equals the lead an edge is allowed, so an edge that keeps
    to its lead never meets it. ``floor_ms``: the least time any token can take, for ``hopeless``.
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
        max_tail: int = 64,
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
        self.max_tail = max_tail
        self.floor_ms = floor_ms
        self.epoch = 0
        self.finished = ""
        self.tail: list[int] = []
        self.tail_survival: list[float] = []
        self.tally = Tally()
        self.pace = Pace(slo, now_ms)
        self.arrivals = Arrivals()
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
        return self.pace.slo

    @property
    def frontier(self) -> int:
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
        survival: Sequence[float],
        now_ms: float,
        slack_ms: float,
        draft_ms: float,
    ) -> str:
        """Take a draft frame into the tail, by position; returns why some of it was dropped, "" where nothing
        was (see :class:`~wispprof.sessions.commit_result.Tally`).

        ``survival``: P(accepted | those before were), one float per token. ``slack_ms``: what the
        edge has left before this round must be answered (round mode). Idempotent; never changes
        what will be committed, and never raises on a frame's content.
        """
        count = len(tokens)
        if len(survival) != count:
            raise ValueError(f"{count} drafts came with {len(survival)} survival values")
        if self.finished:
            return self._drop("finished", count)
        if epoch != self.epoch or epoch < self._min_epoch:
            if epoch < max(self._min_epoch, self.epoch):
                return self._drop("epoch", len(tokens))
            self._clear_tail()
            self.epoch = epoch
        frontier = len(self.tokens)
        if base >= frontier:
            if not self.stream:
                self._round_arrived(now_ms, slack_ms)
            held = len(self.tail)
            if base == frontier + held and count <= self.max_tail - held:
                # What nearly every frame is: the next drafts, nothing known of them yet.
                self._take(tokens, survival, now_ms, draft_ms)
                return ""
            overlap = 0
        else:
            overlap = min(frontier - base, len(tokens))
            if base < 0 or list(tokens[:overlap]) != self.tokens[base : base + overlap]:
                self._contradicted(now_ms)
                return self._drop("contradiction", len(tokens))
        return self._extend_tail(base, tokens, survival, overlap, now_ms, draft_ms)

    def _extend_tail(
        self,
        base: int,
        tokens: Sequence[int],
        survival: Sequence[float],
        overlap: int,
        now_ms: float,
        draft_ms: float,
    ) -> str:
        place = max(0, base - len(self.tokens))
        if place > len(self.tail):
            return self._drop("gap", len(tokens))
        known = min(len(self.tail) - place, len(tokens) - overlap)
        if known and list(tokens[overlap : overlap + known]) != self.tail[place : place + known]:
            return self._drop("conflict", len(tokens))
        fresh = slice(overlap + known, overlap + known + self.max_tail - len(self.tail))
        lost = len(tokens) - overlap - known - len(tokens[fresh])
        self._take(tokens[fresh], survival[fresh], now_ms, draft_ms)
        return self._drop("overflow", lost) if lost else ""

    def _take(
        self, tokens: Sequence[int], survival: Sequence[float], now_ms: float, draft_ms: float
    ) -> None:
        """Append new drafts; the tail has room for them."""
        if not tokens:
            return
        for chance in survival:
            if not 0.0 <= chance <= 1.0:
                survival = [p if 0.0 <= p <= 1.0 else float(p > 1.0) for p in survival]
                break
        self.tail += tokens
        self.tail_survival += survival
        self.tally.drafted += len(tokens)
        self.arrivals.arrived(now_ms, survival, draft_ms)
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
        self.tally.dropped[reason] += tokens
        self.tally.frames[reason] += 1
        return reason

    def _clear_tail(self) -> None:
        self.tally.wasted += len(self.tail)
        self._flight_withdrawn = True
        self.tail.clear()
        self.tail_survival.clear()
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
        pace, committed, cached = self.pace, len(self.tokens), self.cached
        prompt_left = committed - cached
        if prompt_left == 1 and self._started:
            prompt_left = 0
        tokens_left = self._end - committed
        hopeless_from = pace.hopeless_from_ms(tokens_left, self.floor_ms)
        hopeless = now_ms >= hopeless_from
        until_ms = math.inf if hopeless else hopeless_from
        drafting = self.stream and not self.undrafted
        due_ms: float | None = None
        due_tail: tuple[float, ...] = ()
        if drafting and not prompt_left:
            due_ms, due_tail, expires_ms = self.arrivals.due(now_ms)
            if expires_ms < until_ms:
                until_ms = expires_ms
        self._view_until_ms = until_ms
        # The target's own token always comes on top, so the last token needs no draft.
        useful = 0 if prompt_left else tokens_left - 1
        # By place, as everything that is made once a commit: keywords triple what it costs.
        return SessionView(
            self.session,
            pace.slo,
            cached,
            self._waiting_from_ms,
            self.deadline_ms,
            prompt_left,
            tuple(self.tail_survival[:useful]),
            self.ready,
            drafting,
            due_ms,
            due_tail,
            self.generated,
            hopeless,
        )

    @property
    def deadline_ms(self) -> float:
        """When the next commit must leave the server to keep the promise."""
        rounds = self._started and not (self.stream or self.undrafted)
        return self._round_deadline_ms if rounds else self.pace.deadline_ms

    def feed(self, member: Member, now_ms: float = math.nan) -> Feed:
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
            drafts, emit = 0, member.prefill == left
        else:
            tail, drafts, emit = self.tail, member.drafts, True
            useful = min(len(tail), self.tokens_left - 1) if tail else 0
            if member.prefill or not 0 <= drafts <= useful:
                raise ValueError(f"{member} does not fit a session with {useful} useful drafts")
            fed = [self.tokens[-1], *tail[:drafts]] if drafts else self.tokens[-1:]
            self.tally.trimmed += useful - drafts
        waiting_from_ms = self._waiting_from_ms
        self._flight = len(fed), drafts, emit, self.epoch, self.deadline_ms, waiting_from_ms
        self._flight_withdrawn = False
        self._started_ms = now_ms
        self._view = None
        return Feed(self.session, fed, drafts, emit)

    def cancel(self) -> None:
        """The step did not happen: nothing was fed."""
        self._flight = None
        self._view = None

    def apply(self, outcome: Outcome, now_ms: float) -> Committed:
        """Commit what the engine decided, cut where the session ends, and reconcile the tail."""
        flight = self._flight
        if flight is None:
            raise ValueError(f"session {self.session} took part in no step")
        fed, drafts, emit, epoch, deadline_ms, queued_from_ms = flight
        _, accepted, decided = outcome
        if len(decided) != (accepted + 1 if emit else 0):
            raise ValueError(f"{outcome} does not answer a feed with emit={emit}")
        self._flight = None
        self._view = None
        self.cached += fed - drafts + accepted
        queue_ms = max(0.0, self._started_ms - queued_from_ms)
        if not emit:
            return Committed(self.session, epoch, self.frontier, (), 0, 0, queue_ms)
        first = self.pace.first_ms is None
        tokens = self._append(decided)
        accepted = min(accepted, len(tokens))
        self.pace.commit(len(tokens), now_ms)
        self._reconcile(tokens, accepted, now_ms)
        self.tally.steps += 1
        self._started = True
        self._waiting_from_ms = now_ms
        frontier, rollback = len(self.tokens), None
        if self.cached > frontier:
            rollback = self.cached = frontier
        return Committed(
            self.session,
            epoch,
            frontier,
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
        tally, tail = self.tally, self.tail
        agreed = 0
        for ours, theirs in zip(new, tail, strict=False):
            if ours != theirs:
                break
            agreed += 1
        contradicted = agreed < len(new) and agreed < len(tail)
        tally.accepted += accepted
        if self._flight_withdrawn:
            # These drafts left the tail while the engine verified them: they were booked as wasted.
            tally.wasted -= accepted
            tally.matched += agreed
        else:
            tally.matched += agreed - accepted
        if contradicted:
            del tail[:agreed]
            self._contradicted(now_ms)
        elif agreed:
            del tail[:agreed], self.tail_survival[:agreed]
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
