"""check-pair: answers served again in the simulator, intervals, and a verdict that follows from the times."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from wispprof.artifacts import AcceptanceTrace, TracePath
from wispprof.engines.loading import random_model
from wispprof.errors import ProfileError
from wispprof.profiling import pair_check
from wispprof.profiling.pair_check import PairCheck, check_trace, run_check
from wispprof.profiling.pair_rehearsal import PairTimes, measured_steps, rehearse
from wispprof.profiling.pair_remote import _RecordedTarget, rehearse_remote
from wispprof.profiling.prompts import ChosenPrompts
from wispprof.server.process import running_server
from wispprof.settings.profiler_settings import TraceSettings
from wispprof.settings.server_settings import ServerSettings
from wispprof.settings.shared_settings import ServerAccess
from wispprof.testing.fake_engine import FakeDrafter, FakeTarget
from wispprof.types import Sampling


def path(accepted: list[int], depth: int = 3) -> TracePath:
    """An answer of tokens 0, 1, 2 … whose drafts are right as ``accepted`` says; -2 is wrong, -1 none."""
    rows = len(accepted)
    drafts = np.full((rows, depth), -2, dtype=np.int32)
    for row, right in enumerate(accepted):
        drafts[row, :right] = range(row, row + right)
    features = np.full((rows, depth, 4), 0.9, dtype=np.float32)
    return TracePath((1, 2), tuple(range(rows)), drafts, features, np.array(accepted, dtype=np.int32))


def trace(*accepted: list[int]) -> AcceptanceTrace:
    return AcceptanceTrace("target", "draft", "hash", Sampling(), tuple(map(path, accepted)))


def times(draft_ms: float = 10.0, target_ms: float = 50.0, added_ms: float = 0.0) -> PairTimes:
    verify = {k: [target_ms + added_ms * k] for k in range(4)}
    return PairTimes([draft_ms], [draft_ms], [], verify, [(2, target_ms)], [(2, 0.0)])


def test_rounds_follow_the_answers_to_their_end() -> None:
    # Position 0 is the prefill's. k = 2: from 1 two right, from 4 none, from 5 one, from 7 two, from 10 the
    # last draft is left out, because the target's own token ends the answer.
    right = [3, 3, 3, 0, 0, 1, 0, 3, 2, 1, 3, 3]
    found = check_trace(trace(right), times(), rtt_ms=20.0)
    two = found.lengths[1]
    assert two.accepted == pytest.approx((2 + 0 + 1 + 2 + 1) / 5)
    assert two.low == two.high == two.accepted  # one prompt: nothing to resample
    assert found.undrafted_tokens_per_s == pytest.approx(1000 * 12 / (12 * 50 + 20), rel=0.02)
    assert found.worthwhile
    assert "Worth serving" in found.verdict


def test_a_verified_draft_costs_what_was_measured() -> None:
    right = [[3] * 40]
    cheap, dear = (check_trace(trace(*right), times(added_ms=ms), 20.0) for ms in (0.0, 20.0))
    assert [one.accepted for one in cheap.lengths] == [one.accepted for one in dear.lengths]
    assert dear.verify_ms == (50.0, 70.0, 90.0, 110.0)
    assert dear.lengths[2].tokens_per_s < 0.75 * cheap.lengths[2].tokens_per_s


def test_steps_that_do_the_work_of_several_are_served_as_they_came() -> None:
    """A long step that a commit overtakes delays the next round; equal steps of the same mean do not."""
    verify = {k: [50.0] for k in range(4)}

    def served(later: list[float]) -> float:
        taken = PairTimes([20.0], later, [], verify, [(2, 50.0)], [(2, 0.0)])
        return check_trace(trace([1, 0, 2, 0] * 12), taken, 20.0).lengths[2].tokens_per_s

    even, uneven = served([20.0]), served([1.0, 1.0, 1.0, 77.0])
    assert uneven < 0.99 * even


def test_a_device_on_the_servers_machine_drafts_slower_while_the_server_computes() -> None:
    verify = {k: [50.0] for k in range(4)}

    def served(beside: list[float]) -> PairCheck:
        taken = PairTimes([10.0], [10.0], beside, verify, [(2, 50.0)], [(2, 0.0)])
        return check_trace(trace([3] * 40), taken, 0.0)

    apart, sharing = served([10.0]), served([30.0])
    assert served([]) == served([5.0]) == apart  # nothing was measured; a busy server makes no device faster
    # Rounds of three after a right guess at the target's own token. Beside the server, 50 ms hold that guess
    # and two thirds of a draft; its rest and two more drafts at full speed take 30 ms.
    assert sharing.lengths[2].later_tokens_per_s == pytest.approx(4000 / 80.5, rel=0.02)
    assert apart.lengths[2].later_tokens_per_s > 1.4 * sharing.lengths[2].later_tokens_per_s
    assert sharing.ahead.accepted < 0.5 * apart.ahead.accepted


def test_where_nothing_is_proposed_nothing_is_verified() -> None:
    silent = path([0] * 20)
    silent.drafts[:] = -1
    found = check_trace(
        AcceptanceTrace("target", "draft", "hash", Sampling(), (silent,)), times(added_ms=50.0), 1.0
    )
    # A step with a draft would take twice as long.
    assert found.lengths[2].tokens_per_s == pytest.approx(1000 / 61, rel=0.1)


def test_the_intervals_cover_the_prompts_spread() -> None:
    paths = [[3] * 12] * 10 + [[0] * 12] * 10
    one = check_trace(trace(*paths), times(), 20.0).lengths[0]
    assert one.low < one.accepted < one.high
    assert one.slow < one.tokens_per_s < one.fast
    assert check_trace(trace(*paths), times(), 20.0).lengths[0] == one  # repeatable


def test_the_verdict_names_what_would_pay() -> None:
    answers = trace([1] * 24)
    slow = check_trace(answers, times(400.0), rtt_ms=20.0)
    assert not slow.worthwhile
    limit = slow.break_even_draft_ms
    assert limit
    assert f"pays below {limit:.1f} ms" in slow.verdict
    assert not check_trace(answers, times(limit * 1.05), 20.0).worthwhile
    assert check_trace(answers, times(limit * 0.95), 20.0).worthwhile
    far = check_trace(trace([0] * 24), times(0.1, added_ms=50.0), rtt_ms=500.0)
    assert far.break_even_draft_ms == 0.0
    assert "cost more than that gains" in far.verdict
    with pytest.raises(ProfileError, match="too short"):
        check_trace(trace([1]), times(), 1.0)


def test_a_pair_is_traced_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = {"target": random_model("tiny-llama", seed=1), "draft": random_model("tiny-qwen3", seed=2)}
    ticks = iter(range(1 << 20))
    monkeypatch.setattr(pair_check, "load_pair_model", lambda name, role, *more: pair[role])
    monkeypatch.setattr(
        "wispprof.profiling.traced_drafter.load_pair_model", lambda name, role, *more: pair[role]
    )
    chosen = ChosenPrompts([[5, 6, 7, 8], [9, 10, 11, 12]], cut=1, left_out=2)
    monkeypatch.setattr("wispprof.profiling.acceptance_trace.choose_prompts", lambda *more: chosen)
    settings = TraceSettings(path_tokens=12, depth=2)
    found = run_check(settings, clock=lambda: next(ticks) * 0.004)
    assert found.prompts == 2
    assert [one.k for one in found.lengths] == [1, 2]
    assert found.draft_ms == found.target_ms == pytest.approx(4.0)
    assert found.verify_ms == pytest.approx((4.0, 4.0, 4.0))
    assert found.prompt_warning.startswith(
        "1 prompts were cut to 128 tokens and 2 longer conversations were left out, so answers differ"
    )


def test_rounds_of_every_length_are_timed_in_turn() -> None:
    ticks = iter(range(1 << 20))
    answer = FakeTarget()
    text = tuple(answer.generate([1, 2, 3], 60))
    recorded = TracePath((1, 2, 3), text, np.zeros((60, 2)), np.zeros((60, 2, 4)), np.zeros(60))
    pauses: list[float] = []
    target = _RecordedTarget([recorded], lambda drafts: 40.0 + drafts, pauses.append)
    taken = rehearse(FakeDrafter(answer), target, [recorded], 2, Sampling(), clock=lambda: next(ticks) / 500)
    assert sorted(taken.verify) == [0, 1, 2]
    assert taken.draft_ms == pytest.approx(2.0)
    assert taken.resume_ms == pytest.approx(0.0)
    assert sum(pauses) * 1000 == pytest.approx(sum(map(sum, taken.verify.values())))


def test_steps_rise_with_their_tokens() -> None:
    steps = measured_steps([(1, 12.0, 1), (2, 10.0, 3), (4, 20.0, 1)], [(10, 30.0), (20, 50.0)])
    assert steps.step_ms(1) == steps.step_ms(2) == pytest.approx(10.5)
    assert steps.step_ms(3) == pytest.approx(15.25)
    assert steps.start().add(40, 0, True).p50_ms == pytest.approx(90.0)
    assert steps.start().add(40, 0, True).add(1, 9).bound_ms == pytest.approx(100.5)


@pytest.mark.parametrize("policy", ["fcfs", "wispprof"])
async def test_a_servers_steps_are_timed_while_the_device_drafts(policy: str) -> None:
    answer = FakeTarget()
    paths = [
        TracePath(
            prompt, tuple(answer.generate(prompt, 8)), np.zeros((8, 2)), np.zeros((8, 2, 4)), np.zeros(8)
        )
        for prompt in ((1, 2, 3), (4, 5, 6, 7))
    ]
    paused: list[float] = []
    async with running_server(ServerSettings(policy=policy, device="cpu", admit="all")) as server:
        taken = await asyncio.to_thread(
            rehearse_remote,
            server.split_url,
            ServerAccess(),
            FakeDrafter(answer),
            paths,
            2,
            Sampling(),
            5.0,
            sleep=paused.append,
        )
    assert 0 in taken.verify
    assert max(taken.verify) <= 3
    assert all(ms > 0 for samples in taken.verify.values() for ms in samples)
    # Each prompt as long as it is, but turned, so that no KV of its beginning is held.
    assert [tokens for tokens, _ in taken.prefill] == [3, 4]
    assert [tokens for tokens, _ in taken.undrafted_prefill] == [3, 4]
    assert [tokens for tokens, _ in taken.draft_prefill] == [3, 4]
    assert taken.beside
    assert taken.server_slowdown >= 1.0
    assert len(taken.undrafted) == 2 * 7
    assert taken.first
    assert min(paused) > 0.005  # the round trip at least
    estimator = taken.estimator()
    assert estimator.step_ms(2) >= estimator.step_ms(1) > 0
