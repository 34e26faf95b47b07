"""The local API of an edge: any OpenAI client on this device talks to it and never sees the split."""

from __future__ import annotations

import asyncio
import ipaddress
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse

from wispprof.edge.edge_metrics import EdgeMetrics
from wispprof.edge.edge_runtime import EdgeRuntime, Prompt, Reply, open_edge
from wispprof.errors import RuntimeFault, ServerBusy, ServerUnreachable, WispprofError
from wispprof.openai_api.client_disconnect import unless_gone
from wispprof.openai_api.openai_protocol import (
    ApiError,
    ChatAnswer,
    ChatRequest,
    CompletionAnswer,
    CompletionRequest,
    error_body,
    event,
    usage,
)
from wispprof.server.process import bind, freeze_garbage_collector
from wispprof.settings.edge_settings import EdgeSettings

__all__ = ["make_edge_app", "serve_edge"]


async def serve_edge(
    settings: EdgeSettings,
    host: str,
    port: int,
    announce: Callable[[EdgeRuntime, str], None],
) -> None:
    """Serve until cancelled or Ctrl-C. Only on loopback: this API asks for no key."""
    _refuse_beyond_loopback(host)
    listener = bind(host, port)
    try:
        async with open_edge(settings) as runtime:
            config = uvicorn.Config(
                make_edge_app(runtime), log_config=None, access_log=False, lifespan="off"
            )
            freeze_garbage_collector()
            shown = f"[{host}]" if ":" in host else host
            announce(runtime, f"http://{shown}:{listener.getsockname()[1]}")
            await uvicorn.Server(config).serve(sockets=[listener])
    finally:
        listener.close()


def _refuse_beyond_loopback(host: str) -> None:
    try:
        safe = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        safe = False
    if not safe:
        raise WispprofError(
            f"Refusing to listen on {host}: this API asks for no key.",
            "Listen on 127.0.0.1; for other machines run `wispprof serve` with an API key.",
        )


def make_edge_app(runtime: EdgeRuntime) -> FastAPI:
    """The application: ``/v1/chat/completions``, ``/v1/completions``, ``/v1/models``, ``/health``,
    ``/metrics``. Answers carry a ``wispprof`` object with the request's statistics."""
    app = FastAPI(title="wispprof edge", docs_url=None, redoc_url=None)
    metrics = EdgeMetrics()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, err: RequestValidationError) -> JSONResponse:
        first = err.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        return JSONResponse(error_body(f"{where}: {first['msg']}", param=where or None), 400)

    @app.exception_handler(WispprofError)
    async def refused(_: Request, err: WispprofError) -> JSONResponse:
        status, headers = _status(err)
        kind = "invalid_request_error" if status < 500 else "server_error"
        body = error_body(str(err), kind, getattr(err, "param", None))
        return JSONResponse(body, status, headers)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "link": runtime.client.up, "rtt_ms": runtime.client.rtt.mean_ms}

    @app.get("/metrics")
    async def scrape() -> Response:
        metrics.link(runtime.client)
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        entry = {"id": runtime.model, "object": "model", "created": 0, "owned_by": "wispprof"}
        return {"object": "list", "data": [entry]}

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response | dict[str, Any]:
        body.check()
        tokens = _prompt_tokens(runtime, body)
        prompt = _prompt(runtime, tokens, body.max_tokens, body)
        echo = body.prompt if body.echo and isinstance(body.prompt, str) else ""
        answer = CompletionAnswer(runtime.model, echo)
        return await _respond(runtime, metrics, body, request, prompt, answer)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Response | dict[str, Any]:
        body.check()
        said = [{"role": m.role, "content": m.text()} for m in body.messages]
        most = body.max_completion_tokens or body.max_tokens
        prompt = _prompt(runtime, runtime.chat(said), most, body)
        answer = ChatAnswer(runtime.model)
        return await _respond(runtime, metrics, body, request, prompt, answer)

    return app


def _status(err: WispprofError) -> tuple[int, dict[str, str]]:
    if isinstance(err, ApiError):
        return err.status, {}
    if isinstance(err, ServerBusy):
        return 429, {"retry-after": str(max(1, round(err.retry_ms / 1000.0)))}
    if isinstance(err, ServerUnreachable):
        return 503, {"retry-after": "5"}
    return (502 if isinstance(err, RuntimeFault) else 400), {}


def _prompt_tokens(runtime: EdgeRuntime, body: CompletionRequest) -> tuple[int, ...]:
    given = body.one_prompt()
    return runtime.encode(given) if isinstance(given, str) else tuple(given)


def _prompt(
    runtime: EdgeRuntime,
    tokens: tuple[int, ...],
    most: int | None,
    body: ChatRequest | CompletionRequest,
) -> Prompt:
    room = runtime.max_context - len(tokens)
    if not tokens or room <= 0:
        raise ApiError(
            f"The prompt has {len(tokens)} tokens; the model's context holds {runtime.max_context}.",
            param="prompt",
        )
    count = min(most or runtime.settings.max_tokens, room)
    sampling = body.sampling(secrets.randbits(31))
    return Prompt(tokens, count, sampling, body.stops())


# --- answers --------------------------------------------------------------------------------------


async def _respond(
    runtime: EdgeRuntime,
    metrics: EdgeMetrics,
    body: ChatRequest | CompletionRequest,
    request: Request,
    prompt: Prompt,
    answer: CompletionAnswer,
) -> Response | dict[str, Any]:
    reply = runtime.reply(prompt)
    pieces = metrics.watch(reply)
    if not body.stream:
        text = await unless_gone(request, pieces)
        if text is None:
            return Response(status_code=499)
        return answer.whole(text, _reason(reply), _usage(prompt, reply), wispprof=_extra(reply))
    # The first piece decides whether this is an answer or an error: afterwards the status is sent.
    first = await anext(pieces, None)
    events = _events(answer, reply, prompt, first, pieces, body.wants_usage)
    return StreamingResponse(events, media_type="text/event-stream")


async def _events(
    answer: CompletionAnswer,
    reply: Reply,
    prompt: Prompt,
    first: str | None,
    pieces: AsyncGenerator[str],
    wants_usage: bool,
) -> AsyncIterator[str]:
    try:
        if opening := answer.first():
            yield opening
        if first:
            yield answer.piece(first)
        async for piece in pieces:
            yield answer.piece(piece)
        yield answer.last(_reason(reply), wispprof=_extra(reply))
        if wants_usage:
            yield answer.counted(_usage(prompt, reply))
        yield "data: [DONE]\n\n"
    except WispprofError as err:
        yield event(error_body(str(err), "server_error"))
    finally:
        await asyncio.shield(pieces.aclose())


def _reason(reply: Reply) -> str:
    return "stop" if reply.finished == "stop" else "length"


def _usage(prompt: Prompt, reply: Reply) -> dict[str, Any]:
    return usage(len(prompt.tokens), len(reply.tokens))


def _extra(reply: Reply) -> dict[str, Any]:
    return {"verified": reply.verified, **reply.stats.summary()}
