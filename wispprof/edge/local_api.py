"""The edge's local API: OpenAI clients on this device use it like any OpenAI server."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response

from wispprof.edge.edge_runtime import EdgeRuntime, Prompt, Reply, open_edge
from wispprof.edge.playground import add_playground
from wispprof.edge.request_stats import EdgeMetrics
from wispprof.errors import WispprofError
from wispprof.openai_api import ChatTokenizer
from wispprof.openai_api.request_guard import RequestGuard
from wispprof.openai_api.routes import add_openai_routes
from wispprof.server.garbage_collector import calm_garbage_collector
from wispprof.server.web_server import WebServer, bind
from wispprof.settings.edge_settings import EdgeSettings
from wispprof.settings.server_settings import is_loopback
from wispprof.types import GenerationDefaults, GenerationRequest, TokenChunk


async def serve_edge(
    settings: EdgeSettings,
    host: str,
    port: int,
    announce: Callable[[EdgeRuntime, str], None],
    allowed_hosts: Sequence[str] = (),
) -> None:
    """Serve until cancelled or Ctrl-C. Only on loopback: this API asks for no key."""
    if not is_loopback(host):
        raise WispprofError(
            f"Refusing to listen on {host}: this API asks for no key.",
            "Listen on 127.0.0.1; for other machines run `wispprof serve` with an API key.",
        )
    listener = bind(host, port)
    try:
        async with open_edge(settings) as runtime:
            app = make_edge_app(runtime, allowed_hosts)
            web_server = WebServer(app, listener, on_signal=lambda: web_server.request_exit())
            with calm_garbage_collector():
                shown = f"[{host}]" if ":" in host else host
                announce(runtime, f"http://{shown}:{listener.getsockname()[1]}")
                await web_server.serve()
    finally:
        listener.close()


def make_edge_app(runtime: EdgeRuntime, allowed_hosts: Sequence[str] = ()) -> FastAPI:
    """The application: the OpenAI routes, the playground, ``/health``, ``/ready`` and ``/metrics``. Responses
    carry a ``wispprof`` object with the request's statistics. ``allowed_hosts``: as
    :class:`~wispprof.openai_api.request_guard.RequestGuard` has it."""
    app = FastAPI(title="wispprof edge", docs_url=None, redoc_url=None)
    app.add_middleware(RequestGuard, allowed_hosts=allowed_hosts)
    metrics = EdgeMetrics()

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return runtime.status

    @app.get("/ready")
    async def ready() -> JSONResponse:
        status = runtime.status
        return JSONResponse(status, 200 if status["ready"] else 503)

    @app.get("/metrics")
    async def scrape() -> Response:
        metrics.link(runtime.client)
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    backend = EdgeBackend(runtime, metrics)
    add_openai_routes(app, backend)
    add_playground(app, runtime, backend)
    return app


class EdgeBackend:
    """A :class:`~wispprof.openai_api.TextBackend` over an edge's generations. Model, stop tokens, chat
    template and defaults are the target's."""

    def __init__(self, runtime: EdgeRuntime, metrics: EdgeMetrics) -> None:
        self._runtime = runtime
        self._metrics = metrics
        self.default_max_tokens = runtime.settings.max_tokens
        self.default_slo = runtime.settings.slo

    @property
    def tokenizer(self) -> ChatTokenizer:
        return self._runtime.tokenizer

    @property
    def defaults(self) -> GenerationDefaults:
        target = self._runtime.target
        return target.defaults if target is not None else GenerationDefaults()

    @property
    def model(self) -> str:
        return self._runtime.model

    @property
    def identity(self) -> str:
        target = self._runtime.target
        return target.identity if target is not None else ""

    @property
    def max_context(self) -> int:
        return self._runtime.max_context

    def accepts_key(self, api_key: str) -> bool:
        return True

    def accepts_model(self, name: str) -> bool:
        """The target's name, as on the server. Before the first hello nobody knows it."""
        return not name or name == self.model or self._runtime.target is None

    def generate(self, request: GenerationRequest, api_key: str) -> CountedReply:
        prompt = Prompt(
            request.tokens,
            request.max_new,
            request.sampling,
            slo=request.slo,
            stop_tokens=request.stop_tokens,
        )
        reply = CountedReply(self._runtime, prompt, self._metrics)
        reply.drafting = not request.undrafted
        return reply


class CountedReply(Reply):
    """A reply that is counted in the metrics when it ends."""

    def __init__(self, runtime: EdgeRuntime, prompt: Prompt, metrics: EdgeMetrics) -> None:
        super().__init__(runtime, prompt)
        self._metrics = metrics

    def stream(self) -> AsyncGenerator[TokenChunk]:
        return self._metrics.watch(self, super().stream())
