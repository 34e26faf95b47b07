"""The FastAPI application of a verification server, and its backend for the OpenAI API.

Every OpenAI request is a server-only session of the engine loop.
"""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request, Response, WebSocket

from wispprof import __version__, protocol
from wispprof.openai_api import ApiError, ChatTokenizer
from wispprof.openai_api.request_guard import RequestGuard
from wispprof.openai_api.routes import add_openai_routes
from wispprof.pages import add_page
from wispprof.server.admission import Refused
from wispprof.server.engine_client import EngineClient, FrontSession
from wispprof.server.frame_checks import check_key
from wispprof.server.websocket_endpoint import WebSocketEndpoint
from wispprof.settings.server_settings import is_loopback
from wispprof.types import GenerationRequest, Slo, TokenChunk

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_STATUS = {"busy": 429, "slo": 429, "limit": 429, "draining": 503, "internal": 500, "frame": 400}


def make_app(server: EngineClient, lifespan: Any = None) -> FastAPI:
    """``/v1/split`` for edges, the OpenAI routes, ``/health``, ``/ready``, ``/metrics``, ``/steps``, and the
    server's page at ``/`` with its data at ``/dashboard``.

    ``lifespan``: for hosts that let the application start and stop the server.
    """
    app = FastAPI(title="wispprof", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    settings = server.settings
    app.add_middleware(
        RequestGuard,
        accepts_key=(lambda key: check_key(key, settings.api_keys)) if settings.api_keys else None,
        allowed_hosts=settings.allowed_hosts,
        max_body_bytes=settings.max_body_bytes,
        monitoring_needs_key=not is_loopback(settings.host),
    )

    @app.websocket("/v1/split")
    async def split(socket: WebSocket) -> None:
        await WebSocketEndpoint(server, socket).serve()

    @app.get("/health")
    async def health() -> Response:
        return await page("health")

    @app.get("/ready")
    async def ready() -> Response:
        return await page("ready")

    @app.get("/metrics")
    async def metrics() -> Response:
        return await page("metrics", METRICS_TYPE)

    @app.get("/steps")
    async def steps(since: int = 0) -> Response:
        """Retained steps from number ``since`` on; ``next``: the ``since`` of the next request."""
        # The channel to the engine process carries 64 bits.
        return await page("steps", argument=min(max(since, 0), 1 << 62))

    @app.get("/steps/{number}")
    async def step(number: int) -> Response:
        """One retained step."""
        return await page("step", argument=min(max(number, 0), 1 << 62))

    @app.get("/dashboard")
    async def dashboard(request: Request, since: int = 0) -> Response:
        """What the server's page shows: state, sessions, and steps from number ``since`` on."""
        answer = await server.query("dashboard", min(max(since, 0), 1 << 62))
        headers = {"cache-control": "no-store", "vary": "accept-encoding"}
        if "gzip" not in request.headers.get("accept-encoding", ""):
            return Response(answer.body, headers=headers, media_type="application/json")
        headers["content-encoding"] = "gzip"
        return Response(gzip.compress(answer.body, 1), headers=headers, media_type="application/json")

    add_page(app, "server")

    async def page(name: str, media_type: str = "application/json", argument: int = 0) -> Response:
        answer = await server.query(name, argument)
        return Response(answer.body, answer.status, media_type=media_type)

    if server.tokenizer is not None:
        add_openai_routes(app, SessionBackend(server, server.tokenizer))
    return app


class SessionBackend:
    """A :class:`~wispprof.openai_api.TextBackend` over one server's sessions."""

    def __init__(self, server: EngineClient, tokenizer: ChatTokenizer) -> None:
        self._server = server
        self.tokenizer = tokenizer.for_target(server.model)
        self.defaults = server.model.defaults
        self.model = server.model.id
        self.identity = server.model.identity
        self.max_context = server.model.max_context
        self.default_max_tokens = server.settings.http_max_tokens
        self.default_slo = Slo.of(server.settings.http_tokens_per_s)

    def accepts_key(self, api_key: str) -> bool:
        return check_key(api_key, self._server.settings.api_keys)

    def accepts_model(self, name: str) -> bool:
        return not name or name == self.model

    def generate(self, request: GenerationRequest, api_key: str) -> SessionGeneration:
        return SessionGeneration(self._server, request, api_key)


class SessionGeneration:
    """One request's session and its listener."""

    kind = "api"

    def __init__(self, server: EngineClient, request: GenerationRequest, api_key: str) -> None:
        self.key = api_key
        self.finished = ""
        self._server = server
        self._request = replace(request, undrafted=True)
        self._updates: asyncio.Queue[protocol.Commit | Refused] = asyncio.Queue()
        self._session: FrontSession | None = None

    @property
    def cached_tokens(self) -> int:
        return self._session.reused if self._session is not None else 0

    def statistics(self) -> dict[str, Any]:
        return {}

    def speculative_decoding(self) -> None:
        """Nobody drafts for an HTTP request."""

    def committed(self, session: FrontSession, frame: protocol.Commit) -> None:
        self._updates.put_nowait(frame)

    def failed(self, session: FrontSession, problem: Refused) -> None:
        self._updates.put_nowait(problem)

    async def stream(self) -> AsyncGenerator[TokenChunk]:
        try:
            self._session = self._server.open(self._request, self)
            while not self.finished:
                update = await self._updates.get()
                if isinstance(update, Refused):
                    raise update
                self.finished = update.finished
                yield TokenChunk(tuple(update.tokens), tuple(update.logprobs))
        except Refused as err:
            raise _api_error(err) from err
        finally:
            if self._session is not None:
                self._server.close(self._session, "stop" if self.finished == "stop" else "abort")


def _api_error(err: Refused) -> ApiError:
    status = _STATUS.get(err.code, 500)
    if err.code == "limit" and not err.retry_ms:
        status = 400  # Waiting does not make a prompt shorter.
    details: dict[str, Any] = {}
    if err.nearest_tokens_per_s:
        details["nearest_tokens_per_s"] = err.nearest_tokens_per_s
    return ApiError(str(err), status, code=err.code, retry_ms=err.retry_ms, **details)
