"""When an edge drafts and sends: rounds, proactive drafts, bursts in stream mode."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from wispprof.policies import make_controller
from wispprof.policies.interface import RoundContext
from wispprof.sessions.draft_buffer import DraftBuffer, Outgoing
from wispprof.sessions.draft_scheduler import DraftScheduler
from wispprof.sessions.edge_timing import EdgeTiming
from wispprof.settings.edge_settings import DraftingSettings
from wispprof.types import DraftFeatures, DraftToken, Slo


def context(draft_ahead: int) -> RoundContext:
    return RoundContext(draft_ms=10.0, rtt_ms=40.0, server_ms=20.0, draft_ahead=draft_ahead)


def drafted(token: int, confidence: float = 0.9) -> DraftToken:
    return DraftToken(token, DraftFeatures(confidence, 0.1, 2.0, 1.0))


class Bench:
    """A buffer and its scheduler, past the first commit; drafts count up from 100."""

    def __init__(self, controller: str = "fixed", stream: bool = False, **kwargs: object) -> None:
        settings = kwargs.pop("settings", DraftingSettings(proactive=3))
        assert isinstance(settings, DraftingSettings)
        stop = kwargs.pop("stop", ())
        self.buffer = DraftBuffer([1, 2, 3], stream=stream, draft_ahead_limit=8)
        self.scheduler = DraftScheduler(self.buffer, make_controller(controller, **kwargs), settings, stop)  # type: ignore[arg-type]
        self.scheduler.committed(self.buffer.on_commit(4, [4]), 0)

    def run(
        self, confidence: float = 0.9, hold: Callable[[int], bool] = lambda count: False
    ) -> tuple[list[Outgoing], int]:
        """Draft as long as it may; what left, and how many were drafted. ``hold(drafted so far)``."""
        out, count = [], 0
        while True:
            while (frame := self.scheduler.due(context, hold(count))) is not None:
                out.append(frame)
            if not self.scheduler.may_draft():
                return out, count
            token = 100 + self.buffer.length
            self.buffer.propose(token, 1.0, 10.0)
            self.scheduler.drafted(drafted(token, confidence))
            count += 1


def test_a_round_and_what_is_drafted_beyond_it() -> None:
    bench = Bench(k=4)
    out, count = bench.run()
    assert [len(frame.tokens) for frame in out] == [4]
    assert count == 4 + 3
    assert out[0].acceptance_prob == pytest.approx((0.9,) * 4)
    # A hit: the three kept drafts begin the next round, rated like fresh ones, and one is drafted.
    own = [draft.token for draft in bench.buffer.drafts[:5]]
    bench.scheduler.committed(bench.buffer.on_commit(9, own, 4, 4), 4)
    out, count = bench.run()
    assert [len(frame.tokens) for frame in out] == [4]
    assert out[0].base == 9
    assert out[0].acceptance_prob == pytest.approx((0.9,) * 4)
    assert count == 2 + 3


def test_k_zero_sends_an_empty_round_and_drafts_nothing_ahead() -> None:
    bench = Bench(k=0)
    out, count = bench.run()
    assert [frame.tokens for frame in out] == [()]
    assert count == 0


def test_the_controller_ends_a_round() -> None:
    out, _ = Bench("wisp", threshold=0.5, k_max=8).run(confidence=0.3)
    assert [len(frame.tokens) for frame in out] == [1]


def test_a_drafted_stop_token_ends_the_round() -> None:
    bench = Bench(k=6, stop=(105,))
    out, _ = bench.run()
    assert out[0].tokens == (104, 105)


def test_a_stream_groups_frames_and_stops_at_the_draft_ahead_limit() -> None:
    bench = Bench(k=3, stream=True, settings=DraftingSettings(frame_share=0.5))
    out, count = bench.run()
    assert count == 8
    assert [len(frame.tokens) for frame in out] == [2, 2, 2, 2]  # half of 40 ms holds two drafts
    assert [frame.base for frame in out] == [4, 6, 8, 10]


def test_a_stream_holds_drafts_that_lose_nothing_by_it() -> None:
    alone = DraftingSettings(frame_share=0.0, frame_max=3)
    sizes = [len(frame.tokens) for frame in Bench(k=3, stream=True, settings=alone).run()[0]]
    assert sizes == [1] * 8
    bench = Bench(k=3, stream=True, settings=alone)
    out, _ = bench.run(hold=lambda count: count != 2)
    assert [len(frame.tokens) for frame in out] == [2, 3, 3]
    # The last of a stretch that the controller ends goes at once: nothing comes that it could wait for.
    out, _ = Bench("wisp", stream=True, threshold=0.5, k_max=8).run(0.3, hold=lambda count: True)
    assert [len(frame.tokens) for frame in out] == [1]


def test_a_stream_pauses_after_a_doubtful_token_until_the_next_commit() -> None:
    bench = Bench("wisp", stream=True, threshold=0.5, k_max=8)
    out, count = bench.run(confidence=0.3)
    assert count == 1
    assert len(out) == 1
    assert bench.run()[1] == 0
    bench.scheduler.committed(bench.buffer.on_commit(5, [77], 0, 1), 1)
    assert bench.run()[1] > 0


def test_a_proactive_step_that_outlasts_the_wait_must_pay() -> None:
    def may(confidence: float, left_ms: float) -> bool:
        bench = Bench(k=2)
        for token in (200, 201):
            assert bench.scheduler.due(context) is None
            bench.buffer.propose(token)
            bench.scheduler.drafted(drafted(token, confidence))
        assert bench.scheduler.due(context) is not None
        return bench.scheduler.may_draft(left_ms, 10.0)

    assert may(0.2, 10.0)  # there is time for all of it
    assert not may(0.2, 5.0)
    assert may(0.95, 5.0)
    assert not may(0.95, 0.0)


def test_timing_of_a_round() -> None:
    timing = EdgeTiming(Slo(10.0))
    assert math.isinf(timing.left_ms(0.0, 40.0))
    timing.committed(1000.0, 300.0)  # a prefill is no verify step
    timing.drafted(20.0)
    # Two expected tokens at 100 ms each, 60 ms gone since the commit, 40 ms on the link.
    assert timing.slack_ms([1.0], 1060.0, 40.0) == pytest.approx(100.0)
    assert timing.slack_ms([], 1060.0, 40.0) == pytest.approx(0.0)
    timing.sent(1060.0)
    timing.committed(1200.0, 60.0)
    assert timing.server_ms == 60.0
    timing.sent(1210.0)
    assert timing.left_ms(1230.0, 40.0) == pytest.approx(80.0)
    assert timing.left_ms(5000.0, 40.0) == pytest.approx(25.0)


def test_a_frame_may_be_held_until_the_server_takes_the_next_step() -> None:
    timing = EdgeTiming(Slo(10.0))
    timing.drafted(4.0)
    timing.committed(1000.0, 300.0)
    assert not timing.may_hold(1001.0, 10.0)  # a prefill is no verify step
    timing.committed(1100.0, 40.0)
    # Steps begin at the server every 40 ms from 1095 on: frames for them leave by 1130, 1170, ...; a
    # quarter of the period is kept back, and the next draft is there 4 ms later.
    assert timing.may_hold(1116.0, 10.0)
    assert not timing.may_hold(1117.0, 10.0)
    assert not timing.may_hold(1129.0, 10.0)
    assert timing.may_hold(1131.0, 10.0)
    timing.drafted(4.0, waited_ms=200.0)  # other sessions share the device
    assert not timing.may_hold(1131.0, 10.0)


@examples(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.0, 1.0), st.booleans()), min_size=1, max_size=40),
    st.integers(1, 6),
    st.integers(1, 12),
    st.integers(1, 4),
)
def test_a_streamed_draft_equals_its_three_calls(
    drafts: list[tuple[float, bool]], budget: int, draft_ahead: int, group: int
) -> None:
    """What the simulator asks for in one call is what the runtime asks for in three."""

    class Stops:
        """Goes on while a draft is surer than 0.2; a stretch has at most ``budget`` drafts."""

        name = "stops"
        _last = 1.0

        def begin(self, context: RoundContext) -> int:
            return max(0, min(budget, draft_ahead - context.draft_ahead))

        def go_on(self, depth: int, features: DraftFeatures) -> bool:
            self._last = features.confidence
            return features.confidence > 0.2

        def acceptance_prob(self) -> float:
            return self._last

        def finish(self, drafted: int, accepted: int) -> None: ...

    def make() -> tuple[DraftBuffer, DraftScheduler]:
        buffer = DraftBuffer([1, 2], stream=True, draft_ahead_limit=draft_ahead, end=200)
        buffer.waiting = False
        wanted = DraftingSettings(draft_ahead=draft_ahead, frame_share=group / 10, frame_max=6)
        scheduler = DraftScheduler(buffer, Stops(), wanted)
        assert scheduler.due(context) is None
        return buffer, scheduler

    (one, fast), (other, plain) = make(), make()
    for number, (confidence, hold) in enumerate(drafts):
        token = DraftToken(number, DraftFeatures(confidence, 0.1, 0.1, 0.1))
        assert fast.may_draft() == plain.may_draft()
        if not plain.may_draft():
            # A commit of everything held, and one more.
            known = [held.token for held in other.drafts]
            for buffer, scheduler in ((one, fast), (other, plain)):
                effect = buffer.on_commit(
                    buffer.committed_len + len(known) + 1, [*known, 999], len(known), len(known)
                )
                scheduler.committed(effect, len(known))
                assert scheduler.due(context) is None
            continue
        other.propose(token.token, 1.0, 2.5)
        plain.drafted(token)
        assert fast.streamed(token, 2.5, context, hold) == plain.due(context, hold)
        assert one.drafts == other.drafts
        assert one.sent == other.sent


@given(
    confidences=st.lists(st.floats(0, 1), min_size=1, max_size=60),
    k_max=st.integers(1, 6),
    draft_ahead=st.integers(1, 8),
    stop=st.sampled_from([(), (5, 17)]),
)
@examples(max_examples=80, deadline=None)
def test_a_round_drafted_in_one_call_a_token_is_the_round_drafted_in_three(
    confidences: list[float], k_max: int, draft_ahead: int, stop: tuple[int, ...]
) -> None:
    def make() -> tuple[DraftBuffer, DraftScheduler]:
        buffer = DraftBuffer([1, 2], draft_ahead_limit=draft_ahead, end=200)
        buffer.waiting = False
        controller = make_controller("wisp", k_max=k_max)
        scheduler = DraftScheduler(buffer, controller, DraftingSettings(draft_ahead=draft_ahead), stop)
        assert scheduler.due(context) is None
        return buffer, scheduler

    (one, fast), (other, plain) = make(), make()
    rounds = 0
    for number, confidence in enumerate(confidences):
        token = drafted(number, confidence)
        assert fast.may_draft()
        other.propose(token.token, 1.0, 2.5)
        plain.drafted(token)
        out = plain.due(context)
        assert fast.rounded(token, 2.5, context) == out
        assert one.drafts == other.drafts
        if out is None:
            continue
        rounds += 1
        right = len(out.tokens) // 2
        for buffer, scheduler in ((one, fast), (other, plain)):
            tokens = [*out.tokens[:right], 999]
            effect = buffer.on_commit(buffer.committed_len + right + 1, tokens, right, len(out.tokens))
            scheduler.committed(effect, len(out.tokens))
            assert scheduler.due(context) is None
    assert rounds >= len(confidences) // max(k_max, draft_ahead) - 1
