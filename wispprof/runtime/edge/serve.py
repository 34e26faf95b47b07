"""The local API of an edge: any OpenAI client on this device talks to it and never sees the split."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse

from wispprof.errors import RuntimeFault, ServerBusy, ServerUnreachable, WispprofError
from wispprof.runtime.edge.house import EdgeHouse, EdgeSettings, Prompt, Reply, open_edge
from wispprof.runtime.edge.metrics import EdgeMetrics
from wispprof.runtime.edge.openai import ApiError, ChatRequest, CompletionRequest, error_body
from wispprof.runtime.server.run import bind

__all__ = ["make_edge_app", "serve_edge"]


async def serve_edge(
    settings: EdgeSettings,
    host: str,
    port: int,
    announce: Callable[[EdgeHouse, str], None],
) -> None:
    """Serve until cancelled or Ctrl-C. Only on loopback: this API asks for no key."""
    _refuse_beyond_loopback(host)
    listener = bind(host, port)
    try:
        async with open_edge(settings) as house:
            config = uvicorn.Config(
                make_edge_app(house), log_config=None, access_log=False, lifespan="off"
            )
            shown = f"[{host}]" if ":" in host else host
            announce(house, f"http://{shown}:{listener.getsockname()[1]}")
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


def make_edge_app(house: EdgeHouse) -> FastAPI:
    """The application: ``/v1/chat/completions``, ``/v1/completions``, ``/v1/models``, ``/health``,
    ``/metrics``. Answers carry a ``wispprof`` object with the request's statistics."""
    app = FastAPI(title="wispprof edge", docs_url=None, redoc_url=None)
    metrics = EdgeMetrics()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, fault: RequestValidationError) -> JSONResponse:
        first = fault.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        return JSONResponse(error_body(f"{where}: {first['msg']}", param=where or None), 400)

    @app.exception_handler(WispprofError)
    async def refused(_: Request, fault: WispprofError) -> JSONResponse:
        status, headers = _status(fault)
        kind = "invalid_request_error" if status < 500 else "server_error"
        body = error_body(str(fault), kind, getattr(fault, "param", None))
        return JSONResponse(body, status, headers)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "link": house.client.up, "rtt_ms": house.client.rtt.mean_ms}

    @app.get("/metrics")
    async def scrape() -> Response:
        metrics.link(house.client)
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        entry = {"id": house.model, "object": "model", "created": 0, "owned_by": "wispprof"}
        return {"object": "list", "data": [entry]}

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest) -> Response | dict[str, Any]:
        body.check()
        tokens = _prompt_tokens(house, body)
        prompt = _prompt(house, tokens, body.max_tokens, body)
        echo = body.prompt if body.echo and isinstance(body.prompt, str) else ""
        return await _respond(house, metrics, body, prompt, _Completion(house.model, echo))

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest) -> Response | dict[str, Any]:
        body.check()
        said = [{"role": m.role, "content": m.text()} for m in body.messages]
        most = body.max_completion_tokens or body.max_tokens
        prompt = _prompt(house, house.chat(said), most, body)
        return await _respond(house, metrics, body, prompt, _Chat(house.model))

    return app


def _status(fault: WispprofError) -> tuple[int, dict[str, str]]:
    if isinstance(fault, ApiError):
        return fault.status, {}
    if isinstance(fault, ServerBusy):
        return 429, {"retry-after": str(max(1, round(fault.retry_ms / 1000.0)))}
    if isinstance(fault, ServerUnreachable):
        return 503, {"retry-after": "5"}
    return (502 if isinstance(fault, RuntimeFault) else 400), {}


def _prompt_tokens(house: EdgeHouse, body: CompletionRequest) -> tuple[int, ...]:
    given = body.prompt
    if isinstance(given, str):
        return house.encode(given)
    if given and isinstance(given[0], int):
        return tuple(given)
    if len(given) != 1:
        raise ApiError("One prompt per request.", param="prompt")
    only = given[0]
    return house.encode(only) if isinstance(only, str) else tuple(only)  # type: ignore[arg-type]


def _prompt(
    house: EdgeHouse,
    tokens: tuple[int, ...],
    most: int | None,
    body: ChatRequest | CompletionRequest,
) -> Prompt:
    room = house.max_context - len(tokens)
    if not tokens or room <= 0:
        raise ApiError(
            f"The prompt has {len(tokens)} tokens; the model's context holds {house.max_context}.",
            param="prompt",
        )
    count = min(most or house.settings.max_tokens, room)
    sampling = body.sampling(secrets.randbits(31))
    return Prompt(tokens, count, sampling, body.stops())


