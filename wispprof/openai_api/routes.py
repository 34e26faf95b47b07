"""The OpenAI routes: ``/v1/models``, ``/v1/completions`` and ``/v1/chat/completions``."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from wispprof.errors import WispprofError
from wispprof.openai_api.api_error import ApiError
from wispprof.openai_api.choice_stream import ChoicePiece, ChoiceStream
from wispprof.openai_api.prepared_request import PreparedRequest, prepare
from wispprof.openai_api.request_body import ChatCompletionRequest, CompletionRequest, RequestBody
from wispprof.openai_api.request_fields import CHAT, COMPLETIONS
from wispprof.openai_api.request_guard import bearer_key, invalid_key
from wispprof.openai_api.response_body import DONE, HEARTBEAT, Choice, event, usage
from wispprof.openai_api.text_backend import TextBackend

log = logging.getLogger("wispprof.openai_api")

_CLIENT_CLOSED_REQUEST = 499
_LONG_BODY = 1 << 16
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class StreamTiming:
    """When a stream without tokens says something. ``headers_s``: how long an error may still set the status;
    then the headers leave. ``heartbeat_s``: time between two SSE comments."""

    headers_s: float = 1.0
    heartbeat_s: float = 10.0


def add_openai_routes(app: FastAPI, backend: TextBackend, timing: StreamTiming | None = None) -> None:
    """Mount the routes on ``app``, and OpenAI's error format for all its routes."""
    # Parsing, templating and tokenizing take milliseconds to seconds; steps and commits go on meanwhile.
    # Detokenizing a token takes 2 microseconds, less than handing it to a thread, and stays on the loop.
    # A prompt of megabytes takes a thread for seconds, so such requests wait for each other only.
    short, long = (ThreadPoolExecutor(1, thread_name_prefix=f"{size} prompts") for size in ("short", "long"))
    timing = timing or StreamTiming()
    _add_error_format(app)

    def entry() -> dict[str, Any]:
        found = {
            "id": backend.model,
            "object": "model",
            "created": 0,
            "owned_by": "wispprof",
            "max_model_len": backend.max_context,
        }
        return {**found, "identity": backend.identity} if backend.identity else found

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        _authorize(backend, request)
        return {"object": "list", "data": [entry()]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str, request: Request) -> dict[str, Any]:
        _authorize(backend, request)
        if model != backend.model:
            message = f"The model {model[:100]!r} does not exist; the model here is {backend.model!r}."
            raise ApiError(message, 404, param="model", code="model_not_found")
        return entry()

    async def respond(request: Request, endpoint: str) -> Response:
        key = _authorize(backend, request)
        try:
            data = await request.body()
            work = functools.partial(prepare, data, endpoint, backend)
            thread = short if len(data) < _LONG_BODY else long
            prepared = await asyncio.get_running_loop().run_in_executor(thread, work)
            return await _respond(backend, request, prepared, key, timing)
        except ClientDisconnect:
            return Response(status_code=_CLIENT_CLOSED_REQUEST)

    @app.post("/v1/completions", response_model=None, openapi_extra=_body_schema(CompletionRequest))
    async def completions(request: Request) -> Response:
        return await respond(request, COMPLETIONS)

    @app.post("/v1/chat/completions", response_model=None, openapi_extra=_body_schema(ChatCompletionRequest))
    async def chat(request: Request) -> Response:
        return await respond(request, CHAT)


def _add_error_format(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, err: RequestValidationError) -> JSONResponse:
        first = err.errors()[0]
        field = ".".join(str(part) for part in first["loc"][1:])
        return _error_response(ApiError(f"{field}: {first['msg']}", param=field or None))

    @app.exception_handler(WispprofError)
    async def refused(_: Request, err: WispprofError) -> JSONResponse:
        return _error_response(ApiError.of(err))

    @app.exception_handler(HTTPException)
    async def http(request: Request, err: HTTPException) -> JSONResponse:
        message = f"{err.detail}: {request.method} {request.url.path[:200]}"
        return JSONResponse(ApiError(message, err.status_code).body(), err.status_code, err.headers)

    @app.exception_handler(Exception)
    async def failed(_: Request, err: Exception) -> JSONResponse:
        # The framework logs the traceback after this.
        return _error_response(ApiError("Internal error.", 500))


def _body_schema(model: type[RequestBody]) -> dict[str, Any]:
    schema = model.model_json_schema()
    answers = {
        "400": {"description": "A field is unknown, not supported or invalid."},
        "401": {"description": "Invalid API key."},
        "404": {"description": "Another model."},
        "413": {"description": "The body is too large."},
        "429": {"description": "Not admitted now."},
        "499": {"description": "The client closed the connection."},
        "502": {"description": "The server refused what the edge asked for."},
        "503": {"description": "No server, or it is shutting down."},
    }
    content = {"application/json": {"schema": schema}}
    return {"requestBody": {"required": True, "content": content}, "responses": answers}


def _authorize(backend: TextBackend, request: Request) -> str:
    """The request's API key; raises :class:`ApiError` unless the backend accepts it."""
    key = bearer_key(request.headers)
    if not backend.accepts_key(key):
        raise invalid_key(key)
    return key


async def _respond(
    backend: TextBackend, request: Request, prepared: PreparedRequest, key: str, timing: StreamTiming
) -> Response:
    choices = prepared.choices(backend, key)
    stream = ChoiceStream(choices)
    if prepared.body.stream:
        try:
            # An error known by now, such as a refusal, sets the status. Later it can only be an event.
            first = await _unless_disconnected(request, stream.next(timing.headers_s))
        except TimeoutError:
            first = None
        except BaseException:
            await asyncio.shield(stream.close())
            raise
        events = _events(prepared, choices, stream, first, timing.heartbeat_s)
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)
    try:
        await _unless_disconnected(request, _read_all(stream))
    finally:
        await asyncio.shield(stream.close())
    return JSONResponse(prepared.response.full(choices))


async def _read_all(stream: ChoiceStream) -> None:
    while (found := await stream.next()) is not None:
        if found.piece is not None:
            found.choice.pieces.append(found.piece)


async def _events(
    prepared: PreparedRequest,
    choices: list[Choice],
    stream: ChoiceStream,
    found: ChoicePiece | None,
    heartbeat_s: float,
) -> AsyncIterator[str]:
    body, response = prepared.body, prepared.response
    try:
        opening = "".join(response.opening_chunk(choice) for choice in choices)
        if opening or found is None:
            yield opening or HEARTBEAT
        while True:
            if found is None:
                try:
                    found = await stream.next(heartbeat_s)
                except TimeoutError:
                    yield HEARTBEAT
                    continue
                if found is None:
                    break
            choice, piece = found
            found = None
            counts = usage([choice]) if body.continuous_usage else None
            made = response.final_chunk(choice, counts) if piece is None else ""
            if piece is not None:
                made = response.chunk(choice, piece, counts)
            if made:
                yield made
        if body.include_usage:
            yield response.usage_chunk(choices)
        yield DONE
    except WispprofError as err:
        yield event(ApiError.of(err).body())
    except Exception:
        log.exception("a response failed after its headers")
        yield event(ApiError("Internal error.", 500).body())
    finally:
        # The task of a client that disconnected is cancelled again at every await.
        await asyncio.shield(stream.close())


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


def _error_response(err: ApiError) -> JSONResponse:
    return JSONResponse(err.body(), err.status, err.headers())
