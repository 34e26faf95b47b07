"""The OpenAI routes: ``/v1/models``, ``/v1/completions`` and ``/v1/chat/completions``."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.requests import ClientDisconnect

from wispprof.errors import RuntimeFault, ServerBusy, ServerUnreachable, WispprofError
from wispprof.openai_api.openai_protocol import (
    ApiError,
    ChatCompletionRequest,
    ChatCompletionResponse,
    CompletionRequest,
    CompletionResponse,
    event,
    usage,
)
from wispprof.openai_api.text_backend import TextBackend, TextGeneration
from wispprof.types import GenerationRequest, Slo

_CLIENT_CLOSED_REQUEST = 499
_UNREACHABLE_RETRY_MS = 5_000.0
_T = TypeVar("_T")


def add_openai_routes(app: FastAPI, backend: TextBackend) -> None:
    """Mount the routes and OpenAI's error format on ``app``.

    Beside OpenAI's own fields a request may state its SLO (``tokens_per_s``, ``ttft_ms``) and
    ``ignore_eos``.
    """

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, err: RequestValidationError) -> JSONResponse:
        first = err.errors()[0]
        field = ".".join(str(part) for part in first["loc"][1:])
        return _error_response(ApiError(f"{field}: {first['msg']}", param=field or None))

    @app.exception_handler(WispprofError)
    async def refused(_: Request, err: WispprofError) -> JSONResponse:
        return _error_response(_api_error(err))

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        _authorize(backend, request)
        entry = {
            "id": backend.model,
            "object": "model",
            "created": 0,
            "owned_by": "wispprof",
            "max_model_len": backend.max_context,
        }
        return {"object": "list", "data": [entry]}

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        key = _authorize(backend, request)
        body.check()
        prompt = body.single_prompt()
        tokenizer = backend.tokenizer
        tokens = tokenizer.encode(prompt) if isinstance(prompt, str) else tuple(prompt)
        echo = ""
        if body.echo:
            echo = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
        response = CompletionResponse(backend.model, echo)
        return await _respond(backend, request, body, tokens, key, response)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatCompletionRequest, request: Request) -> Response:
        key = _authorize(backend, request)
        body.check()
        tokens = backend.tokenizer.chat([{"role": m.role, "content": m.text()} for m in body.messages])
        response = ChatCompletionResponse(backend.model)
        return await _respond(backend, request, body, tokens, key, response)


def _authorize(backend: TextBackend, request: Request) -> str:
    """The request's API key; raises :class:`ApiError` unless the backend accepts it."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        key = ""
    if not backend.accepts_key(key):
        raise ApiError("Invalid API key.", 401)
    return key


def _generation_request(
    backend: TextBackend,
    body: ChatCompletionRequest | CompletionRequest,
    tokens: tuple[int, ...],
) -> GenerationRequest:
    if not backend.accepts_model(body.model):
        raise ApiError(f"The model here is {backend.model!r}.", 404, param="model")
    remaining = backend.max_context - len(tokens)
    if not tokens:
        raise ApiError("The prompt is empty.", param="prompt")
    if remaining <= 0:
        raise ApiError(
            f"The prompt has {len(tokens)} tokens; the model's context holds at most "
            f"{backend.max_context}, output included.",
            param="prompt",
            code="context_length_exceeded",
        )
    default = backend.default_slo
    return GenerationRequest(
        tokens,
        min(body.max_new or backend.default_max_tokens, remaining),
        body.sampling(secrets.randbits(31)),
        Slo(
            body.tokens_per_s or default.tokens_per_s,
            default.ttft_ms if body.ttft_ms is None else body.ttft_ms,
        ),
        () if body.ignore_eos else backend.tokenizer.stop_tokens,
    )


async def _respond(
    backend: TextBackend,
    request: Request,
    body: ChatCompletionRequest | CompletionRequest,
    tokens: tuple[int, ...],
    key: str,
    response: CompletionResponse,
) -> Response:
    asked = _generation_request(backend, body, tokens)
    generation = backend.generate(asked, key)
    text = TextGeneration(generation, backend.tokenizer, tokens, asked.stop_tokens, body.stop_strings)
    pieces = text.pieces()
    try:
        if body.stream:
            # The first piece decides the status: once it is sent, an error can only be an event.
            first = await _unless_disconnected(request, _first(pieces))
            events = _events(response, text, len(tokens), first, pieces, body.include_usage)
            headers = {"cache-control": "no-cache"}
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        whole = await _unless_disconnected(request, _all(pieces))
    except ClientDisconnect:
        return Response(status_code=_CLIENT_CLOSED_REQUEST)
    counts = _usage(text, len(tokens))
    return JSONResponse(response.full(whole, generation.finished, counts, **generation.statistics()))


async def _events(
    response: CompletionResponse,
    text: TextGeneration,
    prompt_tokens: int,
    first: str,
    pieces: AsyncGenerator[str],
    include_usage: bool,
) -> AsyncIterator[str]:
    generation = text.generation
    try:
        if opening := response.opening_chunk():
            yield opening
        if first:
            yield response.chunk(first)
        async for piece in pieces:
            yield response.chunk(piece)
        yield response.final_chunk(generation.finished, **generation.statistics())
        if include_usage:
            yield response.usage_chunk(_usage(text, prompt_tokens))
        yield "data: [DONE]\n\n"
    except WispprofError as err:
        yield event(_api_error(err).body())
    finally:
        # The task of a client that disconnected is cancelled again at every await.
        await asyncio.shield(pieces.aclose())


async def _first(pieces: AsyncGenerator[str]) -> str:
    return await anext(pieces, "")


async def _all(pieces: AsyncGenerator[str]) -> str:
    async with aclosing(pieces):
        return "".join([piece async for piece in pieces])


async def _unless_disconnected(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """The result of ``work``; cancels it and raises ``ClientDisconnect`` if the client disconnects."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task = asyncio.create_task(work, name="completion")
    watch = asyncio.create_task(disconnected(), name="disconnect watch")
    try:
        await asyncio.wait([task, watch], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


def _usage(text: TextGeneration, prompt_tokens: int) -> dict[str, Any]:
    return usage(prompt_tokens, text.completion_tokens, text.generation.cached_tokens)


def _api_error(err: WispprofError) -> ApiError:
    if isinstance(err, ApiError):
        return err
    if isinstance(err, ServerBusy):
        return ApiError(str(err), 429, retry_ms=err.retry_ms)
    if isinstance(err, ServerUnreachable):
        return ApiError(str(err), 503, retry_ms=_UNREACHABLE_RETRY_MS)
    return ApiError(str(err), 502 if isinstance(err, RuntimeFault) else 400)


def _error_response(err: ApiError) -> JSONResponse:
    headers = {}
    if err.status in (429, 503):
        headers["retry-after"] = str(max(1, round(err.retry_ms / 1000.0)))
    return JSONResponse(err.body(), err.status, headers)
