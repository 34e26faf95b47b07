"""Steps planned while the one before them runs: they are, and no token differs."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from raw_edge import edge

from wispprof.policies import Limits, StepPlan
from wispprof.policies.interface import SessionView
from wispprof.policies.wispprof_policy import WispprofPolicy
from wispprof.server import running_server
from wispprof.settings.server_settings import ServerSettings
from wispprof.testing.fake_engine import FakeDrafter, FakeEngine
from wispprof.types import StepInput, StepTimeEstimator, VerifyResult

PROMPTS = [[(7 * i + n) % 64 for i in range(5 + n)] for n in range(12)]


class WatchedEngine(FakeEngine):
    """Knows whether a step is running."""

    running = False

    def step(self, inputs: Sequence[StepInput]) -> list[VerifyResult]:
        self.running = True
        try:
            return super().step(inputs)
        finally:
            self.running = False


class WatchingPolicy(WispprofPolicy):
    """Counts its decisions, and those made during a step."""

    def __init__(self, engine: WatchedEngine) -> None:
        super().__init__()
        self.engine = engine
        self.plans = self.ahead = 0

    def plan(
        self, now_ms: float, sessions: list[SessionView], estimator: StepTimeEstimator, limits: Limits
    ) -> StepPlan:
        self.plans += 1
        self.ahead += self.engine.running
        return super().plan(now_ms, sessions, estimator, limits)


@pytest.mark.parametrize("plan_ahead", [True, False])
async def test_a_step_is_planned_while_another_runs(plan_ahead: bool) -> None:
    engine = WatchedEngine(64, step_ms=lambda shape: 4.0)
    policy = WatchingPolicy(engine)
    settings = ServerSettings(admit="all", plan_late=not plan_ahead, prefill_chunk=16)
    async with (
        running_server(settings, engine=engine, model=engine.served, policy=policy) as running,
        edge(running.split_url) as one,
    ):
        texts = await asyncio.gather(
            *(
                one.generate(n, prompt, 30, k=4, drafter=FakeDrafter(engine.target, 0.6))
                for n, prompt in enumerate(PROMPTS)
            )
        )
        await running.server.check_integrity()
        loop = running.server.loop
        assert loop.failed_steps == loop.rejected_plans == 0
    assert texts == [engine.target.generate(prompt, 30) for prompt in PROMPTS]
    assert (policy.ahead > policy.plans // 4) if plan_ahead else policy.ahead == 0


@pytest.mark.parametrize("drafting", [True, False])
async def test_few_sessions_are_planned_ahead_if_none_gets_drafts(drafting: bool) -> None:
    """Who gets drafts is better planned with them."""
    engine = WatchedEngine(64, step_ms=lambda shape: 10.0)
    policy = WatchingPolicy(engine)
    async with (
        running_server(ServerSettings(), engine=engine, model=engine.served, policy=policy) as running,
        edge(running.split_url) as one,
    ):
        drafter = FakeDrafter(engine.target, 0.6)
        k = 4 if drafting else 0
        texts = await asyncio.gather(
            *(one.generate(n, prompt, 30, k=k, drafter=drafter) for n, prompt in enumerate(PROMPTS[:2]))
        )
    assert texts == [engine.target.generate(prompt, 30) for prompt in PROMPTS[:2]]
    assert policy.ahead == 0 if drafting else policy.ahead > policy.plans // 2


async def test_short_memory_is_shared_as_before() -> None:
    engine = FakeEngine(64, kv_tokens=120, step_ms=lambda shape: 2.0)
    settings = ServerSettings(admit="all", prefill_chunk=16, prefix_cache_sessions=2)
    async with (
        running_server(settings, engine=engine, model=engine.served) as running,
        edge(running.split_url) as one,
    ):
        texts = await asyncio.gather(
            *(
                one.generate(n, prompt, 30, k=4, drafter=FakeDrafter(engine.target, 0.6))
                for n, prompt in enumerate(PROMPTS)
            )
        )
        await running.server.check_integrity()
    assert texts == [engine.target.generate(prompt, 30) for prompt in PROMPTS]
