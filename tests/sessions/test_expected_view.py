"""What a policy is told of a session whose step is still running, against what becomes of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wispprof.policies.interface import ScheduledItem
from wispprof.sessions.plan_ahead import expected_view
from wispprof.sessions.session_state import SessionState
from wispprof.types import Slo, VerifyResult

NAME = "s"


def make(prompt: int = 4, **changes: object) -> SessionState:
    options: dict[str, object] = {
        "slo": Slo(10.0, 500.0),
        "max_new": 40,
        "max_context": 200,
        "now_ms": 0.0,
        "stream": True,
    }
    return SessionState(NAME, list(range(prompt)), **{**options, **changes})  # type: ignore[arg-type]


def decoding(**changes: object) -> SessionState:
    session = make(**changes)
    session.step_input(ScheduledItem(NAME, prefill=session.prompt_left), 5.0)
    session.apply(VerifyResult(NAME, 0, (9,)), 10.0)
    return session


def give(session: SessionState, probs: list[float], now_ms: float = 20.0) -> None:
    base = session.committed_len + len(session.pending_drafts)
    tokens = [50 + base + i for i in range(len(probs))]
    session.merge(0, base, tokens, probs, now_ms, 0.0, 10.0)


def test_drafts_beyond_those_in_the_step_stand_if_all_before_them_do() -> None:
    session = decoding()
    give(session, [0.9, 0.8, 0.7, 0.6, 0.5])
    session.step_input(ScheduledItem(NAME, drafts=2), 30.0)
    view = expected_view(session, 40.0, 50.0)
    assert view is not None
    # The third draft must be the target's own token; the others stay.
    assert view.standing == pytest.approx(0.9 * 0.8 * 0.7)
    assert view.acceptance_probs == (0.6, 0.5)
    assert view.ready
    assert view.prompt_left == 0
    assert view.cached == session.cached + 1 + round(0.9 + 0.72)
    tokens = 1 + 0.9 + 0.72
    assert view.deadline_ms == pytest.approx(session.deadline_ms + tokens * 100.0)


def test_a_prompt_goes_on_and_its_last_chunk_makes_it_decode() -> None:
    session = make(prompt=10)
    session.step_input(ScheduledItem(NAME, prefill=6), 0.0)
    view = expected_view(session, 5.0, 8.0)
    assert view is not None
    assert (view.cached, view.prompt_left, view.ready) == (6, 4, True)
    session.apply(VerifyResult(NAME, 0, ()), 8.0)
    session.step_input(ScheduledItem(NAME, prefill=4), 8.0)
    view = expected_view(session, 10.0, 12.0)
    assert view is not None
    assert (view.cached, view.prompt_left, view.committed, view.standing) == (10, 0, 1, 1.0)
    assert view.deadline_ms == 12.0 + 100.0


def test_a_session_that_ends_with_the_step_is_not_expected() -> None:
    session = decoding(max_new=2)
    assert expected_view(session, 20.0, 30.0) is not None
    session.step_input(ScheduledItem(NAME), 20.0)
    assert expected_view(session, 25.0, 30.0) is None


def test_in_round_mode_a_session_waits_for_its_edge() -> None:
    session = decoding(stream=False)
    session.merge(0, session.committed_len, [70], [0.9], 20.0, 100.0, 4.0)
    view = expected_view(session, 20.0, 30.0)
    assert view is not None
    assert view == session.view(30.0)
    assert view.acceptance_probs == (0.9,)
    session.step_input(ScheduledItem(NAME, drafts=1), 30.0)
    view = expected_view(session, 35.0, 40.0)
    assert view is not None
    assert not view.ready


def test_a_frame_that_is_due_by_the_end_counts() -> None:
    session = decoding()
    for number in range(6):
        give(session, [0.5, 0.4], 20.0 + 10.0 * number)
    held = len(session.pending_drafts)
    later = expected_view(session, 71.0, 79.0)
    assert later is not None
    assert len(later.acceptance_probs) == held
    due = expected_view(session, 71.0, 81.0)
    assert due is not None
    assert len(due.acceptance_probs) == held + 2
    assert due.due_ms == pytest.approx(90.0, abs=1.0)


def test_without_a_step_the_expected_view_is_the_view() -> None:
    session = decoding()
    give(session, [0.9, 0.8])
    assert expected_view(session, 21.0, 22.0) == session.view(22.0)


@given(
    st.lists(st.floats(0.05, 0.95), max_size=8),
    st.integers(0, 8),
    st.integers(0, 8),
    st.booleans(),
)
def test_a_planned_item_is_cut_to_what_the_session_has(
    probs: list[float], drafts: int, accepted: int, agrees: bool
) -> None:
    session = decoding()
    give(session, probs, 34.0)  # The next frame is not due before the step ends.
    drafts = min(drafts, len(probs))
    accepted = min(accepted, drafts)
    held = list(session.pending_drafts)
    session.step_input(ScheduledItem(NAME, drafts=drafts), 34.0)
    view = expected_view(session, 35.0, 40.0)
    assert view is not None
    plan = ScheduledItem(NAME, drafts=len(view.acceptance_probs))
    follows = held[accepted] if agrees and accepted == drafts and len(held) > drafts else 1
    session.apply(VerifyResult(NAME, accepted, (*held[:accepted], follows)), 40.0)
    given_input = session.planned_input(plan, 40.0)
    assert given_input is not None
    if follows == 1:
        assert (given_input.drafts, list(given_input.tokens)) == (0, [1])
        if accepted < drafts or len(held) > drafts:
            assert view.standing < 1.0
    else:
        # What was expected to stand, stands: all of it takes part.
        assert list(given_input.tokens) == [follows, *held[drafts + 1 :]]
        assert given_input.drafts == len(view.acceptance_probs)


def test_a_planned_item_of_a_session_that_ended_takes_no_part() -> None:
    session = decoding(stop=(7,))
    session.step_input(ScheduledItem(NAME), 30.0)
    assert session.planned_input(ScheduledItem(NAME), 30.0) is None  # its step is not done
    session.apply(VerifyResult(NAME, 0, (7,)), 40.0)
    assert session.planned_input(ScheduledItem(NAME), 40.0) is None
    fresh = make(prompt=10)
    assert fresh.planned_input(ScheduledItem(NAME, drafts=1), 0.0) is None
    cut = fresh.planned_input(ScheduledItem(NAME, prefill=99), 0.0)
    assert cut is not None
    assert len(cut.tokens) == 10
