"""What a policy is told of a session whose step is still running, against what becomes of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wispprof.policies.interface import ScheduledItem
from wispprof.sessions.plan_ahead import (
    LEAST_ITEMS,
    expected_view,
    lead_ms,
    may_plan_ahead,
    next_input,
)
from wispprof.sessions.session_state import SessionState
from wispprof.types import Slo, StepInput, VerifyResult

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


def test_a_step_without_drafts_is_planned_ahead_however_small() -> None:
    drafted, undrafted = decoding(), decoding(undrafted=True)
    assert may_plan_ahead([undrafted])
    assert not may_plan_ahead([undrafted, drafted])
    assert may_plan_ahead([drafted] * LEAST_ITEMS)
    # A quarter of a short step, 3 ms of a long one.
    assert [lead_ms([undrafted], ms, 0.5) for ms in (4.0, 12.0, 30.0)] == [1.0, 3.0, 3.0]
    assert lead_ms([undrafted], 4.0, 1.5) == 1.5
    assert lead_ms([undrafted, drafted], 30.0, 0.5) == 0.5


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
    planned = next_input(session, plan)
    assert planned is not None
    follows = held[accepted] if agrees and accepted == drafts and len(held) > drafts else 1
    result = VerifyResult(NAME, accepted, (*held[:accepted], follows))
    given_input = planned.after(result)
    assert given_input is not None
    session.apply(result, 40.0)
    assert given_input.tokens[1:] == session.pending_drafts[: given_input.drafts]
    session.begin(given_input, 40.0)
    assert not session.drafts.withdrawn
    if follows == 1:
        assert (given_input.drafts, list(given_input.tokens)) == (0, [1])
        if accepted < drafts or len(held) > drafts:
            assert view.standing < 1.0
    else:
        # What was expected to stand, stands: all of it takes part.
        assert list(given_input.tokens) == [follows, *held[drafts + 1 :]]
        assert given_input.drafts == len(view.acceptance_probs)


@pytest.mark.parametrize("result", [None, VerifyResult(NAME, 0, (7,)), VerifyResult(NAME, 3, (1,))])
def test_a_session_that_ended_or_has_no_result_takes_no_part(result: VerifyResult | None) -> None:
    session = decoding(stop=(7,))
    session.step_input(ScheduledItem(NAME), 30.0)
    planned = next_input(session, ScheduledItem(NAME))
    assert planned is not None
    assert planned.after(result) is None
    other = planned.after(VerifyResult(NAME, 0, (8,)))
    assert other == StepInput(NAME, [8])


def test_the_last_tokens_need_no_more_drafts_than_are_left() -> None:
    session = decoding(max_new=5)
    give(session, [0.9] * 6)
    held = list(session.pending_drafts)
    session.step_input(ScheduledItem(NAME, drafts=1), 30.0)
    planned = next_input(session, ScheduledItem(NAME, drafts=4))
    assert planned is not None
    result = VerifyResult(NAME, 1, tuple(held[:2]))
    given_input = planned.after(result)
    session.apply(result, 40.0)
    # Two tokens are left: one draft, and the target's own.
    assert session.tokens_left == 2
    assert given_input == StepInput(NAME, held[1:3], 1)
    assert planned.after(VerifyResult(NAME, 1, (*held[:2],) * 2)) is None


def test_prompt_chunks_follow_each_other() -> None:
    session = make(prompt=10)
    session.step_input(ScheduledItem(NAME, prefill=4), 0.0)
    planned = next_input(session, ScheduledItem(NAME, prefill=4))
    assert planned is not None
    assert planned.after(None) == StepInput(NAME, [4, 5, 6, 7], 0, False)
    last = next_input(session, ScheduledItem(NAME, prefill=99))
    assert last is not None
    assert last.after(None) == StepInput(NAME, [4, 5, 6, 7, 8, 9], 0, True)
    assert next_input(session, ScheduledItem(NAME, drafts=1)) is None
    waiting = make(prompt=3)
    fresh = next_input(waiting, ScheduledItem(NAME, prefill=3))
    assert fresh is not None
    assert fresh.after(None) == StepInput(NAME, [0, 1, 2])


def test_drafts_that_left_while_the_step_was_prepared_count_once() -> None:
    session = decoding()
    give(session, [0.9, 0.9, 0.9])
    held = list(session.pending_drafts)
    session.step_input(ScheduledItem(NAME, drafts=1), 30.0)
    planned = next_input(session, ScheduledItem(NAME, drafts=1))
    assert planned is not None
    # The edge withdraws its drafts: a new epoch.
    session.merge(1, session.committed_len, [99], [0.5], 35.0, 0.0, 4.0)
    result = VerifyResult(NAME, 1, tuple(held[:2]))
    given_input = planned.after(result)
    assert given_input is not None
    assert list(given_input.tokens) == held[1:3]
    session.apply(result, 40.0)
    session.begin(given_input, 40.0)
    session.apply(VerifyResult(NAME, 1, (held[2], 5)), 50.0)
    counters = session.counters
    pending = len(session.pending_drafts)
    assert counters.drafted == counters.accepted + counters.matched + counters.wasted + pending == 4
    assert counters.accepted == 2
