"""check-pair: rounds along a trace, an interval, and a verdict that follows from the times."""

from __future__ import annotations

import numpy as np
import pytest

from wispprof.artifacts import AcceptanceTrace, TracePath
from wispprof.engines.loading import random_model
from wispprof.errors import ProfileError
from wispprof.profiling import pair_check
from wispprof.profiling.pair_check import check_trace, draft_step_ms, run_check, target_step_ms
from wispprof.settings.profiler_settings import TraceSettings
from wispprof.testing.fake_engine import FakeDrafter, FakeTarget
from wispprof.types import Sampling


def trace(*accepted: list[int], depth: int = 3) -> AcceptanceTrace:
    paths = tuple(
        TracePath(
            (1, 2),
            tuple(range(len(row))),
            np.zeros((len(row), depth), dtype=np.int32),
            np.zeros((len(row), depth, 4), dtype=np.float32),
            np.array(row, dtype=np.int32),
        )
        for row in accepted
    )
    return AcceptanceTrace("target", "draft", "hash", Sampling(), paths)


def test_rounds_follow_the_path() -> None:
    # k = 2: 2 accepted at 0, so the next round is at 3: none; at 4: one; at 6: two; then the path ends.
    found = check_trace(trace([3, 3, 3, 0, 1, 3, 2, 3, 0, 0]), draft_ms=10.0, target_ms=50.0, rtt_ms=20.0)
    two = found.lengths[1]
    assert two.accepted == pytest.approx(5 / 4)
    assert two.low == two.high == two.accepted  # one prompt: nothing to resample
    assert two.tokens_per_s == pytest.approx(1000 * (1 + 5 / 4) / 90)
    assert found.undrafted_tokens_per_s == 20.0
    assert found.worthwhile
    assert "Worth serving" in found.verdict


def test_the_interval_covers_the_prompts_spread() -> None:
    paths = [[3] * 12] * 10 + [[0] * 12] * 10
    one = check_trace(trace(*paths), 10.0, 50.0, 20.0).lengths[0]
    assert one.low < one.accepted < one.high
    assert check_trace(trace(*paths), 10.0, 50.0, 20.0).lengths[0] == one  # repeatable


def test_the_verdict_names_what_would_pay() -> None:
    slow = check_trace(trace([2] * 12), draft_ms=40.0, target_ms=50.0, rtt_ms=20.0)
    assert not slow.worthwhile
    limit = slow.break_even_draft_ms
    assert f"pays below {limit:.1f} ms" in slow.verdict
    assert not check_trace(trace([2] * 12), limit + 0.1, 50.0, 20.0).worthwhile
    assert check_trace(trace([2] * 12), limit - 0.1, 50.0, 20.0).worthwhile
    far = check_trace(trace([2] * 12), draft_ms=0.1, target_ms=50.0, rtt_ms=500.0)
    assert "round trip of 500 ms" in far.verdict
    with pytest.raises(ProfileError, match="too short"):
        check_trace(trace([1]), 1.0, 1.0, 1.0)


def test_a_pair_is_traced_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = {"target": random_model("tiny-llama", seed=1), "draft": random_model("tiny-qwen3", seed=2)}
    ticks = iter(range(1 << 20))
    monkeypatch.setattr(pair_check, "load_pair_model", lambda name, role, *more: pair[role])
    monkeypatch.setattr(
        "wispprof.profiling.traced_drafter.load_pair_model", lambda name, role, *more: pair[role]
    )
    monkeypatch.setattr(
        "wispprof.profiling.acceptance_trace._prompts", lambda *more: [[5, 6, 7, 8], [9, 10, 11, 12]]
    )
    settings = TraceSettings(path_tokens=12, depth=2)
    found = run_check(settings, clock=lambda: next(ticks) * 0.004)
    assert found.prompts == 2
    assert [one.k for one in found.lengths] == [1, 2]
    assert found.draft_ms == found.target_ms == pytest.approx(4.0)


def test_steps_are_medians() -> None:
    ticks = iter(range(1000))
    ms = draft_step_ms(FakeDrafter(FakeTarget()), [1, 2, 3], clock=lambda: next(ticks) ** 2 / 1000)
    assert ms == pytest.approx(43.0)
    model = random_model("tiny-llama", seed=1)
    ticks = iter(range(1000))
    assert target_step_ms(model, [1, 2, 3], clock=lambda: next(ticks) / 100) == pytest.approx(10.0)
