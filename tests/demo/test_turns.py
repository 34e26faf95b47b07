"""Turns of the demo: their order, paired ratios, and the systems' order with what is not decided."""

from __future__ import annotations

import math
import random
from typing import Any, cast

import pytest

from wispprof.bench import BenchResult, RequestResult
from wispprof.bench.bench_result import pool_results, summarise
from wispprof.demo.turns import benches_of, paired_ratio, ranking, turn_order
from wispprof.edge.request_stats import RequestStats
from wispprof.reporting import verdict
from wispprof.types import Slo


def turn(policy: str, tokens: int, seconds: float = 1.0, met: bool = True) -> BenchResult:
    """One request of ``tokens`` tokens at ten times its SLO's speed, or a tenth of it."""
    stats = RequestStats()
    stats.tokens, stats.first_ms = tokens, 5.0
    stats.rounds, stats.accepted = tokens // 2, tokens // 2
    result = RequestResult(0, Slo(1.0), stats, lossless=True, err="" if met else "lost")
    return summarise(policy, {"devices": 1}, [result], seconds, [(1.0, 2.0, 1.5)], {}, (tokens, 2 * tokens))


def test_every_system_has_a_turn_each_round_and_none_is_always_first() -> None:
    turns = list(turn_order(("a", "b", "c"), 4))
    assert len(turns) == 12
    for number in range(4):
        assert sorted(name for one, name in turns if one == number) == ["a", "b", "c"]
    assert {turns[0][1], turns[3][1]} == {"a", "c"}


def test_a_pooled_result_is_that_of_all_requests_over_the_whole_time() -> None:
    pooled = pool_results([turn("wisp", 100), turn("wisp", 300, seconds=3.0)])
    assert pooled.figures["requests"] == 2.0
    assert pooled.figures["tokens_per_s"] == pytest.approx(100.0)
    assert pooled.figures["goodput_tokens_per_s"] == pytest.approx(100.0)
    assert pooled.figures["down_bytes_per_token"] == pytest.approx(2.0)
    assert len(pooled.steps) == 2


def test_the_interval_of_paired_values_ignores_what_both_share() -> None:
    rng = random.Random(0)
    speeds = [rng.uniform(0.5, 1.5) for _ in range(8)]
    theirs = [100.0 * speed for speed in speeds]
    ours = [130.0 * speed for speed in speeds]
    ratio = paired_ratio(ours, theirs)
    assert ratio == pytest.approx((1.3, 1.3, 1.3))
    assert ratio.decided
    # The same values in another order are no pairs any more.
    assert not paired_ratio(ours[::-1], theirs).decided


def test_nineteen_of_twenty_intervals_hold_the_truth() -> None:
    rng, held = random.Random(1), 0
    for _ in range(1000):
        ours = [rng.gauss(120.0, 10.0) for _ in range(6)]
        theirs = [rng.gauss(100.0, 10.0) for _ in range(6)]
        ratio = paired_ratio(ours, theirs)
        held += ratio.low <= 1.2 <= ratio.high
    assert 0.93 < held / 1000 < 0.97


def test_a_baseline_that_met_nothing_decides_nothing() -> None:
    ratio = paired_ratio([1.0, 2.0], [0.0, 0.0])
    assert math.isinf(ratio.value)
    assert not ratio.decided


ROUNDS: dict[str, Any] = {
    "server-only": [turn("server-only", n) for n in (100, 110, 90)],
    "wisp": [turn("wisp", n) for n in (90, 115, 95)],
    "wispprof": [turn("wispprof", n) for n in (140, 155, 126)],
}


def test_neighbours_that_are_too_close_are_said_to_be_undecided() -> None:
    assert ranking(ROUNDS) in ("wispprof > server-only ≈ wisp", "wispprof > wisp ≈ server-only")


def test_the_verdict_states_its_interval_or_that_it_is_undecided() -> None:
    benches = benches_of(ROUNDS, "server-only")
    assert [bench.figure("turns") for bench in benches] == [3.0, 3.0, 3.0]
    assert "Split serving pays here: wispprof delivers 1.40 ×" in verdict(benches)
    assert "95 % interval of the ratio: 1.3" in verdict(benches)
    close = {name: ROUNDS[name] for name in ("server-only", "wisp")}
    assert verdict(benches_of(close, "server-only")).startswith("Undecided: wisp delivers 1.00 ×")
    assert cast(float, benches[2].figure("goodput_ratio_low")) > 1.0
