"""Planning a step while the one before it runs: what to expect of its sessions, and what they then feed.

Pure. :func:`expected_view` is what the policy sees. :func:`next_input` keeps what a planned item feeds, until
the results of the running step cut it to the drafts that stand.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from wispprof.policies.interface import ScheduledItem, SessionView
from wispprof.sessions.pending_tree import best_part
from wispprof.sessions.session_state import SessionState
from wispprof.token_tree import TokenTree
from wispprof.types import StepInput, VerifyResult

LEAST_ITEMS = 5
"""A step of fewer items, of which one gets drafts, is not followed by a planned one: planning so few takes a
fraction of a millisecond, and to know what was accepted, and which drafts are about to arrive, is worth
more."""

_UNDRAFTED_LEAD_MS, _UNDRAFTED_LEAD_SHARE = 3.0, 0.25


def may_plan_ahead(states: Collection[SessionState]) -> bool:
    """Whether a step of these sessions is followed by a planned one."""
    return len(states) >= LEAST_ITEMS or _undrafted(states)


def lead_ms(states: Collection[SessionState], step_ms: float, plan_ms: float) -> float:
    """How long before the end of a step of ``step_ms`` the next one is planned: ``plan_ms``, which planning
    takes. Earlier if none of its sessions gets drafts: waiting then tells only who else has arrived, and a
    busy event loop is in time.
    """
    if not _undrafted(states):
        return plan_ms
    return max(plan_ms, min(_UNDRAFTED_LEAD_MS, _UNDRAFTED_LEAD_SHARE * step_ms))


def _undrafted(states: Collection[SessionState]) -> bool:
    return all(state.undrafted for state in states)


def expected_view(state: SessionState, now_ms: float, end_ms: float) -> SessionView | None:
    """What to expect of a session at ``end_ms``, when the step under way ends; ``None`` if it ends, too.

    The drafts beyond those in that step, and those due by then, are seen as if the former were all accepted:
    they stand with probability ``standing``, or are gone. Of a tree, what follows its likeliest next node.
    """
    flight, tracker, pending = state.flight, state.slo_tracker, state.drafts
    fed, in_step, emits = (0, 0, False) if flight is None else flight[:3]
    tokens_left = state.tokens_left - emits
    if tokens_left < 1:
        return None
    left = state.prompt_left
    prompt_left = 0 if emits or not left else left - fed
    drafting = state.stream and not state.undrafted
    probs: list[float] = [] if prompt_left else pending.acceptance_probs
    due_ms: float | None = None
    due_probs: tuple[float, ...] = ()
    if drafting and not prompt_left:
        due_ms, due_probs, _ = pending.arrivals.due(now_ms)
        if due_ms is not None and due_ms <= end_ms:
            if pending.tree is None:
                probs = [*probs, *due_probs][: pending.limit]
            due_ms = pending.arrivals.next_ms(due_ms)
    tokens, standing = 0.0, 1.0
    if emits:
        tokens = 1.0
        for prob in pending.acceptance_probs[:in_step]:
            standing *= prob
            tokens += standing
        if len(probs) > in_step:
            standing *= probs[in_step]
        probs = probs[in_step + 1 :] if pending.tree is None or not probs else pending.after(in_step)
    return SessionView(
        state.session,
        tracker.slo,
        state.cached + fed - in_step + round(max(0.0, tokens - 1.0)),
        end_ms if emits else state.waiting_from_ms,
        tracker.deadline_after(tokens, end_ms) if emits else state.deadline_ms,
        prompt_left,
        tuple(probs if pending.tree is not None else probs[: tokens_left - 1]),
        state.advances_alone or bool(prompt_left) or (flight is None and state.ready),
        drafting,
        due_ms,
        () if due_ms is None else due_probs,
        state.generated + round(tokens),
        end_ms >= tracker.slo_unreachable_from_ms(state.tokens_left, state.floor_ms),
        tokens_left,
        standing,
    )


class KnownInput(NamedTuple):
    """An input that no result of the running step changes."""

    step_input: StepInput

    def after(self, result: VerifyResult | None) -> StepInput | None:
        """The input, whatever the running step decides."""
        return self.step_input


class Continuation(NamedTuple):
    """What a session of the running step feeds in the next one.

    ``follows``: its drafts after those in the running step. The first must be the token that the target
    decides after them; the others are fed. ``in_step``: drafts in the running step. ``tokens_left``: the most
    tokens that the running step may commit.
    """

    session: str
    follows: list[int]
    in_step: int
    tokens_left: int
    stop: frozenset[int]

    def after(self, result: VerifyResult | None) -> StepInput | None:
        """The input after the running step's result; ``None`` if that ends the session, or is no result."""
        if result is None:
            return None
        accepted, decided = result.accepted, result.tokens
        count = len(decided)
        if count != accepted + 1 or count >= self.tokens_left or accepted > self.in_step:
            return None
        if self.stop and not self.stop.isdisjoint(decided):
            return None
        follows = self.follows
        if accepted == self.in_step and follows and follows[0] == decided[-1]:
            fed = follows[: self.tokens_left - count]
            return StepInput(self.session, fed, len(fed) - 1, True)
        return StepInput(self.session, list(decided[-1:]), 0, True)


class TreeContinuation(NamedTuple):
    """A :class:`Continuation` of a session whose drafts are a tree: what follows the tokens decided, at most
    ``drafts`` nodes. ``context_left``: the most tokens that may be cached beyond those committed before."""

    tree: TokenTree
    drafts: int
    context_left: int
    undrafted: Continuation

    def after(self, result: VerifyResult | None) -> StepInput | None:
        """The input after the running step's result; ``None`` if that ends the session, or is no result."""
        step_input = self.undrafted.after(result)
        if step_input is None or result is None:
            return None
        path = self.tree.walk(result.tokens)
        if len(path) < len(result.tokens):
            return step_input
        most = min(self.drafts, self.context_left - len(path))
        tokens, parents = best_part(self.tree.below(path[-1]), max(0, most))
        return StepInput(step_input.session, [*step_input.tokens, *tokens], len(tokens), True, parents)


def next_input(
    state: SessionState, item: ScheduledItem
) -> KnownInput | Continuation | TreeContinuation | None:
    """What a planned item feeds once the running step is done; ``None`` if the session cannot take it."""
    flight, pending = state.flight, state.drafts
    if flight is None:
        fitting = state.fitted(item) if state.ready else None
        return None if fitting is None else KnownInput(state.input_of(fitting))
    fed, in_step, emits = flight[:3]
    if not emits:
        start = state.cached + fed
        left = len(state.tokens) - start
        chunk = min(item.prefill, left)
        if item.drafts or chunk < 1:
            return None
        return KnownInput(StepInput(state.session, state.tokens[start : start + chunk], 0, chunk == left))
    if item.prefill or not state.advances_alone:
        return None
    if pending.tree is not None:
        undrafted = Continuation(state.session, [], in_step, state.tokens_left, state.stop)
        context_left = state.max_context - len(state.tokens) - 1
        return TreeContinuation(pending.tree, item.drafts, context_left, undrafted)
    # Drafts that came after those in the step had been withdrawn do not follow them.
    follows = [] if pending.withdrawn and in_step else pending.tokens[in_step : in_step + 1 + item.drafts]
    return Continuation(state.session, follows, in_step, state.tokens_left, state.stop)
