"""``wispprof serve``: the verification server as a process."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import typer

from wispprof.cli.console import console, fail, note, table
from wispprof.cli.options import with_settings
from wispprof.settings.server_settings import ReplicaSettings, ServerSettings

if TYPE_CHECKING:
    from rich.table import Table

    from wispprof.server import VerificationServer


BUNDLED = "the bundled target"


def register(app: typer.Typer) -> None:
    """Add ``serve`` to the application."""
    app.command()(serve)


@with_settings
def serve(settings: ServerSettings, scaling: ReplicaSettings) -> None:
    """Verify the drafts of many edges with one target model.

    Ctrl-C or SIGTERM drains: the server accepts nothing new, sessions finish, then it ends. A second
    signal ends it at once.
    """
    from wispprof.server import serve as run
    from wispprof.server.process import configure_logging

    for path in (settings.estimator, settings.plan, settings.tls_cert, settings.tls_key):
        if path is not None and not path.exists():
            raise fail(f"There is no file {path}.", "Check the path.")
    configure_logging(settings.log_level, quiet=settings.live)

    def announce(server: VerificationServer, taken: int) -> None:
        console().print(_resolved(server, settings, taken))
        scheme = "wss" if settings.tls_cert is not None else "ws"
        note(f"ready: {scheme}://{settings.host}:{taken}/v1/split (Ctrl-C drains)")

    if scaling.ray:
        _serve_replicas(settings, scaling)
        return
    if settings.tensor_parallel == 1:
        note(f"loading {settings.target or BUNDLED} …")
        run(settings, announce)
        return
    from wispprof.server.process import launch_ranks, serve_ranks

    rank = os.environ.get("RANK")
    if rank is None:
        launch_ranks(settings.tensor_parallel)
        return
    if rank == "0":
        note(f"loading {settings.target or BUNDLED} …")
    serve_ranks(settings, announce)


def _serve_replicas(settings: ServerSettings, scaling: ReplicaSettings) -> None:
    if settings.tensor_parallel > 1:
        raise fail("--ray does not support --tensor-parallel.", "Omit one of them.", code=2)
    if settings.port == 0:
        raise fail("Ray Serve needs a port of its own.", "Give --port.", code=2)
    if settings.live:
        raise fail("--live shows one server; --ray runs several.", "Omit one of them.", code=2)
    from wispprof.server.ray_replicas import serve_replicas

    scheme = "wss" if settings.tls_cert is not None else "ws"

    def announce() -> None:
        note(
            f"ready: {scheme}://{settings.host}:{settings.port}/v1/split, {scaling.replicas} replicas; "
            f"metrics from port {settings.port + 1} on (Ctrl-C ends)"
        )

    note(f"starting {scaling.replicas} replicas of {settings.target or BUNDLED} …")
    serve_replicas(settings, scaling.replicas, announce, max_replicas=scaling.max_replicas)


def _resolved(server: VerificationServer, settings: ServerSettings, port: int) -> Table:
    """What this server obeys, and the origin of each value."""
    if server.step_times.learning:
        estimator = "none given: fitted to this server's own steps"
    else:
        estimator = str(settings.estimator)
    row = server.batch_row
    if row is None:
        limits = f"{settings.max_items} items, {settings.max_tokens} tokens"
        limits += f", prefill chunk {settings.prefill_chunk}"
    else:
        limits = (
            f"{row.max_items} items, {row.token_budget} tokens, prefill chunk {row.prefill_chunk}"
        )
        limits += (
            f" (plan row {row.tokens_per_s:g} tokens/s, load {row.load_level}; adapts to load)"
        )
    rows: dict[str, Any] = {
        "target": f"{server.model.id} ({settings.dtype}, context {server.model.max_context})",
        "tokenizer": server.model.tokenizer[:16] or "none",
        "policy": f"{server.policy.name} ({'stream' if server.policy.stream else 'round'} mode)",
        "estimator": estimator,
        "plan": f"{settings.plan} ({server.plan.hash[:12]})" if server.plan else "none",
        "step log": str(settings.step_log or "none"),
        "KV cache": f"{server.manager.kv_total} tokens",
        "ranks": settings.tensor_parallel,
        "address": f"{settings.host}:{port}{' (TLS)' if settings.tls_cert else ''}",
        "API keys": len(settings.api_keys) or "none (loopback only)",
        "step limits": limits,
    }
    return table("wispprof serve", "setting|value", rows.items())
