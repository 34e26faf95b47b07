"""The FastAPI application: doors of one verification server."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import FastAPI, Response, WebSocket
from fastapi.responses import JSONResponse

from wispprof import __version__
from wispprof.openai_api.routes import add_openai_routes
from wispprof.server.openai_backend import SessionBackend
from wispprof.server.verification_server import VerificationServer
from wispprof.server.websocket_endpoint import WebSocketEndpoint

__all__ = ["make_app"]

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def make_app(server: VerificationServer, lifespan: Any = None) -> FastAPI:
    """``/v1/split`` for edges; ``/health`` (alive), ``/ready`` (takes requests), ``/metrics``, ``/steps``.

    ``lifespan``: for hosts that leave starting and stopping the server to the application.
    """
    app = FastAPI(
        title="wispprof", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan
    )

    @app.websocket("/v1/split")
    async def split(socket: WebSocket) -> None:
        await WebSocketEndpoint(server, socket).serve()

    @app.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({"status": "ok", "version": __version__})

    @app.get("/ready")
    async def ready() -> JSONResponse:
        body = {
            "ready": server.ready,
            "target": server.model.id,
            "policy": server.policy.name,
            "load_level": server.load_level,
            "sessions": len(server.manager),
        }
        return JSONResponse(body, 200 if server.ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(server.metrics.text(), media_type=METRICS_TYPE)

    @app.get("/steps")
    async def steps(since: int = 0) -> JSONResponse:
        """Steps from number ``since`` on, as far back as they are held; ``next`` is the number to ask for."""
        first, records = server.metrics.steps_since(since)
        return JSONResponse(
            {
                "first": first,
                "next": server.metrics.steps_seen,
                "steps": [asdict(record) for record in records],
            }
        )

    if server.tokenizer is not None:
        add_openai_routes(app, SessionBackend(server, server.tokenizer))
    return app
