"""Planning a step while the one before it runs: what to expect of its sessions.

Pure, and the same in the server and in the simulator. :func:`expected_view` is what the policy sees. When the
step before is done, :meth:`SessionState.planned_input` cuts each planned item to what its session really has.
"""

from __future__ import annotations

from wispprof.policies.interface import SessionView
from wispprof.sessions.session_state import SessionState


def expected_view(state: SessionState, now_ms: float, end_ms: float) -> SessionView | None:
    """What to expect of a session at ``end_ms``, when the step under way ends; ``None`` if it ends, too.

    The drafts beyond those in that step, and those due by then, are seen as if the former were all accepted:
    they stand with probability ``standing``, or are gone.
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
        probs = probs[in_step + 1 :]
    return SessionView(
        state.session,
        tracker.slo,
        state.cached + fed - in_step + round(max(0.0, tokens - 1.0)),
        end_ms if emits else state.waiting_from_ms,
        tracker.deadline_after(tokens, end_ms) if emits else state.deadline_ms,
        prompt_left,
        tuple(probs[: tokens_left - 1]),
        state.advances_alone or bool(prompt_left) or (flight is None and state.ready),
        drafting,
        due_ms,
        () if due_ms is None else due_probs,
        state.generated + round(tokens),
        end_ms >= tracker.slo_unreachable_from_ms(state.tokens_left, state.floor_ms),
        standing,
    )