# --- answers --------------------------------------------------------------------------------------


class _Completion:
    """How a completion looks, whole and in pieces."""

    kind, piece_kind = "text_completion", "text_completion"

    def __init__(self, model: str, echo: str = "") -> None:
        self.model = model
        self.echo = echo
        self.id = f"cmpl-{secrets.token_hex(12)}"
        self.created = int(time.time())

    def head(self, streamed: bool) -> dict[str, Any]:
        kind = self.piece_kind if streamed else self.kind
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def whole(self, text: str, finished: str) -> dict[str, Any]:
        return self._choice({"text": self.echo + text}, finished)

    def first(self) -> list[dict[str, Any]]:
        return [self.piece(self.echo)] if self.echo else []

    def piece(self, text: str) -> dict[str, Any]:
        return self._choice({"text": text}, None)

    def last(self, finished: str) -> dict[str, Any]:
        return self._choice({"text": ""}, finished)

    @staticmethod
    def _choice(content: dict[str, Any], finished: str | None) -> dict[str, Any]:
        return {"index": 0, **content, "logprobs": None, "finish_reason": finished}


class _Chat(_Completion):
    kind, piece_kind = "chat.completion", "chat.completion.chunk"

    def __init__(self, model: str) -> None:
        super().__init__(model)
        self.id = f"chatcmpl-{secrets.token_hex(12)}"

    def whole(self, text: str, finished: str) -> dict[str, Any]:
        return self._choice({"message": {"role": "assistant", "content": text}}, finished)

    def first(self) -> list[dict[str, Any]]:
        return [self._choice({"delta": {"role": "assistant", "content": ""}}, None)]

    def piece(self, text: str) -> dict[str, Any]:
        return self._choice({"delta": {"content": text}}, None)

    def last(self, finished: str) -> dict[str, Any]:
        return self._choice({"delta": {}}, finished)


async def _respond(
    house: EdgeHouse,
    metrics: EdgeMetrics,
    body: ChatRequest | CompletionRequest,
    prompt: Prompt,
    form: _Completion,
) -> Response | dict[str, Any]:
    reply = house.reply(prompt)
    pieces = metrics.watch(reply)
    # The first piece decides whether this is an answer or an error: afterwards the status is sent.
    first = await anext(pieces, None)
    if body.stream:
        events = _events(form, reply, prompt, first, pieces, body.wants_usage)
        return StreamingResponse(events, media_type="text/event-stream")
    text = (first or "") + "".join([piece async for piece in pieces])
    return {
        **form.head(False),
        "choices": [form.whole(text, _reason(reply))],
        "usage": _usage(prompt, reply),
        "wispprof": _extra(reply),
    }


async def _events(
    form: _Completion,
    reply: Reply,
    prompt: Prompt,
    first: str | None,
    pieces: AsyncGenerator[str],
    usage: bool,
) -> AsyncIterator[str]:
    def event(choice: dict[str, Any], **more: Any) -> str:
        return f"data: {json.dumps({**form.head(True), 'choices': [choice], **more})}\n\n"

    try:
        for choice in form.first():
            yield event(choice)
        if first:
            yield event(form.piece(first))
        async for piece in pieces:
            yield event(form.piece(piece))
        yield event(form.last(_reason(reply)), wispprof=_extra(reply))
        if usage:
            body = {**form.head(True), "choices": [], "usage": _usage(prompt, reply)}
            yield f"data: {json.dumps(body)}\n\n"
        yield "data: [DONE]\n\n"
    except WispprofError as fault:
        yield f"data: {json.dumps(error_body(str(fault), 'server_error'))}\n\n"
    finally:
        await asyncio.shield(pieces.aclose())


def _reason(reply: Reply) -> str:
    return "stop" if reply.finished == "stop" else "length"


def _usage(prompt: Prompt, reply: Reply) -> dict[str, int]:
    asked, made = len(prompt.tokens), len(reply.tokens)
    return {"prompt_tokens": asked, "completion_tokens": made, "total_tokens": asked + made}


def _extra(reply: Reply) -> dict[str, Any]:
    return {"verified": reply.verified, **reply.stats.summary()}
