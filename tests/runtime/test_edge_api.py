"""Public clients against the local API of an edge, with a server of the hash target behind it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import openai
import pytest
from edge_doubles import edge, truth

from wispprof.core import Sampling
from wispprof.errors import WispprofError
from wispprof.runtime.edge import websocket_dial
from wispprof.runtime.edge.device import Device
from wispprof.runtime.edge.house import EdgeHouse, EdgeSettings
from wispprof.runtime.edge.serve import make_edge_app, serve_edge
from wispprof.runtime.server.double import HashDrafter, HashEngine, HashTarget
from wispprof.runtime.server.run import running_server
from wispprof.runtime.server.settings import ServerSettings


class Letters:
    """Token ``t`` is the t-th letter from a table of 256 visible characters."""

    eos_token_id = None
    chat_template = None
    table = [chr(0x100 + n) for n in range(256)]

    def get_vocab(self) -> dict[str, int]:
        return {letter: n for n, letter in enumerate(self.table)}

    def encode(self, text: str) -> list[int]:
        return [self.table.index(c) if c in self.table else ord(c) % 256 for c in text]

    def decode(self, tokens: list[int], **_: object) -> str:
        return "".join(self.table[token] for token in tokens)


class HashDevice(Device):
    """A device whose model is the hash drafter."""

    def _model(self) -> HashDrafter:
        return HashDrafter(HashTarget(), 0.8)


LETTERS = Letters()


def text_of(prompt: str, count: int, sampling: Sampling | None = None) -> str:
    return LETTERS.decode(truth(LETTERS.encode(prompt), count, sampling))


@asynccontextmanager
async def api(kind: str = "model", policy: str = "wispprof") -> AsyncIterator[httpx.AsyncClient]:
    engine = HashEngine()
    settings = ServerSettings(policy=policy, admit="all")
    async with running_server(settings, engine=engine, model=engine.served) as running:
        device = HashDevice(kind, "fixed", {"k": 3}, loaded=object())
        async with edge(websocket_dial(running.split_url)) as client:
            house = EdgeHouse(EdgeSettings(drafter=kind), LETTERS, device, client)
            transport = httpx.ASGITransport(make_edge_app(house))
            async with httpx.AsyncClient(transport=transport, base_url="http://edge") as http:
                yield http
        device.close()


def openai_client(http: httpx.AsyncClient) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(api_key="none", base_url="http://edge/v1", http_client=http)


async def test_the_openai_client_completes_streamed_and_whole() -> None:
    async with api() as http:
        client = openai_client(http)
        models = await client.models.list()
        assert [m.id for m in models.data] == ["hash-256"]
        whole = await client.completions.create(
            model="hash-256", prompt="abc", max_tokens=20, temperature=0
        )
        assert whole.choices[0].text == text_of("abc", 20)
        assert whole.choices[0].finish_reason == "length"
        assert whole.usage is not None
        assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (3, 20)
        extra = whole.model_extra
        assert extra is not None
        assert extra["wispprof"]["verified"] is True
        assert extra["wispprof"]["tokens"] == 20
        stream = await client.completions.create(
            model="hash-256",
            prompt="abc",
            max_tokens=20,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(c.choices[0].text for c in chunks if c.choices) == text_of("abc", 20)
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.total_tokens == 23
        assert len(chunks) > 4


async def test_chat_with_stop_strings_seed_and_max_tokens() -> None:
    async with api() as http:
        client = openai_client(http)
        ask = [{"role": "user", "content": "hello"}]
        sampling = Sampling(0.9, 0, 0.8, seed=7)
        expected = text_of("hello", 24, sampling)
        whole = await client.chat.completions.create(
            model="hash-256",
            messages=ask,  # type: ignore[arg-type]
            max_completion_tokens=24,
            temperature=0.9,
            top_p=0.8,
            seed=7,
        )
        assert whole.choices[0].message.content == expected
        stop = expected[9:11]
        stream = await client.chat.completions.create(
            model="hash-256",
            messages=ask,  # type: ignore[arg-type]
            max_tokens=24,
            temperature=0.9,
            top_p=0.8,
            seed=7,
            stop=[stop, "never"],
            stream=True,
        )
        chunks = [chunk async for chunk in stream]
        assert chunks[0].choices[0].delta.role == "assistant"
        said = "".join(c.choices[0].delta.content or "" for c in chunks)
        assert said == expected[: expected.index(stop)]
        assert chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize("kind", ["model", "lookup", "both", "none"])
async def test_the_same_seed_gives_the_same_text_whatever_drafts(kind: str) -> None:
    async with api(kind, "wisp") as http:
        client = openai_client(http)
        answers = await asyncio.gather(
            *(
                client.completions.create(
                    model="x", prompt=f"p{n}", max_tokens=16, temperature=0.7, seed=3
                )
                for n in range(4)
            )
        )
        for n, answer in enumerate(answers):
            assert answer.choices[0].text == text_of(f"p{n}", 16, Sampling(0.7, seed=3))


async def test_bad_requests_are_refused_in_openais_form() -> None:
    async with api() as http:
        client = openai_client(http)
        with pytest.raises(openai.BadRequestError, match="n = 1"):
            await client.completions.create(model="x", prompt="a", n=2)
        with pytest.raises(openai.BadRequestError, match="context"):
            await client.completions.create(model="x", prompt="a" * 5000)
        with pytest.raises(openai.BadRequestError, match="max_tokens"):
            await client.completions.create(model="x", prompt="a", max_tokens=0)
        with pytest.raises(openai.BadRequestError, match="tools is not supported"):
            await client.chat.completions.create(
                model="x",
                messages=[{"role": "user", "content": "a"}],
                tools=[{"type": "function", "function": {"name": "f"}}],
            )
        with pytest.raises(openai.BadRequestError, match="empty"):
            await client.completions.create(model="x", prompt="")


async def test_metrics_and_health() -> None:
    async with api() as http:
        body = {"prompt": "abc", "max_tokens": 12, "temperature": 0, "stream": True}
        async with http.stream("POST", "/v1/completions", json=body) as answer:
            lines = [line async for line in answer.aiter_lines() if line.startswith("data: ")]
        assert lines[-1] == "data: [DONE]"
        last = json.loads(lines[-2].removeprefix("data: "))
        assert last["wispprof"]["drafted"] > 0
        scraped = (await http.get("/metrics")).text
        assert 'wispprof_edge_requests_total{finished="length"} 1.0' in scraped
        assert "wispprof_edge_tokens_total 12.0" in scraped
        assert "wispprof_edge_link_up 1.0" in scraped
        assert (await http.get("/health")).json()["link"] is True


async def test_the_api_asks_for_no_key_so_it_stays_on_loopback() -> None:
    with pytest.raises(WispprofError, match="Refusing to listen"):
        await serve_edge(EdgeSettings(), "0.0.0.0", 0, lambda house, where: None)
