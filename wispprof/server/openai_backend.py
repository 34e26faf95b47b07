"""The OpenAI door: the target alone, server-only, through the same engine and the same step loop."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse

from wispprof.errors import WispprofError
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
from wispprof.openai_api.text import ChatTokenizer, StopScanner, TextStream
from wispprof.server.admission import Refused
from wispprof.server.request_validation import check_key
from wispprof.server.session import ServerSession, SessionRequest
from wispprof.server.verification_server import VerificationServer
from wispprof.sessions.commit_result import CommitResult
from wispprof.types import Slo

__all__ = ["add_openai"]

_STATUS = {"busy": 429, "slo": 429, "limit": 429, "draining": 503, "internal": 500, "frame": 400}


def add_openai(app: FastAPI, server: VerificationServer, text: ChatTokenizer) -> None:
    """Add ``/v1/models``, ``/v1/completions`` and ``/v1/chat/completions``.

    Beside OpenAI's own fields a request may state its SLO: ``tokens_per_s`` and ``ttft_ms``. What cannot
    be kept is refused with status 429, ``retry-after``, and the speed that can be.
    """

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, err: RequestValidationError) -> JSONResponse:
        first = err.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        return JSONResponse(error_body(f"{where}: {first['msg']}", param=where or None), 400)

    @app.exception_handler(WispprofError)
    async def refused(_: Request, err: WispprofError) -> JSONResponse:
        return _refusal(err)

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        _authorise(server, request)
        entry = {"id": server.model.id, "object": "model", "created": 0, "owned_by": "wispprof"}
        return {"object": "list", "data": [{**entry, "max_model_len": server.model.max_context}]}

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        key = _authorise(server, request)
        tokens = _prompt_tokens(text, body)
        echo = text.tokenizer.decode(list(tokens)) if body.echo else ""
        answer = CompletionAnswer(server.model.id, echo)
        return await _respond(server, text, body, request, key, tokens, body.max_tokens, answer)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Response:
        key = _authorise(server, request)
        tokens = text.chat([{"role": m.role, "content": m.text()} for m in body.messages])
        most = body.max_completion_tokens or body.max_tokens
        answer = ChatAnswer(server.model.id)
        return await _respond(server, text, body, request, key, tokens, most, answer)


def _authorise(server: VerificationServer, request: Request) -> str:
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        key = ""
    if not check_key(key, server.settings.api_keys):
        raise ApiError("The API key is not known here.", status=401)
    return key


def _refusal(err: WispprofError) -> JSONResponse:
    if isinstance(err, ApiError):
        kind = "authentication_error" if err.status == 401 else "invalid_request_error"
        return JSONResponse(error_body(str(err), kind, err.param), err.status)
    if not isinstance(err, Refused):
        return JSONResponse(error_body(str(err), "server_error"), 500)
    status = _STATUS.get(err.code, 500)
    if err.code == "limit" and not err.retry_ms:
        status = 400  # no waiting makes a prompt shorter
    body = error_body(str(err), "invalid_request_error" if status == 400 else "rate_limit_error")
    body["error"]["code"] = err.code
    if err.nearest_tokens_per_s:
        body["error"]["nearest_tokens_per_s"] = err.nearest_tokens_per_s
    headers = {}
    if status in (429, 503):
        headers["retry-after"] = str(max(1, round(err.retry_ms / 1000.0)))
    return JSONResponse(body, status, headers)


def _prompt_tokens(text: ChatTokenizer, body: CompletionRequest) -> tuple[int, ...]:
    given = body.one_prompt()
    return text.encode(given) if isinstance(given, str) else tuple(given)


def _request(
    server: VerificationServer,
    text: ChatTokenizer,
    body: ChatRequest | CompletionRequest,
    tokens: tuple[int, ...],
    most: int | None,
) -> SessionRequest:
    body.check()
    more = body.model_extra or {}
    try:
        speed = float(more.get("tokens_per_s", server.settings.http_tokens_per_s))
        ttft = more.get("ttft_ms")
        slo = Slo(speed, None if ttft is None else float(ttft))
    except (TypeError, ValueError) as err:
        raise ApiError(f"Bad SLO: {err}", param="tokens_per_s") from err
    if body.model and body.model != server.model.id:
        raise ApiError(f"The model here is {server.model.id!r}.", status=404, param="model")
    return SessionRequest(
        tokens=tokens,
        max_new=most or server.settings.http_max_tokens,
        slo=slo,
        sampling=body.sampling(secrets.randbits(31)),
        stop=() if more.get("ignore_eos") else text.stop_tokens,
        undrafted=True,
    )


class _Generation:
    """One request's session, as its owner; iterate over :meth:`pieces` for the text."""

    def __init__(self, server: VerificationServer, text: ChatTokenizer, key: str) -> None:
        self.key = key
        self.tokens: list[int] = []
        self.finished = ""
        self._server = server
        self._text = text
        self._news: asyncio.Queue[CommitResult | Refused] = asyncio.Queue()
        self.session: ServerSession | None = None

    def open(self, request: SessionRequest) -> None:
        self.session = self._server.open(request, self)
        self._request = request

    def committed(
        self, session: ServerSession, commit: CommitResult, verify_ms: float, load_level: int
    ) -> None:
        self._news.put_nowait(commit)

    def failed(
        self, session: ServerSession, code: str, message: str, retry_ms: float = 0.0
    ) -> None:
        self._news.put_nowait(Refused(code, message, retry_ms=retry_ms))

    @property
    def usage(self) -> dict[str, Any]:
        reused = self.session.reused if self.session is not None else 0
        return usage(len(self._request.tokens), len(self.tokens), reused)

    async def pieces(self, stops: tuple[str, ...]) -> AsyncGenerator[str]:
        """Text as it is committed; closes the session whichever way it is left."""
        stream = TextStream(self._text.tokenizer, self._request.tokens)
        scanner = StopScanner(stops)
        reason = "abort"
        try:
            while not self.finished:
                news = await self._news.get()
                if isinstance(news, Refused):
                    raise news
                self.tokens.extend(news.tokens)
                shown = news.tokens[:-1] if news.finished == "stop" else news.tokens
                piece = scanner.push(stream.push(shown))
                if piece:
                    yield piece
                self.finished = news.finished
                if scanner.hit:
                    self.finished = reason = "stop"
                    return
            rest = scanner.push(stream.finish()) + scanner.finish()
            if scanner.hit:
                self.finished = "stop"
            if rest:
                yield rest
        finally:
            if self.session is not None:
                self._server.close(self.session, reason)

    @property
    def reason(self) -> str:
        """OpenAI's finish reason: a full context counts as ``length``."""
        return "stop" if self.finished == "stop" else "length"


