"""One poisoned request among sixteen sessions of one step: the other fifteen finish with exactly their text.

To be poisoned is to have numbers at or beyond a bound; ``test_failed_steps`` plants faults in the engine.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest
from raw_edge import edge
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from wispprof import protocol
from wispprof.backends import Drafter, Engine
from wispprof.drafters.torch_drafter import TorchDrafter
from wispprof.engines.loading import LoadedModel, random_model
from wispprof.engines.torch.engine import TorchEngine
from wispprof.server import running_server
from wispprof.settings.server_settings import ServerSettings
from wispprof.testing.fake_engine import FakeDrafter, FakeEngine
from wispprof.types import Sampling, ServedModel, StepInput, VerifyResult

OTHERS, TOKENS = 15, 24
LARGEST = (1 << 63) - 1

OPEN = protocol.Open(0, [1, 2, 3], 12, undrafted=True)
POISON: dict[str, list[Any]] = {
    "top_k beyond 64 bits": [(OPEN, {"temperature": 0.8, "top_k": 1 << 63})],
    "largest top_k": [(OPEN, {"temperature": 0.8, "top_k": LARGEST})],
    "negative top_k": [(OPEN, {"temperature": 0.8, "top_k": -1})],
    "smallest temperature": [(OPEN, {"temperature": 5e-324})],
    "largest temperature": [(OPEN, {"temperature": 1.7e308})],
    "temperature is not a number": [(OPEN, {"temperature": math.nan})],
    "smallest top_p": [(OPEN, {"temperature": 0.8, "top_p": 5e-324})],
    "min_p of one": [(OPEN, {"temperature": 0.8, "min_p": 1.0})],
    "smallest seed": [(OPEN, {"temperature": 0.8, "seed": -(1 << 63)})],
    "largest seed": [(OPEN, {"temperature": 0.8, "seed": LARGEST})],
    "negative token": [(OPEN, {"tokens": [1, -1, 3]})],
    "token beyond the vocabulary": [(OPEN, {"tokens": [1, 1 << 30, 3]})],
    "token beyond 64 bits": [(OPEN, {"tokens": [1, (1 << 64) - 1, 3]})],
    "no tokens": [(OPEN, {"tokens": []})],
    "more generated than given": [(OPEN, {"generated": 9})],
    "endless output": [(OPEN, {"max_new": LARGEST})],
    "stop tokens beyond the vocabulary": [(OPEN, {"stop": [-1, 1 << 40], "min_new": 5})],
    "minimum beyond the output": [(OPEN, {"stop": [1], "min_new": LARGEST})],
    "every token stops": [(OPEN, {"stop": list(range(256)), "min_new": 5})],
    "all log-probabilities": [(OPEN, {"logprobs": LARGEST})],
    "negative log-probabilities": [(OPEN, {"logprobs": -5})],
    "no speed at all": [(OPEN, {"tokens_per_s": 5e-324})],
    "endless speed": [(OPEN, {"tokens_per_s": 1e308, "ttft_ms": 5e-324})],
    "drafts beyond the vocabulary": [
        (OPEN, {"undrafted": False}),
        protocol.Draft(0, 0, 3, [1 << 40], b"\xff", 1.0, 9.0),
    ],
    "drafts from far beyond": [
        (OPEN, {"undrafted": False}),
        protocol.Draft(0, 0, (1 << 31) - 1, [1], b"\xff", 1.0, 9.0),
    ],
    "drafting time is not a number": [
        (OPEN, {"undrafted": False}),
        protocol.Draft(0, 0, 4, [1], b"\xff", math.nan, math.nan),
    ],
}


class HeldSteps:
    """Holds an engine's steps until ``go``, and records how many inputs the largest one had."""

    def __init__(self, engine: Engine) -> None:
        self.most = 0
        self.go = threading.Event()
        self._step = engine.step
        engine.step = self.step  # type: ignore[method-assign]

    def step(self, inputs: Sequence[StepInput]) -> list[VerifyResult]:
        assert self.go.wait(30.0)
        self.most = max(self.most, len(inputs))
        return self._step(inputs)


