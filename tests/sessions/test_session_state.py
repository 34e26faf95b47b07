"""The server's account of a session, against a model of what it must never do."""

from __future__ import annotations

import hashlib
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wispprof.policies.interface import ScheduledItem
from wispprof.sessions.session_state import SessionState
from wispprof.types import Slo, StepInput, VerifyResult

VOCAB = 3


def target(prefix: list[int]) -> int:
    """A target over three tokens: a hash of the prefix, so chance hits and misses are both common."""
    return hashlib.blake2b(bytes(prefix), digest_size=1).digest()[0] % VOCAB


def truth(prompt: list[int], count: int) -> list[int]:
    out: list[int] = []
    while len(out) < count:
        out.append(target(prompt + out))
    return out


def answer(session: SessionState, step_input: StepInput, corrupt: bool = False) -> VerifyResult:
    """What a verifier engine decides for an input, given everything the session has cached."""
    if not step_input.needs_logits:
        return VerifyResult(step_input.session, 0, ())
    tokens = list(step_input.tokens)
    prefix = session.tokens[: session.cached] + tokens[: len(tokens) - step_input.drafts]
    out: list[int] = []
    for draft in [*tokens[len(tokens) - step_input.drafts :], None]:
        own = target(prefix)
        out.append((own + 1) % VOCAB if corrupt else own)
        if own != draft:
            break
        prefix.append(own)
    return VerifyResult(step_input.session, len(out) - 1, tuple(out))


def make(prompt: list[int] | None = None, **changes: object) -> SessionState:
    options: dict[str, object] = {
        "slo": Slo(10.0, 500.0),
        "max_new": 20,
        "max_context": 100,
        "now_ms": 0.0,
    }
    return SessionState("s", prompt or [1, 2, 0, 1], **{**options, **changes})  # type: ignore[arg-type]


def started(**changes: object) -> SessionState:
    """A session that has its first token."""
    session = make(**changes)
    step_input = session.step_input(ScheduledItem("s", prefill=session.prompt_left), 5.0)
    session.apply(answer(session, step_input), 10.0)
    return session


def give(
    session: SessionState,
    tokens: list[int],
    base: int | None = None,
    epoch: int = 0,
    **more: float,
):
    now, slack = more.get("now_ms", 20.0), more.get("slack_ms", 100.0)
    place = session.committed_len if base is None else base
    return session.merge(epoch, place, tokens, [0.5] * len(tokens), now, slack, 4.0)


# --- prefill and decode ---


def test_prompt_goes_in_chunks_and_the_last_one_emits() -> None:
    session = make()
    view = session.view(0.0)
    assert (view.prompt_left, view.ready, view.deadline_ms, view.acceptance_probs) == (
        4,
        True,
        500.0,
        (),
    )
    step_input = session.step_input(ScheduledItem("s", prefill=3), 0.0)
    assert (list(step_input.tokens), step_input.needs_logits) == ([1, 2, 0], False)
    assert session.apply(answer(session, step_input), 1.0).tokens == ()
    step_input = session.step_input(ScheduledItem("s", prefill=1), 2.0)
    assert step_input.needs_logits
    done = session.apply(answer(session, step_input), 7.0)
    assert (done.first, done.committed_len, done.tokens) == (True, 5, tuple(truth([1, 2, 0, 1], 1)))
    assert (session.prompt_left, session.cached) == (0, 4)


def test_a_prompt_of_one_token_is_prefilled_too() -> None:
    session = make([2])
    assert session.view(0.0).prompt_left == 1
    step_input = session.step_input(ScheduledItem("s", prefill=1), 0.0)
    assert len(session.apply(answer(session, step_input), 1.0).tokens) == 1
    assert session.prompt_left == 0


def test_round_mode_waits_for_its_round_and_stream_does_not() -> None:
    assert not started().ready
    assert started(stream=True).ready
    assert started(undrafted=True).ready
    session = started()
    give(session, [])
    assert session.ready
    assert session.view(30.0).arrived_ms == 20.0
    assert session.view(30.0).deadline_ms == 120.0
    step_input = session.step_input(ScheduledItem("s"), 30.0)
    assert len(step_input.tokens) == 1
    assert not session.ready
    session.apply(answer(session, step_input), 40.0)
    assert not session.ready


def test_accepted_rejected_and_bonus() -> None:
    session = started(stream=True)
    right = truth(session.tokens, 4)
    give(session, [*right[:3], (right[3] + 1) % VOCAB])
    step_input = session.step_input(ScheduledItem("s", drafts=4), 30.0)
    done = session.apply(answer(session, step_input), 40.0)
    assert (done.accepted, done.drafted, done.tokens) == (3, 4, tuple(right))
    assert session.cached == session.committed_len - 1
    assert session.pending_drafts == []
    assert give(session, [1], epoch=0) == "epoch"
    assert give(session, [1], epoch=1) == ""


