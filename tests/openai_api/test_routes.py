"""The OpenAI routes over a scripted backend: statuses, errors within a stream, stop tokens and strings."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from wispprof.errors import EngineError, RuntimeFault, ServerBusy, ServerUnreachable, WispprofError
from wispprof.openai_api import ChatTokenizer
from wispprof.openai_api.routes import add_openai_routes
from wispprof.openai_api.tokenizer import ByteTokenizer
from wispprof.types import GenerationRequest, Slo, TokenChunk

END = ord("!")


class Scripted:
    """Generates ``text``, two bytes a time, then raises ``error`` if there is one."""

    cached_tokens = 3

    def __init__(self, text: str, error: WispprofError | None) -> None:
        self.finished = ""
        self.closed = False
        self._text = text.encode()
        self._error = error

    def statistics(self) -> dict[str, Any]:
        return {"extra": 1}

    async def stream(self) -> AsyncGenerator[TokenChunk]:
        try:
            for place in range(0, len(self._text), 2):
                yield TokenChunk(tuple(self._text[place : place + 2]))
            if self._error is not None:
                raise self._error
            self.finished = "stop" if self._text[-1] == END else "length"
        finally:
            self.closed = True


class Backend:
    model, max_context, default_max_tokens, default_slo = "m", 64, 16, Slo(2.0, 500.0)

    def __init__(self, text: str = "hello", error: WispprofError | None = None) -> None:
        self.tokenizer = ChatTokenizer(ByteTokenizer())
        self.tokenizer.stop_tokens = (END,)
        self.generation = Scripted(text, error)
        self.request: GenerationRequest | None = None

    def accepts_key(self, api_key: str) -> bool:
        return api_key in ("", "key")

    def accepts_model(self, name: str) -> bool:
        return name in ("", self.model)

    def generate(self, request: GenerationRequest, api_key: str) -> Scripted:
        self.request = request
        return self.generation


async def post(backend: Backend, **body: Any) -> httpx.Response:
    app = FastAPI()
    add_openai_routes(app, backend)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://api") as client:
        return await client.post("/v1/completions", json={"prompt": "abc", **body})


def events(response: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


async def test_defaults_of_the_backend_and_fields_of_the_request() -> None:
    backend = Backend()
    whole = (await post(backend)).json()
    assert whole["choices"][0]["text"] == "hello"
    assert whole["extra"] == 1
    assert whole["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}
    asked = backend.request
    assert asked is not None
    assert (asked.max_new, asked.slo, asked.stop_tokens) == (16, Slo(2.0, 500.0), (END,))
    await post(backend, max_tokens=1000, tokens_per_s=5.0, ttft_ms=80.0, ignore_eos=True)
    asked = backend.request
    assert (asked.max_new, asked.slo, asked.stop_tokens) == (61, Slo(5.0, 80.0), ())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ServerBusy("later", 2500.0), 429),
        (ServerUnreachable("gone"), 503),
        (RuntimeFault("broken"), 502),
        (EngineError("impossible"), 400),
    ],
)
async def test_an_error_before_the_first_token_sets_the_status(
    stream: bool, error: WispprofError, status: int
) -> None:
    response = await post(Backend("", error), stream=stream)
    assert response.status_code == status
    assert str(error) in response.json()["error"]["message"]
    assert ("retry-after" in response.headers) == (status in (429, 503))


async def test_an_error_within_a_stream_is_its_last_event() -> None:
    backend = Backend("hello", RuntimeFault("broken"))
    response = await post(backend, stream=True)
    assert response.status_code == 200
    *chunks, last = events(response)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "hello"
    assert last["error"] == {
        "message": "broken",
        "type": "server_error",
        "param": None,
        "code": None,
    }


@pytest.mark.parametrize("stream", [False, True])
async def test_the_stop_token_is_not_shown_and_a_stop_string_closes_the_generation(
    stream: bool,
) -> None:
    for backend, stop in ((Backend("hello!"), None), (Backend("hello, world"), ", w")):
        response = await post(backend, stream=stream, stop=stop)
        found = [event for event in events(response) if event != "[DONE]"] if stream else None
        choices = [event["choices"][0] for event in found or [response.json()]]
        assert "".join(choice["text"] for choice in choices) == "hello"
        assert choices[-1]["finish_reason"] == backend.generation.finished == "stop"
        assert backend.generation.closed


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"prompt": ""}, 400, "empty"),
        ({"prompt": []}, 400, "empty"),
        ({"prompt": "x" * 64}, 400, "context"),
        ({"prompt": ["a", "b"]}, 400, "One prompt"),
        ({"model": "other"}, 404, "'m'"),
        ({"logprobs": 2}, 400, "logprobs"),
        ({"tokens_per_s": 0}, 400, "tokens_per_s"),
        ({"seed": 1 << 63}, 400, "seed"),
    ],
)
async def test_invalid_requests(body: dict[str, Any], status: int, message: str) -> None:
    response = await post(Backend(), **body)
    assert response.status_code == status
    assert message in response.json()["error"]["message"]
