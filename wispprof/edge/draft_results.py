"""What becomes of a draft step that ended: tokens for the session, figures for the request's statistics."""

from __future__ import annotations

from wispprof.edge.draft_worker import CatchUp, DraftStep, TreeForward
from wispprof.edge.request_stats import RequestStats
from wispprof.sessions.edge_session import EdgeSession

StepResult = DraftStep | TreeForward | CatchUp | None


def take_step(
    session: EdgeSession, stats: RequestStats, step: StepResult, elapsed_ms: float, vocab_size: int
) -> None:
    """Hand the result of a step that ended after ``elapsed_ms`` to its session. Tokens outside the target's
    vocabulary (``vocab_size``, 0: unknown) are left out."""
    if isinstance(step, CatchUp):
        stats.caught_up(step.tokens, step.read_ms)
        return
    if step is None:
        stats.no_proposal += 1
        session.scheduler.nothing_to_draft()
        return
    stats.draft_ms += step.draft_ms
    waited_ms = max(0.0, elapsed_ms - step.draft_ms)
    if isinstance(step, TreeForward):
        _take_forward(session, stats, step, waited_ms, vocab_size)
        return
    stats.drafted += 1
    if is_foreign(stats, step.drafted.token, vocab_size):
        # Nothing can be drafted after it until the text goes on.
        stats.dropped += 1
        stats.dropped_ms += step.draft_ms
        session.scheduler.nothing_to_draft()
        return
    wasted_ms = session.end_step(lambda: step.drafted, step.draft_ms, waited_ms)
    if wasted_ms is not None:
        stats.late += 1
        stats.dropped += 1
        stats.dropped_ms += step.draft_ms
        stats.wasted_ms += wasted_ms


def _take_forward(
    session: EdgeSession, stats: RequestStats, step: TreeForward, waited_ms: float, vocab_size: int
) -> None:
    found = [
        after._replace(
            candidates=[one for one in after.candidates if not is_foreign(stats, one.token, vocab_size)]
        )
        for after in step.found
    ]
    if not session.end_tree_step(found, step.draft_ms, waited_ms):
        stats.late += 1
        stats.dropped_ms += step.draft_ms
        stats.wasted_ms += step.draft_ms


def is_foreign(stats: RequestStats, token: int, vocab_size: int) -> bool:
    """Whether a draft is outside the target's vocabulary; ``stats`` count it."""
    foreign = token < 0 or 0 < vocab_size <= token
    stats.foreign += foreign
    return foreign