def test_pending_drafts_outlast_a_step_without_them() -> None:
    session = started(stream=True)
    right = truth(session.tokens, 4)
    give(session, right)
    step_input = session.step_input(ScheduledItem("s", drafts=1), 30.0)
    session.apply(answer(session, step_input), 40.0)
    assert session.pending_drafts == right[2:]
    assert (session.counters.accepted, session.counters.matched, session.counters.cut_drafts) == (
        1,
        1,
        3,
    )


def test_drafts_of_a_withdrawn_path_may_still_be_accepted() -> None:
    session = started(stream=True)
    right = truth(session.tokens, 3)
    give(session, right)
    step_input = session.step_input(ScheduledItem("s", drafts=3), 30.0)
    give(session, [(right[0] + 1) % VOCAB], epoch=1)
    done = session.apply(answer(session, step_input), 40.0)
    assert done.accepted == 3
    assert session.pending_drafts == []
    assert give(session, [0], epoch=1) == "epoch"
    counters = session.counters
    assert counters.drafted == counters.accepted + counters.matched + counters.wasted


# --- ends ---


def test_stop_token_in_an_accepted_block_cuts_it() -> None:
    free = started(stream=True)
    right = truth(free.tokens, 12)
    stop = next(token for token in right if token != free.tokens[-1])
    place = right.index(stop)
    session = started(stream=True, stop=[stop])
    give(session, right)
    step_input = session.step_input(ScheduledItem("s", drafts=12), 30.0)
    done = session.apply(answer(session, step_input), 40.0)
    assert done.finished == "stop"
    assert done.tokens == tuple(right[: place + 1])
    assert done.rollback == session.committed_len == session.cached
    assert not session.ready
    assert give(session, [1]) == "finished"


def test_length_and_context_limits() -> None:
    session = started(stream=True, max_new=3)
    give(session, truth(session.tokens, 5))
    assert len(session.view(20.0).acceptance_probs) == 1
    step_input = session.step_input(ScheduledItem("s", drafts=1), 30.0)
    assert session.apply(answer(session, step_input), 40.0).finished == "length"
    tight = started(stream=True, max_context=6)
    assert tight.view(20.0).acceptance_probs == ()
    step_input = tight.step_input(ScheduledItem("s"), 30.0)
    done = tight.apply(answer(tight, step_input), 40.0)
    assert (done.finished, done.committed_len) == ("context", 6)


@pytest.mark.parametrize("changes", [{"max_context": 4}, {"max_new": 0}, {"generated": 4}, {"cached": 4}])
def test_impossible_sessions_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        make(**changes)


def test_items_that_do_not_fit_are_refused() -> None:
    session = make()
    for item in (ScheduledItem("s"), ScheduledItem("s", drafts=1), ScheduledItem("s", prefill=5)):
        with pytest.raises(ValueError):
            session.step_input(item)
    running = started(stream=True)
    with pytest.raises(ValueError):
        running.step_input(ScheduledItem("s", drafts=1))
    running.step_input(ScheduledItem("s"))
    with pytest.raises(ValueError):
        running.step_input(ScheduledItem("s"))
    running.cancel()
    assert running.ready


# --- deadlines ---


def test_a_session_that_ran_ahead_can_wait() -> None:
    session = started(stream=True)
    assert session.view(10.0).deadline_ms == 110.0
    give(session, truth(session.tokens, 3))
    step_input = session.step_input(ScheduledItem("s", drafts=3), 20.0)
    session.apply(answer(session, step_input), 30.0)
    assert session.view(30.0).deadline_ms == 10.0 + 5 * 100.0


def test_slo_is_unreachable_only_if_no_speed_can_meet_it() -> None:
    session = started(stream=True, floor_ms=20.0)
    last_ms = 10.0 + 19 * 100.0
    assert not session.view(last_ms - 19 * 20.0 - 1).slo_unreachable
    assert session.view(last_ms - 19 * 20.0).slo_unreachable
    late = make()
    assert not late.view(499.0).slo_unreachable
    assert late.view(500.0).slo_unreachable
    step_input = late.step_input(ScheduledItem("s", prefill=4), 590.0)
    late.apply(answer(late, step_input), 600.0)
    assert late.view(601.0).slo_unreachable


def test_an_slo_without_ttft_has_no_first_deadline() -> None:
    assert math.isinf(make(slo=Slo(1.0)).view(0.0).deadline_ms)
    assert math.isinf(started().view(0.0).deadline_ms)


def test_nan_slack_is_no_deadline() -> None:
    session = started()
    give(session, [1], slack_ms=math.nan)
    assert math.isinf(session.view(30.0).deadline_ms)


def test_next_draft_is_expected_when_the_last_ones_say() -> None:
    session = started(stream=True)
    right = truth(session.tokens, 6)
    assert session.view(20.0).due_ms is None
    for place in range(3):
        give(session, [right[place]], base=session.committed_len + place, now_ms=100.0 + 30 * place)
    view = session.view(161.0)
    assert view.due_ms is not None
    assert 160.0 < view.due_ms < 195.0
    assert view.due_acceptance_probs == (0.5,)
    assert session.view(400.0).due_ms is None
    assert started().view(0.0).due_ms is None


