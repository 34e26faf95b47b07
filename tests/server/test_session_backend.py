"""The server's OpenAI API, through OpenAI's own client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx
import openai
import pytest

from wispprof.openai_api.tokenizer import ByteTokenizer, ChatTokenizer
from wispprof.server import RunningServer, running_server
from wispprof.settings.server_settings import ServerSettings
from wispprof.testing.fake_engine import FakeEngine
from wispprof.types import Sampling

KEY = "k" * 20


@pytest.fixture
async def running() -> AsyncIterator[RunningServer]:
    engine = FakeEngine(128)
    settings = ServerSettings(api_keys=(KEY,), prefill_chunk=16)
    tokenizer = ChatTokenizer(ByteTokenizer())
    async with running_server(settings, engine=engine, model=engine.served, tokenizer=tokenizer) as one:
        yield one


@pytest.fixture
async def client(running: RunningServer) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{running.http_url}/v1", api_key=KEY, max_retries=0) as one:
        yield one


def text_of(prompt: str, count: int, sampling: Sampling = Sampling()) -> str:  # noqa: B008
    return bytes(FakeEngine(128).target.generate(list(prompt.encode()), count, sampling)).decode()


async def test_models(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["hash-128"]


async def test_completion_whole_and_streamed(client: openai.AsyncOpenAI) -> None:
    asked = {"model": "hash-128", "prompt": "def f(", "max_tokens": 20, "temperature": 0}
    whole = await client.completions.create(**asked)
    assert whole.choices[0].text == text_of("def f(", 20)
    assert whole.choices[0].finish_reason == "length"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (6, 20)
    stream = await client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    pieces = [piece async for piece in stream]
    assert "".join(p.choices[0].text for p in pieces if p.choices) == whole.choices[0].text
    assert pieces[-1].usage.completion_tokens == 20


async def test_chat_seed_and_stop(client: openai.AsyncOpenAI) -> None:
    asked = {
        "model": "hash-128",
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 24,
        "temperature": 0.7,
        "top_p": 0.9,
        "seed": 5,
    }
    wanted = text_of("Hello", 24, Sampling(0.7, 0, 0.9, 5))
    answer = await client.chat.completions.create(**asked)
    assert answer.choices[0].message.content == wanted
    again = await client.chat.completions.create(**{**asked, "seed": 6})
    assert again.choices[0].message.content != wanted
    stop = wanted[10:12]
    cut = await client.chat.completions.create(**asked, stop=stop)
    assert cut.choices[0].message.content == wanted[: wanted.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    stream = await client.chat.completions.create(**asked, stream=True)
    pieces = [piece.choices[0].delta.content or "" async for piece in stream]
    assert "".join(pieces) == wanted


async def test_refusals_state_the_reason(running: RunningServer, client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="n: "):
        await client.completions.create(model="", prompt="a", n=9)
    with pytest.raises(openai.NotFoundError, match="hash-128"):
        await client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.BadRequestError, match="at most"):
        await client.completions.create(model="", prompt="a" * 5000)
    with pytest.raises(openai.RateLimitError) as slow:
        await client.completions.create(model="", prompt="a", extra_body={"tokens_per_s": 1e6})
    assert slow.value.body["nearest_tokens_per_s"] > 0
    assert float(slow.value.response.headers["retry-after"]) >= 1
    async with httpx.AsyncClient(base_url=running.http_url) as bare:
        assert (await bare.get("/v1/models")).status_code == 401
        wrong = await bare.post("/v1/completions", json={"prompt": 1})
        assert wrong.status_code == 401
        wrong = await bare.post(
            "/v1/completions", json={"prompt": 1}, headers={"authorization": f"Bearer {KEY}"}
        )
        assert wrong.status_code == 400
        assert (await bare.get("/health")).json()["status"] == "ok"
        assert (await bare.get("/ready")).json()["ready"]


async def test_a_client_that_disconnects_leaves_nothing(running: RunningServer) -> None:
    manager = running.server.manager
    body = {"prompt": "endless", "max_tokens": 4000, "temperature": 0}
    auth = {"authorization": f"Bearer {KEY}"}
    for stream in (False, True):
        async with httpx.AsyncClient(base_url=running.http_url, headers=auth) as bare:
            asking = asyncio.create_task(bare.post("/v1/completions", json={**body, "stream": stream}))
            while not len(manager):
                assert not asking.done(), asking.result().text
                await asyncio.sleep(0.001)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        while len(manager):
            await asyncio.sleep(0.001)
    await running.server.check_integrity()


async def test_the_next_turn_reuses_the_prefix(client: openai.AsyncOpenAI) -> None:
    first = await client.completions.create(model="", prompt="x" * 40, max_tokens=8, temperature=0)
    turn = "x" * 40 + first.choices[0].text + "and?"
    second = await client.completions.create(model="", prompt=turn, max_tokens=8, temperature=0)
    assert second.usage.prompt_tokens_details.cached_tokens == 47
    assert second.choices[0].text == text_of(turn, 8)
