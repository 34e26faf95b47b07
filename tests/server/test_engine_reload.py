"""An engine that is lost within a step is loaded again; every session goes on where it was."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from raw_edge import edge

from wispprof.errors import EngineLost
from wispprof.server import running_server
from wispprof.settings.server_settings import ServerSettings
from wispprof.testing.fake_engine import FakeDrafter, FakeEngine
from wispprof.types import Sampling, StepInput, VerifyResult

PROMPTS = [[(7 * i + n) % 64 for i in range(5 + n)] for n in range(20)]
SAMPLING = Sampling(0.8, 0, 0.9, 7)


class FragileEngine(FakeEngine):
    """Is lost in its 40th step, and must not be asked anything afterwards but to shut down."""

    lost = False

    def step(self, inputs: Sequence[StepInput]) -> list[VerifyResult]:
        if self.lost or self.steps == 40:
            self.lost = True
            raise EngineLost("The device is gone.")
        return super().step(inputs)

    def close(self, session: str) -> None:
        assert not self.lost
        super().close(session)


@pytest.mark.parametrize("policy", ["server-only", "wispprof"])
async def test_every_generation_ends_exactly(policy: str) -> None:
    lost = FragileEngine(64)
    loaded: list[FakeEngine] = []

    def load() -> FakeEngine:
        loaded.append(FakeEngine(64))
        return loaded[-1]

    settings = ServerSettings(policy=policy, prefill_chunk=16, admit="all")
    async with (
        running_server(settings, engine=lost, model=lost.served, reload=load) as running,
        edge(running.split_url) as one,
    ):
        texts = await asyncio.gather(
            *(
                one.generate(n, prompt, 30, k=4, drafter=FakeDrafter(lost.target, 0.6), sampling=SAMPLING)
                for n, prompt in enumerate(PROMPTS)
            )
        )
        while len(running.server.manager):
            await asyncio.sleep(0)
        await running.server.check_integrity()
    assert lost.lost
    assert len(loaded) == 1
    assert list(texts) == [lost.target.generate(prompt, 30, SAMPLING) for prompt in PROMPTS]
