"""A backend of the OpenAI routes that generates given tokens."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import httpx
from fastapi import FastAPI

from wispprof.errors import WispprofError
from wispprof.openai_api import ChatTokenizer
from wispprof.openai_api.routes import StreamTiming, add_openai_routes
from wispprof.openai_api.tokenizer import ByteTokenizer
from wispprof.types import GenerationDefaults, GenerationRequest, Slo, TokenChunk, TokenLogprob

END = ord("!")


class Scripted:
    """Generates ``tokens``, ``step`` at a time, then raises ``error`` if there is one."""

    cached_tokens = 3

    def __init__(
        self, tokens: Sequence[int], stopped: bool, error: Exception | None, step: int, logprobs: int | None
    ) -> None:
        self.finished = ""
        self._stopped = stopped
        self.closed = False
        self._tokens = tuple(tokens)
        self._error = error
        self._step = step
        self._logprobs = logprobs

    def statistics(self) -> dict[str, Any]:
        return {"extra": 1}

    def speculative_decoding(self) -> None:
        return None

    async def stream(self) -> AsyncGenerator[TokenChunk]:
        try:
            for place in range(0, len(self._tokens), self._step):
                tokens = self._tokens[place : place + self._step]
                yield TokenChunk(tokens, self._logprobs_of(tokens))
            if self._error is not None:
                raise self._error
            self.finished = "stop" if self._stopped else "length"
        finally:
            self.closed = True

    def _logprobs_of(self, tokens: Sequence[int]) -> tuple[TokenLogprob, ...]:
        if self._logprobs is None:
            return ()
        tops = [tuple((token + r, -1.0 - r) for r in range(self._logprobs)) for token in tokens]
        return tuple(TokenLogprob(-1.0, top) for top in tops)


class ScriptedBackend:
    """Answers every request with ``text``, up to its stop tokens and ``max_new``."""

    model, max_context, default_max_tokens, default_slo = "m", 64, 16, Slo(2.0, 500.0)
    identity = "blake2b:0"

    def __init__(
        self,
        text: str | bytes = "hello",
        error: Exception | None = None,
        *,
        step: int = 2,
        tokenizer: Any = None,
        template: str = "",
        defaults: GenerationDefaults | None = None,
    ) -> None:
        self.tokenizer = ChatTokenizer(
            tokenizer or ByteTokenizer(), stop_tokens=(END,), chat_template=template
        )
        self.defaults = defaults or GenerationDefaults()
        self.requests: list[GenerationRequest] = []
        self.generations: list[Scripted] = []
        self._text = text.encode() if isinstance(text, str) else text
        self._error: WispprofError | Exception | None = error
        self._step = step

    def accepts_key(self, api_key: str) -> bool:
        return api_key in ("", "key")

    def accepts_model(self, name: str) -> bool:
        return name in ("", self.model)

    def generate(self, request: GenerationRequest, api_key: str) -> Scripted:
        self.requests.append(request)
        tokens = list(self._text)[: request.max_new]
        stops = [place for place, token in enumerate(tokens) if token in request.stop_tokens]
        kept = tokens[: stops[0] + 1] if stops else tokens
        one = Scripted(kept, bool(stops), self._error, self._step, request.sampling.logprobs)
        self.generations.append(one)
        return one


def api(backend: Any, timing: StreamTiming | None = None) -> httpx.AsyncClient:
    app = FastAPI()
    add_openai_routes(app, backend, timing)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://api")


async def complete(backend: Any, timing: StreamTiming | None = None, **body: Any) -> httpx.Response:
    async with api(backend, timing) as client:
        return await client.post("/v1/completions", json={"prompt": "abc", **body})


async def chat(backend: Any, *messages: Any, **body: Any) -> httpx.Response:
    given = list(messages) or [{"role": "user", "content": "abc"}]
    async with api(backend) as client:
        return await client.post("/v1/chat/completions", json={"messages": given, **body})


def events(response: httpx.Response) -> list[Any]:
    """The data of a stream's events, without comments."""
    lines = [line for line in response.text.splitlines() if line and not line.startswith(":")]
    found = [line.removeprefix("data: ") for line in lines]
    return [line if line == "[DONE]" else json.loads(line) for line in found]
