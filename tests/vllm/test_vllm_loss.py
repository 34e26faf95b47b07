"""A worker process of vLLM dies in the middle of 20 generations: all 20 texts are exact."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest
from conftest import vllm_options
from decoding import decode
from raw_edge import edge

from wispprof.drafters.torch_drafter import TorchDrafter
from wispprof.engines import load_engine
from wispprof.server import running_server
from wispprof.settings.server_settings import ServerSettings
from wispprof.types import Sampling

SAMPLING = Sampling(0.8, 0, 0.9, 7)
LENGTH = 32


@pytest.mark.timeout(400)
async def test_twenty_generations_survive(own, draft, prompts) -> None:
    few = prompts[:20]
    wanted = decode(own, few, LENGTH, lambda number: SAMPLING)
    options = vllm_options(arguments={"distributed_executor_backend": "mp"})
    loaded = load_engine("vllm", options)
    engines = [loaded.engine]

    def load():
        engines.append(load_engine("vllm", options).engine)
        return engines[-1]

    def kill() -> None:
        for worker in engines[0].core.model_executor.workers:
            os.kill(worker.proc.pid, signal.SIGKILL)

    async with running_server(
        ServerSettings(admit="all"), engine=loaded.engine, model=loaded.model, reload=load
    ) as running:
        before = running.server.loop.failed_steps
        step, count = loaded.engine.step, 0

        def counted(inputs):
            nonlocal count
            count += 1
            if count == 8:
                kill()
            return step(inputs)

        loaded.engine.step = counted
        async with edge(running.split_url) as one:
            jobs = (
                one.generate(n, p, LENGTH, k=4, drafter=TorchDrafter(draft), sampling=SAMPLING)
                for n, p in enumerate(few)
            )
            texts = await asyncio.gather(*jobs)
        assert running.server.loop.failed_steps == before + 1
    engines[-1].shutdown()
    assert len(engines) == 2
    assert list(texts) == wanted
