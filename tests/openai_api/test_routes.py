"""The OpenAI routes over a scripted backend: statuses, streams, stop tokens and strings, several choices."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any

import httpx
import pytest
from scripted_backend import END, ScriptedBackend, api, chat, complete, events

from wispprof.errors import (
    EngineError,
    RequestRefused,
    RuntimeFault,
    ServerBusy,
    ServerUnreachable,
    WispprofError,
)
from wispprof.openai_api.api_error import ApiError
from wispprof.openai_api.routes import StreamTiming
from wispprof.openai_api.tokenizer import ByteTokenizer
from wispprof.types import GenerationDefaults, Slo, TokenChunk


async def test_defaults_of_the_backend_and_fields_of_the_request() -> None:
    backend = ScriptedBackend(defaults=GenerationDefaults(0.6, 40, 0.9, 0.05))
    whole = (await complete(backend)).json()
    assert whole["choices"][0]["text"] == "hello"
    assert whole["extra"] == 1
    assert whole["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}
    [asked] = backend.requests
    assert (asked.max_new, asked.slo, asked.stop_tokens) == (16, Slo(2.0, 500.0), (END,))
    sampling = asked.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.6, 40, 0.9, 0.05)
    await complete(backend, max_tokens=1000, tokens_per_s=5.0, ttft_ms=80.0, ignore_eos=True, top_k=-1)
    asked = backend.requests[-1]
    assert (asked.max_new, asked.slo, asked.stop_tokens) == (61, Slo(5.0, 80.0), ())
    assert asked.sampling.top_k == 0
    backend.default_slo = Slo.of(None)
    await complete(backend, ttft_ms=80.0)
    assert backend.requests[-1].slo == Slo(1.0, 80.0, best_effort=True)
    await complete(backend, tokens_per_s=1.0)
    assert backend.requests[-1].slo == Slo(1.0)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ServerBusy("later", 2500.0), 429),
        (ServerUnreachable("gone"), 503),
        (RuntimeFault("broken"), 502),
        (RequestRefused("too long", "limit"), 400),
        (EngineError("impossible"), 400),
    ],
)
async def test_an_error_before_the_first_token_sets_the_status(
    stream: bool, error: WispprofError, status: int
) -> None:
    response = await complete(ScriptedBackend("", error), stream=stream)
    assert response.status_code == status
    assert str(error) in response.json()["error"]["message"]
    assert ("retry-after" in response.headers) == (status in (429, 503))


@pytest.mark.parametrize(
    ("error", "message"), [(RuntimeFault("broken"), "broken"), (KeyError(1), "Internal error.")]
)
async def test_an_error_within_a_stream_is_its_last_event(error: Exception, message: str) -> None:
    response = await complete(ScriptedBackend("hello", error), stream=True)
    assert response.status_code == 200
    *chunks, last = events(response)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "hello"
    assert last["error"] == {"message": message, "type": "server_error", "param": None, "code": None}


async def test_an_unexpected_error_has_openais_form_too() -> None:
    response = await complete(ScriptedBackend("hello", KeyError(1)))
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "Internal error."


class Waiting(ScriptedBackend):
    """Generates nothing until it is told to."""

    def __init__(self) -> None:
        super().__init__("hello")
        self.go = asyncio.Event()

    def generate(self, request: Any, api_key: str) -> Any:
        one = super().generate(request, api_key)
        inner = one.stream

        async def stream() -> AsyncGenerator[TokenChunk]:
            await self.go.wait()
            async for chunk in inner():
                yield chunk

        one.stream = stream  # type: ignore[method-assign]
        return one


async def test_headers_and_heartbeats_come_before_the_first_token() -> None:
    backend = Waiting()
    sent: list[dict[str, Any]] = []
    body = b'{"prompt": "abc", "stream": true}'
    messages = [{"type": "http.request", "body": body}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        return await asyncio.Future()

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)
        if sum(one.get("body", b"").startswith(b":") for one in sent) == 3:
            backend.go.set()

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": []}
    async with api(backend, StreamTiming(headers_s=0.0, heartbeat_s=0.001)) as client:
        app = client._transport.app  # type: ignore[attr-defined]
        async with asyncio.timeout(20):
            await app(scope, receive, send)
    assert sent[0]["status"] == 200
    chunks = [one.get("body", b"") for one in sent[1:]]
    assert all(one.startswith(b": ") and one.endswith(b"\n\n") for one in chunks[:3])
    text = b"".join(chunks).decode()
    assert text.index('"he"') > text.rindex(": no token yet")
    assert text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("stream", [False, True])
async def test_the_stop_token_is_not_shown_and_a_stop_string_closes_the_generation(stream: bool) -> None:
    for backend, stop, counted in (
        (ScriptedBackend("hello!"), None, 6),
        (ScriptedBackend("hello, world"), ", w", 8),
    ):
        response = await complete(backend, stream=stream, stop=stop)
        found = [event for event in events(response) if event != "[DONE]"] if stream else None
        choices = [event["choices"][0] for event in found or [response.json()]]
        assert "".join(choice["text"] for choice in choices) == "hello"
        assert choices[-1]["finish_reason"] == backend.generations[0].finished == "stop"
        assert choices[-1]["stop_reason"] == stop
        assert backend.generations[0].closed
        if not stream:
            assert response.json()["usage"]["completion_tokens"] == counted


@pytest.mark.parametrize("step", [1, 2, 3, 5, 16])
async def test_counts_and_texts_do_not_depend_on_how_many_tokens_come_at_once(step: int) -> None:
    async def answer(text: str, **body: Any) -> tuple[str, int, Any]:
        whole = (await complete(ScriptedBackend(text, step=step), **body)).json()
        [choice] = whole["choices"]
        assert choice["finish_reason"] == ("stop" if choice["stop_reason"] or "!" in text else "length")
        return choice["text"], whole["usage"]["completion_tokens"], choice["stop_reason"]

    assert await answer("one two three", stop="two") == ("one ", 7, "two")
    assert await answer("one two three", stop=["hree", "two t"]) == ("one ", 9, "two t")
    included = {"include_stop_str_in_output": True}
    assert await answer("one two three", stop="two", **included) == ("one two", 7, "two")
    assert await answer("ab!cd", stop="cd") == ("ab", 3, None)
    assert await answer("ab!cd", stop="!") == ("ab", 3, "!")
    assert await answer("abcd!", stop_token_ids=[ord("c")]) == ("ab", 3, ord("c"))
    assert await answer("abcd!", stop_token_ids=[ord("c")], **included) == ("abc", 3, ord("c"))
    assert await answer("ab!cd?", ignore_eos=True, stop_token_ids=[ord("d")]) == ("ab!c", 5, ord("d"))
    assert await answer("ababab", stop="b", min_tokens=2) == ("aba", 4, "b")
    assert await answer("ab\N{GRINNING FACE}", max_tokens=4) == ("ab", 4, None)


async def test_several_choices_and_prompts() -> None:
    backend = ScriptedBackend("hello")
    body = {"prompt": ["ab", [99, 100, 101]], "n": 2, "seed": 7, "echo": True}
    whole = (await complete(backend, **body)).json()
    assert [(c["index"], c["text"]) for c in whole["choices"]] == [
        (0, "abhello"),
        (1, "abhello"),
        (2, "cdehello"),
        (3, "cdehello"),
    ]
    usage = whole["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (5, 20)
    assert [one.sampling.seed for one in backend.requests] == [7, 8, 7, 8]
    assert all(choice["extra"] == 1 for choice in whole["choices"])
    stream = events(await complete(ScriptedBackend("hello"), stream=True, **body))
    texts = [""] * 4
    for one in stream[:-1]:
        [choice] = one["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == ["abhello", "abhello", "cdehello", "cdehello"]
    assert stream[-1] == "[DONE]"


async def test_no_more_than_eight_choices_are_generated_at_once() -> None:
    running = most = 0

    class Counting(Waiting):
        def generate(self, request: Any, api_key: str) -> Any:
            one = super().generate(request, api_key)
            inner = one.stream

            async def stream() -> AsyncGenerator[TokenChunk]:
                nonlocal running, most
                running += 1
                most = max(most, running)
                try:
                    async for chunk in inner():
                        yield chunk
                        await asyncio.sleep(0)
                finally:
                    running -= 1

            one.stream = stream
            return one

    backend = Counting()
    backend.go.set()
    whole = (await complete(backend, prompt=["ab"] * 20)).json()
    assert len(whole["choices"]) == 20
    assert (running, most) == (0, 8)


async def test_one_failed_choice_ends_the_others() -> None:
    class Failing(Waiting):
        def generate(self, request: Any, api_key: str) -> Any:
            if len(self.requests) == 2:
                self.go.set()
                self._error = RuntimeFault("broken")
            return super().generate(request, api_key)

    backend = Failing()
    response = await complete(backend, n=3)
    assert response.status_code == 502
    assert all(one.closed for one in backend.generations)


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_of_both_routes(stream: bool) -> None:
    body = {"stop": "d", "stream": stream, "return_token_ids": True}

    async def choices(response: httpx.Response) -> list[Any]:
        found = events(response)[:-1] if stream else [response.json()]
        return [choice for one in found for choice in one["choices"]]

    backend = ScriptedBackend("abcdef", step=3)
    found = await choices(await complete(backend, logprobs=1, **body))
    assert "".join(choice["text"] for choice in found) == "abc"
    parts = [choice["logprobs"] for choice in found if choice["logprobs"]]
    assert [token for part in parts for token in part["tokens"]] == ["a", "b", "c", "d"]
    assert [offset for part in parts for offset in part["text_offset"]] == [0, 1, 2, 3]
    assert parts[0]["top_logprobs"][0] == {"a": -1.0}
    assert parts[0]["token_logprobs"][0] == -1.0
    assert [token for choice in found for token in choice["token_ids"]] == [97, 98, 99, 100]
    assert found[0]["prompt_token_ids"] == [97, 98, 99]
    assert backend.requests[0].sampling.logprobs == 1

    backend = ScriptedBackend("abcdef", step=3)
    found = await choices(await chat(backend, logprobs=True, top_logprobs=2, **body))
    content = [one for choice in found if choice["logprobs"] for one in choice["logprobs"]["content"]]
    assert [one["token"] for one in content] == ["a", "b", "c", "d"]
    first = {"token": "a", "logprob": -1.0, "bytes": [97]}
    second = {"token": "b", "logprob": -2.0, "bytes": [98]}
    assert content[0] == {**first, "top_logprobs": [first, second]}


async def test_zero_logprobs_report_the_token_itself() -> None:
    backend = ScriptedBackend("ab")
    [choice] = (await complete(backend, logprobs=0)).json()["choices"]
    assert choice["logprobs"]["top_logprobs"] == [{"a": -1.0}, {"b": -1.0}]
    assert backend.requests[0].sampling.logprobs == 0
    [choice] = (await complete(backend)).json()["choices"]
    assert choice["logprobs"] is None


async def test_tokens_of_a_draft_model_alone_have_no_logprobs() -> None:
    class Unverified(ScriptedBackend):
        def generate(self, request: Any, api_key: str) -> Any:
            one = super().generate(request, api_key)
            one.stream = partial(_without_logprobs_at_the_end, one.stream)  # type: ignore[method-assign]
            return one

    [choice] = (await complete(Unverified("abcd"), logprobs=0)).json()["choices"]
    assert choice["logprobs"]["token_logprobs"] == [-1.0, -1.0, None, None]
    assert choice["logprobs"]["tokens"] == ["a", "b", "c", "d"]
    [choice] = (await chat(Unverified("abcd"), logprobs=True)).json()["choices"]
    assert [one["logprob"] for one in choice["logprobs"]["content"]] == [-1.0, -1.0, -9999.0, -9999.0]


async def _without_logprobs_at_the_end(stream: Any) -> AsyncGenerator[TokenChunk]:
    known = 2
    async for chunk in stream():
        yield chunk if known else TokenChunk(chunk.tokens, verified=False)
        known = max(0, known - len(chunk.tokens))


async def test_usage_in_a_stream() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last, done = events(await complete(ScriptedBackend(), stream=True, stream_options=options))
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [2, 4, 5, 5]
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == 8
    assert last["metrics"]["time_to_first_token_ms"] >= 0.0
    assert done == "[DONE]"


class WithSpecialTokens:
    """Bytes, and two special tokens."""

    eos_token_id = None
    chat_template = None
    is_fast = False

    class Added:
        def __init__(self, content: str) -> None:
            self.content, self.special = content, True

    added_tokens_decoder = {200: Added("<|end|>"), 201: Added("<|other|>")}

    def get_vocab(self) -> dict[str, int]:
        return {f"t{number}": number for number in range(256)}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: list[int], skip_special_tokens: bool = False, **_: object) -> str:
        specials = self.added_tokens_decoder
        kept = [token for token in tokens if not (skip_special_tokens and token in specials)]
        return "".join(specials[token].content if token in specials else chr(token) for token in kept)


async def test_a_stop_string_may_be_a_special_token() -> None:
    async def answer(**body: Any) -> tuple[str, int, Any]:
        backend = ScriptedBackend(b"ab\xc9cd\xc8ef", tokenizer=WithSpecialTokens())
        whole = (await complete(backend, **body)).json()
        return (
            whole["choices"][0]["text"],
            whole["usage"]["completion_tokens"],
            whole["choices"][0]["stop_reason"],
        )

    assert await answer() == ("abcdef", 8, None)
    assert await answer(stop="<|end|>") == ("abcd", 6, "<|end|>")
    assert await answer(stop="d<|end|>e") == ("abc", 7, "d<|end|>e")
    assert await answer(stop="<|end|>", skip_special_tokens=False) == ("ab<|other|>cd", 6, "<|end|>")
    assert await answer(stop="<|end|>", include_stop_str_in_output=True) == ("abcd", 6, "<|end|>")


async def test_a_closed_connection_is_499_before_the_first_token() -> None:
    backend = Waiting()
    sent: list[dict[str, Any]] = []
    messages = [{"type": "http.request", "body": b'{"prompt": "abc", "stream": true}'}]

    async def receive() -> dict[str, Any]:
        return messages.pop() if messages else {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": []}
    async with api(backend) as client:
        await client._transport.app(scope, receive, send)  # type: ignore[attr-defined]
    assert sent[0]["status"] == 499


async def test_models_and_unknown_paths() -> None:
    async with api(ScriptedBackend()) as client:
        listed = (await client.get("/v1/models")).json()["data"]
        assert listed == [(await client.get("/v1/models/m")).json()]
        assert listed[0]["identity"] == "blake2b:0"
        for path in ("/v1/models/other", "/v1/embeddings"):
            missing = await client.get(path)
            assert missing.status_code == 404
            assert missing.json()["error"]["type"] == "not_found_error"
        wrong = await client.get("/v1/completions")
        assert wrong.status_code == 405
        assert "GET" in wrong.json()["error"]["message"]
        wrong = await client.get("/v1/models", headers={"authorization": "Bearer wrong"})
        assert (wrong.status_code, wrong.json()["error"]["type"]) == (401, "authentication_error")


async def test_a_short_prompt_does_not_wait_for_long_ones() -> None:
    """Long prompts are held in the tokenizer until a short one, asked later, is answered."""
    held, waiting = threading.Event(), threading.Event()

    class Slow(ByteTokenizer):
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            if len(text) > 1000:
                waiting.set()
                held.wait(20.0)
            return super().encode(text, add_special_tokens)

    async with api(ScriptedBackend(tokenizer=Slow())) as client:

        async def ask(prompt: str) -> int:
            answer = await client.post("/v1/completions", json={"prompt": prompt})
            return answer.status_code

        long = [asyncio.create_task(ask("x" * 100_000)) for _ in range(8)]
        try:
            while not waiting.is_set():
                await asyncio.sleep(0.0)
            async with asyncio.timeout(10.0):
                assert await ask("abc") == 200
            assert not any(task.done() for task in long)
        finally:
            held.set()
        assert set(await asyncio.gather(*long)) == {400}


def test_refusals_name_the_fields_of_a_request() -> None:
    """The same refusal reaches edges, whose users give options."""
    said = "Request --slo 29.23, or omit --slo."
    assert ApiError(said, 429).body()["error"]["message"] == (
        "Request tokens_per_s 29.23, or omit tokens_per_s."
    )
    assert ApiError("omit --ttft and x--slo").body()["error"]["message"] == "omit ttft_ms and x--slo"
