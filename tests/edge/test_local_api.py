"""Public clients against an edge's local API, with a server of the hash target behind it."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import openai
import pytest
from fake_pair import LETTERS, fake_runtime, text_of

from wispprof.edge.local_api import make_edge_app, serve_edge
from wispprof.errors import WispprofError
from wispprof.openai_api.tokenizer import ChatTokenizer
from wispprof.server.app import make_app
from wispprof.server.engine_client import EngineClient
from wispprof.server.process import running_server
from wispprof.settings.edge_settings import EdgeSettings
from wispprof.settings.server_settings import ServerSettings
from wispprof.settings.shared_settings import LinkModel, LinkSettings
from wispprof.testing.fake_engine import FakeEngine
from wispprof.testing.link_emulator import LinkProxy
from wispprof.types import Sampling


def over(app: object) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app)  # type: ignore[arg-type]
    return httpx.AsyncClient(transport=transport, base_url="http://localhost")


@asynccontextmanager
async def api(kind: str = "model", policy: str = "wispprof") -> AsyncIterator[httpx.AsyncClient]:
    async with fake_runtime(kind, policy) as runtime, over(make_edge_app(runtime)) as http:
        yield http


def openai_client(http: httpx.AsyncClient) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(api_key="none", base_url="http://localhost/v1", http_client=http)


async def test_the_openai_client_completes_streamed_and_whole() -> None:
    async with api() as http:
        client = openai_client(http)
        models = await client.models.list()
        assert [m.id for m in models.data] == ["hash-256"]
        whole = await client.completions.create(model="hash-256", prompt="abc", max_tokens=20, temperature=0)
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


async def test_a_request_switches_drafting_off() -> None:
    async with api() as http:
        client = openai_client(http)
        asked = {"model": "hash-256", "prompt": "abc", "max_tokens": 40, "temperature": 0}
        found = [
            await client.completions.create(**asked, extra_body={"drafting": drafting})
            for drafting in (True, False)
        ]
        assert [whole.choices[0].text for whole in found] == [text_of("abc", 40)] * 2
        drafted, alone = (whole.model_extra["wispprof"] for whole in found)
        assert drafted["drafting"] is True
        assert (alone["drafting"], alone["drafted"], alone["sent"]) == (False, 0, 0)
        assert "by the request" in alone["draft_note"]


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
        text = "".join(c.choices[0].delta.content or "" for c in chunks)
        assert text == expected[: expected.index(stop)]
        assert chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize("kind", ["model", "lookup", "both", "none"])
async def test_the_same_seed_gives_the_same_text_whatever_drafts(kind: str) -> None:
    async with api(kind, "wisp") as http:
        client = openai_client(http)
        answers = await asyncio.gather(
            *(
                client.completions.create(model="", prompt=f"p{n}", max_tokens=16, temperature=0.7, seed=3)
                for n in range(4)
            )
        )
        for n, answer in enumerate(answers):
            assert answer.choices[0].text == text_of(f"p{n}", 16, Sampling(0.7, seed=3))


async def test_the_same_seed_gives_the_same_text_split_server_only_and_after_a_reconnect() -> None:
    ask = {"model": "hash-256", "prompt": "once", "max_tokens": 120, "temperature": 0.8, "seed": 11}
    engine = FakeEngine(step_ms=lambda shape: 2.0)
    settings = ServerSettings(policy="wispprof", admit="all")
    parts = {"engine": engine, "model": engine.served, "tokenizer": ChatTokenizer(LETTERS)}
    async with running_server(settings, **parts) as running:  # type: ignore[arg-type]
        async with over(make_app(EngineClient.within(running.server))) as http:
            alone = await openai_client(http).completions.create(**ask)
        link = LinkSettings(LinkModel(2.0))
        async with LinkProxy("127.0.0.1", 0, "127.0.0.1", running.port, link) as proxy:
            address = f"127.0.0.1:{proxy.port}"
            async with (
                fake_runtime(server=address) as runtime,
                over(make_edge_app(runtime)) as http,
            ):
                client = openai_client(http)
                split = await client.completions.create(**ask)
                half = proxy.bytes_down // 2
                again = asyncio.create_task(client.completions.create(**ask))
                while proxy.bytes_down < 3 * half:
                    await asyncio.sleep(0.001)
                proxy.cut()
                resumed = await again
    expected = text_of("once", 120, Sampling(0.8, seed=11))
    assert alone.choices[0].text == expected
    assert split.choices[0].text == expected
    assert resumed.choices[0].text == expected
    assert resumed.model_extra is not None
    assert resumed.model_extra["wispprof"]["reopened"] == 1


async def test_a_client_that_disconnects_ends_its_generation() -> None:
    body = json.dumps({"prompt": "abc", "max_tokens": 3000, "temperature": 0}).encode()
    head = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b""}
    headers = [(b"content-type", b"application/json")]
    sent: list[dict[str, object]] = []
    async with fake_runtime() as runtime:
        app = make_edge_app(runtime)
        messages = [{"type": "http.request", "body": body}]

        async def receive() -> dict[str, object]:
            if messages:
                return messages.pop()
            while runtime.client.traffic.down_frames < 10:  # in the middle of the answer
                await asyncio.sleep(0.001)
            return {"type": "http.disconnect"}

        async def send(message: dict[str, object]) -> None:
            sent.append(message)

        await app({**head, "headers": headers}, receive, send)  # type: ignore[arg-type]
        async with over(app) as http:
            scraped = (await http.get("/metrics")).text
    assert sent[0]["status"] == 499
    assert 'wispprof_edge_requests_total{finished="aborted"} 1.0' in scraped


async def test_invalid_requests_are_refused_in_openais_format() -> None:
    async with api() as http:
        client = openai_client(http)
        with pytest.raises(openai.BadRequestError, match="n: ") as refused:
            await client.completions.create(model="", prompt="a", n=9)
        assert refused.value.param == "n"
        with pytest.raises(openai.BadRequestError, match="context"):
            await client.completions.create(model="", prompt="a" * 5000)
        with pytest.raises(openai.NotFoundError, match="hash-256"):
            await client.completions.create(model="other", prompt="a")
        with pytest.raises(openai.BadRequestError, match="Tools are not called"):
            await client.chat.completions.create(
                model="",
                messages=[{"role": "user", "content": "a"}],
                tools=[{"type": "function", "function": {"name": "f"}}],
            )
        with pytest.raises(openai.BadRequestError, match="empty"):
            await client.completions.create(model="", prompt="")


async def test_metrics_and_health() -> None:
    async with api(policy="wisp") as http:  # rounds: the server waits for drafts
        body = {"prompt": "abc", "max_tokens": 12, "temperature": 0, "stream": True}
        async with http.stream("POST", "/v1/completions", json=body) as answer:
            lines = [line async for line in answer.aiter_lines() if line.startswith("data: ")]
        assert lines[-1] == "data: [DONE]"
        last = json.loads(lines[-2].removeprefix("data: "))
        assert last["wispprof"]["drafted"] > 0
        scraped = (await http.get("/metrics")).text
        assert 'wispprof_edge_requests_total{finished="length"} 1.0' in scraped
        assert "wispprof_edge_tokens_total 12.0" in scraped
        drafts = last["metrics"]["speculative_decoding"]
        assert f"vllm:spec_decode_num_drafts_total {drafts['num_spec_steps']:.1f}" in scraped
        assert f"vllm:spec_decode_num_draft_tokens_total {drafts['num_draft_tokens']:.1f}" in scraped
        accepted = drafts["num_accepted_draft_tokens"]
        assert f"vllm:spec_decode_num_accepted_tokens_total {accepted:.1f}" in scraped
        by_position = re.findall(r"per_pos_total.position=.\d+.. (\d+)", scraped)
        assert sum(map(int, by_position)) == accepted > 0
        assert "wispprof_edge_link_up 1.0" in scraped
        assert (await http.get("/health")).json()["link"] is True


async def test_the_api_needs_no_key_so_it_stays_on_loopback() -> None:
    with pytest.raises(WispprofError, match="Refusing to listen"):
        await serve_edge(EdgeSettings(), "0.0.0.0", 0, lambda runtime, where: None)


async def test_pages_of_other_origins_and_other_host_names_are_refused() -> None:
    async with fake_runtime() as runtime:
        async with over(make_edge_app(runtime)) as http:
            for headers in ({"host": "rebound.example"}, {"origin": "https://page.example"}):
                assert (await http.get("/v1/models", headers=headers)).status_code == 403
            body = {"prompt": "a" * (9 << 20), "max_tokens": 1}
            assert (await http.post("/v1/completions", json=body)).status_code == 413
            assert (await http.get("/v1/models", headers={"origin": "http://localhost:3000"})).is_success
        async with over(make_edge_app(runtime, ["edge.example"])) as http:
            assert (await http.get("/v1/models", headers={"host": "edge.example"})).is_success


async def test_a_served_edge_answers_over_a_socket_and_ends_when_cancelled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("wispprof.edge.local_api.open_edge", lambda settings: fake_runtime("none"))
    announced: asyncio.Queue[str] = asyncio.Queue()
    served = serve_edge(EdgeSettings(), "127.0.0.1", 0, lambda _, url: announced.put_nowait(url))
    task = asyncio.create_task(served)
    url = await asyncio.wait_for(announced.get(), 60.0)
    async with httpx.AsyncClient(trust_env=False) as http:
        assert (await http.get(f"{url}/ready")).status_code == 200
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/ready", trust_env=False)