def encoded(frame: Any) -> bytes:
    """A frame whose fields may be out of any bounds."""
    if isinstance(frame, tuple):
        opening, changes = frame
        values = {name: getattr(opening, name) for name in opening.__struct_fields__} | changes
        return msgspec.msgpack.encode(["o", *values.values()])
    return protocol.encode(frame)


async def poison(url: str, frames: list[Any], answered: asyncio.Event) -> None:
    """Send the poisoned frames, and read until the server ends the session, the connection, or for ever.
    ``answered`` is set when the server has read them all."""
    async with connect(url, compression=None) as socket:
        await socket.send(protocol.encode(protocol.Hello(protocol.PROTOCOL_VERSION, "")))
        try:
            for frame in frames:
                await socket.send(encoded(frame))
            await socket.send(protocol.encode(protocol.Ping(1, b"")))
            async for data in socket:
                answer = protocol.decode_server(data)
                if isinstance(answer, protocol.Pong):
                    answered.set()
                if isinstance(answer, protocol.Problem) or getattr(answer, "finished", ""):
                    return
        except ConnectionClosed:
            return
        finally:
            answered.set()


PROMPTS = [[number + 1, 3, 9] for number in range(OTHERS)]
SAMPLINGS = [Sampling() if number % 2 == 0 else Sampling(0.8, seed=number) for number in range(OTHERS)]


async def fifteen_and_one(
    engine: Engine,
    model: ServedModel,
    make_drafter: Callable[[], Drafter],
    wanted: list[list[int]],
    kind: str,
) -> None:
    settings = ServerSettings(policy="fcfs", admit="all")
    async with running_server(settings, engine=engine, model=model) as running:
        steps, answered = HeldSteps(engine), asyncio.Event()

        async def ordinary(number: int) -> list[int]:
            async with edge(running.split_url) as one:
                drafter = make_drafter() if number % 3 == 0 else None
                sampling = SAMPLINGS[number]
                return await one.generate(0, PROMPTS[number], TOKENS, drafter=drafter, sampling=sampling)

        others = [asyncio.create_task(ordinary(number)) for number in range(OTHERS)]
        while len(running.server.manager) < OTHERS:
            await asyncio.sleep(0.001)
        poisoned = asyncio.create_task(poison(running.split_url, POISON[kind], answered))
        await answered.wait()
        steps.go.set()
        assert await asyncio.gather(*others) == wanted
        poisoned.cancel()
        await asyncio.gather(poisoned, return_exceptions=True)
        while len(running.server.manager):
            await asyncio.sleep(0.001)
        await running.server.check_integrity()
    # The session that was stepped alone first may wait for its drafts in the next step.
    assert steps.most >= OTHERS - 1


@pytest.mark.parametrize("kind", POISON)
async def test_beside_a_poisoned_request_on_the_fake_engine(kind: str) -> None:
    engine = FakeEngine(max_context=512)
    target = engine.target
    wanted = [target.generate(p, TOKENS, s) for p, s in zip(PROMPTS, SAMPLINGS, strict=True)]
    await fifteen_and_one(engine, engine.served, lambda: FakeDrafter(target), wanted, kind)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return random_model("tiny-llama", seed=3, device="cpu")


@pytest.fixture(scope="module")
def texts(loaded: LoadedModel) -> list[list[int]]:
    """What the engine says to each ordinary prompt, alone."""
    engine = TorchEngine(loaded, kv_tokens=4096, max_sessions=64)
    return [alone(engine, p, s) for p, s in zip(PROMPTS, SAMPLINGS, strict=True)]


def alone(engine: Engine, prompt: list[int], sampling: Sampling) -> list[int]:
    engine.open("alone", sampling, prompt)
    output = list(engine.step([StepInput("alone", prompt)])[0].tokens)
    while len(output) < TOKENS:
        output += engine.step([StepInput("alone", output[-1:])])[0].tokens
    engine.close("alone")
    return output


@pytest.mark.parametrize("kind", POISON)
async def test_beside_a_poisoned_request_on_a_real_model(
    loaded: LoadedModel, texts: list[list[int]], kind: str
) -> None:
    engine = TorchEngine(loaded, kv_tokens=4096, max_sessions=64)
    model = ServedModel("tiny", "", loaded.info.vocab_size, engine.max_context)
    await fifteen_and_one(engine, model, lambda: TorchDrafter(loaded), texts, kind)
