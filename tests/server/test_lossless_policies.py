"""Over a real WebSocket the text is the target's own, whatever is drafted and shares the step."""

from __future__ import annotations

import asyncio
import random

import pytest
from raw_edge import edge

from wispprof.policies import BATCH_POLICIES
from wispprof.server import VerificationServer, running_server
from wispprof.settings.server_settings import ServerSettings
from wispprof.testing.fake_engine import FakeDrafter, FakeEngine
from wispprof.types import Sampling, StepInput, VerifyResult

POLICIES = list(BATCH_POLICIES)
OPTIONS = {"sled": {"timeout_ms": 1.0}}
GREEDY = Sampling()
SAMPLED = Sampling(0.8, 0, 0.9, 7)


def prompts(count: int, seed: int = 1) -> list[list[int]]:
    dice = random.Random(seed)
    return [[dice.randrange(64) for _ in range(dice.randrange(1, 40))] for _ in range(count)]


async def outputs(
    engine: FakeEngine,
    policy: str,
    batches: list[tuple[int, Sampling, int]],
    max_new: int = 16,
) -> list[list[list[int]]]:
    """Outputs of a server under ``policy`` for batches of (k, sampling, sessions), one by one."""
    settings = ServerSettings(
        policy=policy, policy_options=OPTIONS.get(policy, {}), prefill_chunk=16, admit="all"
    )
    answers = []
    async with running_server(settings, engine=engine, model=engine.served) as running:
        for k, sampling, count in batches:
            async with edge(running.split_url) as one:
                jobs = [
                    one.generate(
                        number,
                        prompt,
                        max_new,
                        k=k,
                        drafter=FakeDrafter(engine.target, 0.6),
                        sampling=sampling,
                    )
                    for number, prompt in enumerate(prompts(count))
                ]
                answers.append(list(await asyncio.gather(*jobs)))
            await settled(running.server)
    assert engine.sessions == ()
    assert engine.kv_free == 1 << 20
    return answers


async def settled(server: VerificationServer) -> None:
    """Wait until no session is left, then audit every cache."""
    while len(server.manager):
        await asyncio.sleep(0)
    await server.check_integrity()


def wanted(engine: FakeEngine, sampling: Sampling, count: int, max_new: int = 16) -> list[list[int]]:
    return [engine.target.generate(prompt, max_new, sampling) for prompt in prompts(count)]


@pytest.mark.parametrize("policy", POLICIES)
async def test_every_policy_and_draft_length(policy: str) -> None:
    engine = FakeEngine(64)
    batches = [(k, sampling, 5) for k in (0, 1, 4, 8) for sampling in (GREEDY, SAMPLED)]
    for (k, sampling, count), found in zip(batches, await outputs(engine, policy, batches), strict=True):
        assert found == wanted(engine, sampling, count), (k, sampling)


@pytest.mark.parametrize("policy", ["wisp", "wispprof"])
async def test_mixed_batches(policy: str) -> None:
    engine = FakeEngine(64)
    batches = [(4, GREEDY, count) for count in (1, 2, 7, 16)]
    for (_, _, count), found in zip(batches, await outputs(engine, policy, batches), strict=True):
        assert found == wanted(engine, GREEDY, count)


class CorruptEngine(FakeEngine):
    """Commits one wrong token in its 40th step."""

    def step(self, feeds: list[StepInput]) -> list[VerifyResult]:
        outcomes = super().step(feeds)
        if self.steps == 40:
            one = outcomes[0]
            wrong = (*one.tokens[:-1], (one.tokens[-1] + 1) % 64)
            outcomes[0] = VerifyResult(one.session, one.accepted, wrong)
        return outcomes


async def test_a_corrupted_token_is_detected() -> None:
    engine = CorruptEngine(64)
    [found] = await outputs(engine, "fcfs", [(4, GREEDY, 4)], 30)
    assert engine.steps > 40
    assert found != wanted(engine, GREEDY, 4, 30)


async def test_seed_and_temperature_matter() -> None:
    engine = FakeEngine(64)
    texts = [
        wanted(engine, sampling, 1)[0]
        for sampling in (GREEDY, SAMPLED, Sampling(0.8, 0, 0.9, 8), Sampling(0.7, 0, 0.9, 7))
    ]
    assert len({tuple(text) for text in texts}) == 4
