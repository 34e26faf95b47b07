"""The server's state of one session: committed tokens, pending drafts, cache length, deadline.

Pure: no clock, no I/O, no torch. The server's engine loop and the simulator drive the same object:

    merge() as draft frames arrive · view() for the policy · step_input() for the engine · apply() its result

Positions count from the start of the session, prompt included. The next token to decide stands at position
``committed_len``, where the pending drafts begin too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from wispprof.policies.interface import ScheduledItem, SessionView
from wispprof.sessions.pending_drafts import DraftCounters, PendingDrafts
from wispprof.sessions.pending_tree import deepest
from wispprof.sessions.slo import SloTracker
from wispprof.types import Slo, StepInput, TokenLogprob, VerifyResult


class CommitResult(NamedTuple):
    """What a step changed. ``tokens`` is empty after a prompt chunk that was not the last.

    ``accepted`` of ``drafted`` verified drafts stand; the deepest had ``depth``. ``finished`` is "" while the
    session goes on, else ``stop``, ``length`` or ``context``. ``rollback``: if the commit was cut short, the
    length that the engine's cache must be cut to. ``first``: this commit holds the session's first token.
    ``logprobs``: one per token, if the session asked for them.
    """

    session: str
    epoch: int
    committed_len: int
    tokens: tuple[int, ...]
    accepted: int
    drafted: int
    queue_ms: float
    finished: str = ""
    rollback: int | None = None
    first: bool = False
    logprobs: tuple[TokenLogprob, ...] = ()
    depth: int = 0


Flight = tuple[int, int, bool, int, float, int]
"""A session's part of a running step: tokens fed, drafts among them, whether logits are needed, the epoch
when it began, how long the session had waited for it (ms), and the depth of the deepest draft."""


class SessionState:
    """State of one generation on the server.

    ``tokens``: prompt and everything committed, the last ``generated`` of them output. ``max_new`` bounds the
    whole output, ``generated`` included. ``stop``: token ids that end the session (the stop token itself is
    committed). ``stream``: the server may advance the session at any time; otherwise (round mode) only
    once its round has arrived. ``undrafted`` sessions are always ready. ``max_pending_drafts`` equals the
    draft-ahead limit of the edge, so a correct edge never exceeds it. ``floor_ms``: the least time any
    token can take, for ``slo_unreachable``. ``advances_alone``: it may advance at any time, not only with a
    round of its edge. ``waiting_from_ms``: since when it waits: its request, its round, or its last commit.
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
            raise ValueError(f"{len(tokens)} tokens cannot hold {generated} generated ones.")
        if len(tokens) >= max_context or generated >= max_new:
            raise ValueError(
                f"Nothing is left to generate: {len(tokens)} of {max_context} context tokens and "
                f"{generated} of {max_new} new tokens are used."
            )
        if not 0 <= cached < len(tokens):
            raise ValueError(f"{cached} cached tokens leave none of {len(tokens)} to compute.")
        self.session = session
        self.tokens = list(tokens)
        self.generated = generated
        self.max_new = max_new
        self.max_context = max_context
        self._end = min(len(tokens) - generated + max_new, max_context)
        self.stop = frozenset(stop)
        self.stream = stream
        self.undrafted = undrafted
        self.advances_alone = stream or undrafted
        self.cached = cached
        self.floor_ms = floor_ms
        self.finished = ""
        self.max_pending_drafts = max_pending_drafts
        self.drafts = PendingDrafts(max_pending_drafts)
        self.slo_tracker = SloTracker(slo, now_ms)
        self.started = False
        self.waiting_from_ms = now_ms
        self._round_at = -1
        self._round_deadline_ms = math.inf
        self.flight: Flight | None = None
        self._view: SessionView | None = None
        self._view_until_ms = math.inf

    # --- state ---

    @property
    def slo(self) -> Slo:
        return self.slo_tracker.slo

    @property
    def committed_len(self) -> int:
        return len(self.tokens)

    @property
    def pending_drafts(self) -> list[int]:
        """Drafts held beyond the committed length; those of a tree in best-first order."""
        return self.drafts.tokens

    @property
    def counters(self) -> DraftCounters:
        return self.drafts.counters

    @property
    def prompt_left(self) -> int:
        """Tokens to prefill before the next one can be decided; 0 while decoding.

        A decoding session has exactly its pending token without KV. A fresh one, and one whose KV
        was taken away, prefills up to and with its last token, which emits.
        """
        left = len(self.tokens) - self.cached
        return left if left > 1 or not self.started else 0

    @property
    def ready(self) -> bool:
        """Whether it can be scheduled in the next step."""
        if self.finished or self.flight is not None:
            return False
        return self.advances_alone or not self.started or self._round_at >= len(self.tokens)

    @property
    def in_flight(self) -> bool:
        return self.flight is not None

    @property
    def tokens_left(self) -> int:
        """The most tokens it may still commit."""
        return self._end - len(self.tokens)

    # --- drafts arrive ---

    def merge(
        self,
        epoch: int,
        base: int,
        tokens: Sequence[int],
        acceptance_prob: Sequence[float],
        now_ms: float,
        slack_ms: float,
        draft_ms: float,
        parents: Sequence[int] = (),
    ) -> str:
        """Merge a draft frame by position, a tree by path; returns why some of it was dropped, "" if nothing
        was (see :class:`~wispprof.sessions.pending_drafts.DraftCounters`).

        ``acceptance_prob``: P(accepted | those before were), one float per token. ``slack_ms``: the time that
        the edge has left for this round (round mode). ``parents``: of a tree, as in
        :class:`~wispprof.types.StepInput`. Idempotent; never changes what will be committed, and never raises
        on a frame's content.
        """
        drafts = self.drafts
        if len(acceptance_prob) != len(tokens):
            raise ValueError(f"{len(tokens)} drafts with {len(acceptance_prob)} acceptance probabilities.")
        if self.finished:
            return drafts.drop("finished", len(tokens))
        frame = (epoch, base, tokens, acceptance_prob, now_ms, draft_ms, parents)
        dropped = drafts.merge(self.tokens, *frame, self._end - len(self.tokens) - 1)
        if dropped != "epoch":
            self._view = None
            if not self.stream and base >= len(self.tokens):
                self._round_arrived(now_ms, slack_ms)
        return dropped

    def _round_arrived(self, now_ms: float, slack_ms: float) -> None:
        """Round mode: from now on it may take part. (A stream may at any time, and its SLO sets its
        deadlines.)"""
        deadline = now_ms + slack_ms if math.isfinite(slack_ms) else math.inf
        if self._round_at < len(self.tokens):
            self._round_at = len(self.tokens)
            self.waiting_from_ms = now_ms
            self._round_deadline_ms = deadline
        elif deadline < self._round_deadline_ms:
            self._round_deadline_ms = deadline

    # --- a step ---

    def view(self, now_ms: float) -> SessionView:
        """What the batching policy may know of it now. Cached until something changes."""
        if self._view is None or now_ms >= self._view_until_ms:
            self._view = self._make_view(now_ms)
        return self._view

    def _make_view(self, now_ms: float) -> SessionView:
        slo_tracker, committed, cached = self.slo_tracker, len(self.tokens), self.cached
        prompt_left = committed - cached
        if prompt_left == 1 and self.started:
            prompt_left = 0
        tokens_left = self._end - committed
        unreachable_ms = slo_tracker.slo_unreachable_from_ms(tokens_left, self.floor_ms)
        slo_unreachable = now_ms >= unreachable_ms
        until_ms = math.inf if slo_unreachable else unreachable_ms
        drafting = self.stream and not self.undrafted
        due_ms: float | None = None
        due_acceptance_probs: tuple[float, ...] = ()
        if drafting and not prompt_left:
            due_ms, due_acceptance_probs, expires_ms = self.drafts.arrivals.due(now_ms)
            if expires_ms < until_ms:
                until_ms = expires_ms
        self._view_until_ms = until_ms
        # The target's own token always comes on top, so the last token needs no draft.
        useful = 0 if prompt_left else self.useful_drafts
        # By position, as everything that is made once a commit: keywords triple its cost.
        return SessionView(
            self.session,
            slo_tracker.slo,
            cached,
            self.waiting_from_ms,
            self.deadline_ms,
            prompt_left,
            tuple(self.drafts.acceptance_probs[:useful]),
            self.ready,
            drafting,
            due_ms,
            due_acceptance_probs,
            self.generated,
            slo_unreachable,
            tokens_left,
        )

    @property
    def deadline_ms(self) -> float:
        """When the next commit must leave the server to meet the SLO."""
        if self.advances_alone or not self.started:
            return self.slo_tracker.deadline_ms
        return self._round_deadline_ms

    def step_input(self, item: ScheduledItem, now_ms: float = math.nan) -> StepInput:
        """The engine's input for a scheduled item; :meth:`apply` or :meth:`cancel` must follow.

        Raises ``ValueError`` if the policy planned an item that the session cannot take.
        """
        if self.flight is not None or self.finished:
            raise ValueError(f"Session {self.session} is in a step already, or has ended.")
        if self.fitted(item) is not item:
            left, useful = self.prompt_left, self.useful_drafts
            raise ValueError(f"{item} does not fit: {left} prompt tokens are left, {useful} drafts useful.")
        self.begin(step_input := self.input_of(item), now_ms)
        return step_input

    def fitted(self, item: ScheduledItem) -> ScheduledItem | None:
        """What of an item the session can take; ``None`` if none of it."""
        _, drafts, prefill = item
        left = len(self.tokens) - self.cached
        if left > 1 or not self.started:
            if drafts or prefill < 1:
                return None
            return item if prefill <= left else ScheduledItem(self.session, 0, left)
        if prefill or drafts < 0:
            return None
        if drafts and drafts > (useful := self.useful_drafts):
            return ScheduledItem(self.session, useful)
        return item

    @property
    def useful_drafts(self) -> int:
        """Pending drafts that a step can use: the target's own token always comes on top."""
        following = len(self.tokens) + 1
        return self.drafts.useful(self._end - following, self.max_context - following)

    def input_of(self, item: ScheduledItem) -> StepInput:
        """The engine's input for an item that fits."""
        _, drafts, prefill = item
        if prefill:
            fed = self.tokens[self.cached : self.cached + prefill]
            return StepInput(self.session, fed, 0, self.cached + prefill == len(self.tokens))
        fed = self.tokens[-1:] + self.drafts.tokens[:drafts]
        return StepInput(self.session, fed, drafts, True, self.drafts.parents(drafts))

    def begin(self, step_input: StepInput, now_ms: float) -> None:
        """A step with this input has begun. Drafts in it may have left the session since it was made."""
        _, fed, drafts, needs_logits, parents = step_input
        pending = self.drafts
        queue_ms = max(0.0, now_ms - self.waiting_from_ms)
        depth = deepest(parents) if parents else drafts
        self.flight = (len(fed), drafts, needs_logits, pending.epoch, queue_ms, depth)
        self._view = None
        pending.withdrawn = bool(drafts) and not pending.holds(fed[-drafts:], parents)
        if not pending.withdrawn and pending.tokens and not self.prompt_left:
            pending.counters.cut_drafts += max(0, self.useful_drafts - drafts)

    def cancel(self) -> None:
        """The step did not happen: nothing was fed."""
        self.flight = None
        self._view = None

    def apply(self, result: VerifyResult, now_ms: float) -> CommitResult:
        """Commit what the engine decided, cut where the session ends, and reconcile the pending drafts."""
        flight = self.flight
        if flight is None:
            raise ValueError(f"Session {self.session} is in no step.")
        fed, drafts, needs_logits, epoch, queue_ms, depth = flight
        accepted, decided = result.accepted, result.tokens
        if len(decided) != (accepted + 1 if needs_logits else 0):
            raise ValueError(f"{result} does not match an input with needs_logits={needs_logits}.")
        self.flight = None
        self._view = None
        self.cached += fed - drafts + accepted
        if not needs_logits:
            return CommitResult(self.session, epoch, self.committed_len, (), 0, 0, queue_ms)
        first = self.slo_tracker.first_ms is None
        tokens = self._append(decided)
        accepted = min(accepted, len(tokens))
        self.slo_tracker.commit(len(tokens), now_ms)
        pending = self.drafts
        pending.reconcile(tokens, accepted, now_ms)
        pending.counters.steps += 1
        if self.finished:
            pending.clear()
        self.started = True
        self.waiting_from_ms = now_ms
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
            result.logprobs[: len(tokens)],
            depth,
        )

    def _append(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        if not self.stop and len(tokens) < self._end - len(self.tokens):
            self.tokens += tokens
            self.generated += len(tokens)
            return tokens
        committed: list[int] = []
        for token in tokens:
            committed.append(token)
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
        return tuple(committed)

    def abandon(self) -> None:
        """The client has left: pending drafts count as wasted, nothing more is committed."""
        self.flight = None
        self._view = None
        self.drafts.clear()
        self.finished = self.finished or "abandoned"

    # --- its KV cache ---

    def adopted(self, cached: int) -> None:
        """Before its first step: the engine already holds the first ``cached`` tokens (a cached prefix).
        At least one token is left to feed."""
        if self.started or self.flight is not None or not 0 <= cached < len(self.tokens):
            raise ValueError(f"Cannot adopt {cached} cached tokens now.")
        self.cached = cached
        self._view = None

    def evicted(self, cached: int = 0) -> None:
        """The engine keeps only the first ``cached`` tokens of it: the rest is prefilled again."""
        if self.flight is not None or not 0 <= cached <= self.cached:
            raise ValueError(f"Cannot cut {self.cached} cached tokens to {cached} now.")
        self.cached = cached
        self._view = None