def test_eviction_prefills_again_without_losing_the_round() -> None:
    session = started()
    session.evicted()
    assert not session.ready
    right = truth(session.tokens, 2)
    give(session, right)
    view = session.view(30.0)
    assert (view.ready, view.prompt_left, view.acceptance_probs, view.deadline_ms) == (
        True,
        5,
        (),
        120.0,
    )
    step_input = session.step_input(ScheduledItem("s", prefill=5), 30.0)
    done = session.apply(answer(session, step_input), 40.0)
    assert done.tokens == (right[0],)
    assert session.pending_drafts == [right[1]]


# --- properties ---

frames = st.lists(
    st.tuples(
        st.integers(0, 3),  # epoch
        st.integers(-2, 6),  # base, from the committed length
        st.lists(st.integers(0, VOCAB - 1), max_size=6),
        st.booleans(),  # step afterwards?
        st.integers(0, 8),  # how many pending drafts
        st.booleans(),  # does the frame arrive while the engine works?
    ),
    max_size=25,
)


def sound(session: SessionState) -> None:
    counters = session.counters
    assert counters.drafted == counters.accepted + counters.matched + counters.wasted + len(
        session.pending_drafts
    )
    assert len(session.pending_drafts) == len(session.drafts.acceptance_probs) <= session.max_pending_drafts
    assert session.cached <= session.committed_len


@given(frames, st.booleans())
@settings(max_examples=300, deadline=None)
def test_committed_text_never_depends_on_what_was_merged(moves, stream: bool) -> None:
    session = started(stream=stream)
    now = 20.0
    for epoch, offset, tokens, step, drafts, midway in moves:
        now += 5.0
        if not midway:
            give(session, tokens, base=session.committed_len + offset, epoch=epoch, now_ms=now)
        sound(session)
        view = session.view(now)
        if step and view.ready:
            item = ScheduledItem("s", drafts=min(drafts, len(view.acceptance_probs)))
            step_input = session.step_input(item, now)
            if midway:
                give(session, tokens, base=session.committed_len + offset, epoch=epoch, now_ms=now)
            done = session.apply(answer(session, step_input), now + 1.0)
            assert len(done.tokens) >= 1
            assert session.cached == session.committed_len - 1 or session.finished
        sound(session)
    assert session.tokens[4:] == truth([1, 2, 0, 1], len(session.tokens) - 4)


def test_the_check_above_can_fail() -> None:
    session = make()
    step_input = session.step_input(ScheduledItem("s", prefill=4))
    session.apply(answer(session, step_input, corrupt=True), 1.0)
    assert session.tokens[4:] != truth([1, 2, 0, 1], 1)


@given(
    st.lists(st.integers(0, VOCAB - 1), max_size=8),
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=6),
    st.randoms(),
)
@settings(max_examples=150, deadline=None)
def test_duplicates_change_nothing_in_any_order(tokens, cuts, random) -> None:
    once, often = started(stream=True), started(stream=True)
    give(once, tokens)
    give(often, tokens)
    repeats = [sorted(cut) for cut in cuts]
    random.shuffle(repeats)
    for start, end in repeats:
        give(often, tokens[start:end], base=often.committed_len + min(start, len(tokens)))
        assert often.counters.drafted == len(tokens)
    assert (often.pending_drafts, often.drafts.acceptance_probs) == (
        once.pending_drafts,
        once.drafts.acceptance_probs,
    )
    assert often.counters.drafted == once.counters.drafted


@given(
    st.integers(1, 4),
    st.integers(0, 3),
    st.lists(st.integers(0, VOCAB - 1), min_size=5, max_size=9),
)
@settings(max_examples=150, deadline=None)
def test_a_contradictory_frame_never_survives(back: int, wrong: int, tokens) -> None:
    session = started(stream=True)
    give(session, tokens[:2])
    base = session.committed_len - back
    frame = session.tokens[base:] + tokens
    place = min(wrong, back - 1)
    frame[place] = (frame[place] + 1) % VOCAB
    assert give(session, frame, base=base) == "contradiction"
    assert session.pending_drafts == []
    assert give(session, tokens) == "epoch"
    sound(session)


def test_frames_of_hostile_content_are_counted_and_dropped() -> None:
    session = started(stream=True, max_pending_drafts=4)
    assert give(session, [1], base=-3) == "contradiction"
    assert give(session, [1], base=10**12, epoch=1) == "gap"
    assert give(session, [1] * 9, epoch=1) == "overflow"
    assert len(session.pending_drafts) == 4
    assert give(session, [2], epoch=1) == "conflict"
    assert dict(session.counters.dropped) == {
        "contradiction": 1,
        "gap": 1,
        "overflow": 5,
        "conflict": 1,
    }
    with pytest.raises(ValueError):
        session.merge(1, 5, [1, 2], [0.5], 0.0, 0.0, 0.0)
    session.merge(2, session.committed_len, [1, 2], [math.nan, 7.0], 0.0, 0.0, 0.0)
    assert session.drafts.acceptance_probs == [0.0, 1.0]
