"""Closed loads on a server without drafts: a run of steps equals single steps; memory, chunks and queues."""

from __future__ import annotations

from dataclasses import replace

import pytest

from wispprof.simulation.closed_load import ClosedLoad, Scheduler, replay
from wispprof.types import BatchTotals

LOAD = ClosedLoad(8, 600, 50, requests=4)


def step_ms(totals: BatchTotals[int]) -> float:
    return 5.0 + 0.02 * totals.sum_new + 1e-4 * totals.sum_cached


def test_one_client_takes_its_prompt_and_its_tokens() -> None:
    alone = replay(ClosedLoad(1, 1000, 11, requests=2), lambda _: 10.0, 1 << 40, Scheduler(step_tokens=400))
    assert (alone.ttft_ms, alone.tpot_ms) == pytest.approx((30.0, 10.0))  # three chunks, then ten tokens
    assert alone.steps == 2 * 13


def test_prompts_share_the_steps_of_others() -> None:
    alone = replay(replace(LOAD, concurrency=1), step_ms, 1 << 40, Scheduler())
    shared = replay(LOAD, step_ms, 1 << 40, Scheduler())
    assert shared.tpot_ms > alone.tpot_ms + 0.02 * 7
    assert shared.ttft_ms > alone.ttft_ms
    costly = replay(LOAD, step_ms, 1 << 40, Scheduler(overhead_ms=1.0))
    assert costly.tpot_ms > shared.tpot_ms + 1.0


def test_a_smaller_budget_lets_the_first_prompt_through_earlier() -> None:
    small, large = (replay(LOAD, step_ms, 1 << 40, Scheduler(step_tokens=n)) for n in (600, 8192))
    assert small.ttft_ms < large.ttft_ms


def test_full_memory_queues_or_preempts() -> None:
    free = replay(LOAD, step_ms, 1 << 40, Scheduler())
    reserved = replay(LOAD, step_ms, 3 * 650, Scheduler(reserve=True))
    preempted = replay(LOAD, step_ms, 3 * 600 + 60, Scheduler())
    assert free.preemptions == reserved.preemptions == 0 < preempted.preemptions
    assert reserved.ttft_ms > 2 * free.ttft_ms
    assert preempted.tpot_ms > reserved.tpot_ms
    for found in (free, reserved, preempted):
        assert found.tokens_per_s > 0


def test_equal_seeds_give_equal_runs() -> None:
    assert replay(LOAD, step_ms, 9000, Scheduler()) == replay(LOAD, step_ms, 9000, Scheduler())
    assert replay(LOAD, step_ms, 9000, Scheduler()) != replay(
        replace(LOAD, seed=1), step_ms, 9000, Scheduler()
    )
