"""One generation on the edge as a state machine: drafts, commits that agree or contradict, reopening."""

from __future__ import annotations

import pytest

from wispprof.errors import ProtocolError
from wispprof.policies import make_controller
from wispprof.sessions.draft_buffer import Outgoing
from wispprof.sessions.edge_session import EdgeSession
from wispprof.settings.edge_settings import DraftingSettings
from wispprof.types import DraftFeatures, DraftToken, Slo

PROMPT = [1, 2, 3]


def token(value: int) -> DraftToken:
    return DraftToken(value, DraftFeatures(0.9, 0.1, 2.0, 1.0))


def opened(stream: bool, k: int = 2, **settings: int) -> EdgeSession:
    """A session past its prefill, whose first committed token is 4 at position 3."""
    session = EdgeSession(
        PROMPT,
        16,
        Slo(10.0),
        DraftingSettings(**settings),
        make_controller("fixed", k=k),
        stream=stream,
        rtt_ms=20.0,
    )
    assert session.next_frame(0.0) is None
    effect = session.on_commit(100.0, 4, [4], 0, 0, 80.0)
    assert effect is not None
    assert effect.tokens == (4,)
    return session


def draft(session: EdgeSession, *values: int, now_ms: float = 100.0) -> list[Outgoing]:
    """Draft these tokens, each in 5 ms; the frames that left."""
    frames = []
    for value in values:
        frames += leaving(session, now_ms)
        assert session.may_draft(now_ms)
        session.begin_step()
        now_ms += 5.0
        assert session.end_step(lambda value=value: token(value), 5.0) is None
    return frames + leaving(session, now_ms)


def leaving(session: EdgeSession, now_ms: float) -> list[Outgoing]:
    frames = []
    while (frame := session.next_frame(now_ms)) is not None:
        session.sent(frame, now_ms)
        frames.append(frame)
    return frames


def test_a_synchronous_session_sends_a_round_and_waits() -> None:
    session = opened(stream=False, proactive=0)
    (frame,) = draft(session, 5, 6)
    assert (frame.epoch, frame.base, frame.tokens, frame.draft_ms) == (0, 4, (5, 6), 10.0)
    assert not session.may_draft(110.0)
    # Two tokens beyond the bonus at 10 tokens/s, less the time since the commit and the round trip.
    expected = 1.0 + sum(frame.acceptance_prob[0] ** n for n in (1, 2))
    assert session.sent(frame, 110.0) == pytest.approx(expected * 100.0 - 10.0 - 20.0)


def test_a_commit_that_agrees_keeps_what_was_drafted_beyond_it() -> None:
    session = opened(stream=False, proactive=3)
    draft(session, 5, 6)
    assert draft(session, 7, 8, now_ms=110.0) == []
    effect = session.on_commit(200.0, 7, [5, 6, 7], 2, 2, 50.0)
    assert effect is not None
    assert (effect.rollback_to, effect.extend, effect.proactive_hit) == (None, (), True)
    assert session.buffer.sequence() == [1, 2, 3, 4, 5, 6, 7, 8]
    # The draft that is held already counts for the next round.
    (frame,) = draft(session, 9, now_ms=200.0)
    assert (frame.base, frame.tokens) == (7, (8, 9))


def test_a_commit_that_contradicts_begins_an_epoch() -> None:
    session = opened(stream=False, proactive=3)
    draft(session, 5, 6)
    draft(session, 7, now_ms=110.0)
    effect = session.on_commit(200.0, 6, [5, 60], 1, 2, 50.0)
    assert effect is not None
    assert (effect.rollback_to, effect.extend, effect.dropped_tokens) == (5, (60,), 2)
    (frame,) = draft(session, 70, 80, now_ms=200.0)
    assert (frame.epoch, frame.base, frame.tokens) == (1, 6, (70, 80))


def test_an_asynchronous_session_drafts_on_without_a_commit() -> None:
    session = opened(stream=True, draft_ahead=5, frame_max=1)
    frames = draft(session, 5, 6, 7, 8, 9)
    assert [t for frame in frames for t in frame.tokens] == [5, 6, 7, 8, 9]
    assert [frame.base for frame in frames] == [4, 5, 6, 7, 8]
    assert not session.may_draft(200.0)
    effect = session.on_commit(200.0, 6, [5, 6], 1, 1, 50.0)
    assert effect is not None
    assert effect.kept == 3
    assert [f.base for f in draft(session, 10, now_ms=200.0)] == [9]


def test_drafts_that_are_worked_out_at_once_leave_like_single_steps() -> None:
    single, at_once = opened(stream=True, draft_ahead=8), opened(stream=True, draft_ahead=8)
    assert at_once.next_frame(100.0) is None
    frames = [at_once.drafted(token(value), 5.0, 105.0 + 5.0 * n) for n, value in enumerate(range(5, 11))]
    assert [f for f in frames if f is not None] == draft(single, *range(5, 11))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("committed", "overtaken", "wasted_ms"),
    [([5], False, None), ([5, 6], True, 0.0), ([50], True, 7.0)],
)
def test_a_commit_may_overtake_the_running_draft_step(
    stream: bool, committed: list[int], overtaken: bool, wasted_ms: float | None
) -> None:
    session = opened(stream, k=1, proactive=2)
    draft(session, 5)
    assert session.may_draft(110.0)
    session.begin_step()
    session.on_commit(200.0, 4 + len(committed), committed, 0, 1, 50.0)
    assert session.step_overtaken is overtaken
    assert session.end_step(lambda: token(6), 7.0) == wasted_ms
    assert session.buffer.drafts[-1:] == (() if overtaken else session.buffer.drafts)


@pytest.mark.parametrize("stream", [False, True])
def test_a_lost_commit_asks_for_a_reopening(stream: bool) -> None:
    session = opened(stream, draft_ahead=4, frame_max=1)
    draft(session, 5, 6)
    assert session.on_commit(200.0, 9, [8, 9], 1, 1, 50.0) is None
    session.reopened(stream)
    # The server holds none of the drafts: they leave again once the prefill commits.
    effect = session.on_commit(300.0, 5, [5], 0, 0, 50.0)
    assert effect is not None
    assert effect.hits == 1
    frames = draft(session, 7, now_ms=300.0)
    assert [t for frame in frames for t in frame.tokens] == [6, 7]
    assert frames[0].base == 5


def test_reopening_may_change_the_mode() -> None:
    session = opened(stream=True, draft_ahead=4)
    session.reopened(stream=False)
    assert session.next_frame(200.0) is None
    session.on_commit(300.0, 5, [5], 0, 0, 50.0)
    (frame,) = draft(session, 6, 7, now_ms=300.0)
    assert frame.tokens == (6, 7)


def test_duplicates_change_nothing_and_contradictions_are_refused() -> None:
    session = opened(stream=False)
    effect = session.on_commit(200.0, 4, [4], 0, 0, 50.0)
    assert effect is not None
    assert effect.tokens == ()
    with pytest.raises(ProtocolError, match="contradicts"):
        session.on_commit(200.0, 4, [40], 0, 0, 50.0)


def test_a_session_without_a_controller_never_drafts() -> None:
    session = EdgeSession(PROMPT, 4, Slo(10.0), DraftingSettings())
    session.on_commit(100.0, 4, [4], 0, 0, 80.0)
    assert not session.may_draft(100.0)
    assert session.next_frame(100.0) is None