async def _respond(
    server: VerificationServer,
    text: ChatTokenizer,
    body: ChatRequest | CompletionRequest,
    request: Request,
    key: str,
    tokens: tuple[int, ...],
    most: int | None,
    answer: CompletionAnswer,
) -> Response:
    generation = _Generation(server, text, key)
    generation.open(_request(server, text, body, tokens, most))
    pieces = generation.pieces(body.stops())
    if body.stream:
        return StreamingResponse(
            _events(generation, pieces, answer, body.wants_usage),
            media_type="text/event-stream",
            headers={"cache-control": "no-cache"},
        )
    whole = await unless_gone(request, pieces)
    if whole is None:
        return Response(status_code=499)
    return JSONResponse(answer.whole(whole, generation.reason, generation.usage))


async def _events(
    generation: _Generation,
    pieces: AsyncGenerator[str],
    answer: CompletionAnswer,
    wants_usage: bool,
) -> AsyncIterator[str]:
    async with aclosing(pieces):
        try:
            if first := answer.first():
                yield first
            async for piece in pieces:
                yield answer.piece(piece)
            yield answer.last(generation.reason)
            if wants_usage:
                yield answer.counted(generation.usage)
            yield "data: [DONE]\n\n"
        except Refused as err:
            yield event(error_body(str(err), "server_error"))
