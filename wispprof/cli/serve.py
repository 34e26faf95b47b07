"""``wispprof serve``: the verification server as a process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wispprof.cli.common import fail, note, table

if TYPE_CHECKING:
    from rich.table import Table

    from wispprof.server import VerificationServer
    from wispprof.settings.server_settings import ServerSettings

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add ``serve`` to the application."""
    app.command()(serve)


def serve(
    target: Annotated[
        str,
        typer.Option(help="Target model: folder or hub id. Default: the bundled pair's target."),
    ] = "",
    target_id: Annotated[str, typer.Option(help="Name that edges may ask for.")] = "",
    estimator: Annotated[
        Path | None,
        typer.Option(help="Fitted estimator; without one the server calibrates itself."),
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="Plan whose batching table is obeyed.")] = None,
    step_log: Annotated[
        Path | None,
        typer.Option(help="Append every step's shape and time, for `wispprof fit --update`."),
    ] = None,
    policy: Annotated[str, typer.Option(help="Batching policy.")] = "wispprof",
    host: Annotated[str, typer.Option(help="Beyond loopback an API key is needed.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8200,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File of API keys, one per line.")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain (PEM).")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key (PEM).")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    backend: Annotated[str, typer.Option(help="Attention backend: auto, dense or paged.")] = "auto",
    tensor_parallel: Annotated[
        int, typer.Option(min=1, help="Processes, one per device, that share the target.")
    ] = 1,
    ray: Annotated[
        bool, typer.Option("--ray", help="Replicas behind one address, by Ray Serve.")
    ] = False,
    replicas: Annotated[int, typer.Option(min=1, help="Servers that --ray starts.")] = 1,
    most_replicas: Annotated[
        int, typer.Option(min=0, help="Most that --ray adds by load level; 0: no more.")
    ] = 0,
    kv_tokens: Annotated[
        int, typer.Option(min=0, help="KV cache in tokens; 0: by free memory.")
    ] = 0,
    max_items: Annotated[int, typer.Option(min=1, help="Most sessions in a step.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most new tokens in a step.")] = 1024,
    prefill_chunk: Annotated[int, typer.Option(min=1, help="Most prompt tokens in a step.")] = 256,
    max_drafts: Annotated[int, typer.Option(min=1, max=64, help="Lead an edge may take.")] = 32,
    max_sessions: Annotated[int, typer.Option(min=1, help="Most sessions at a time.")] = 1024,
    sessions_per_key: Annotated[int, typer.Option(min=1, help="Most sessions of one key.")] = 1024,
    coalesce_ms: Annotated[
        float,
        typer.Option(min=0.0, help="How long frames may lie unread during a step; 0: not at all."),
    ] = 8.0,
    admit: Annotated[
        str, typer.Option(help="slo: refuse promises that cannot be kept; all: refuse none.")
    ] = "slo",
    live: Annotated[bool, typer.Option("--live", help="Show queue, steps and attainment.")] = False,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Verify the drafts of many edges with one target model.

    Ctrl-C or SIGTERM drains: nothing new is taken, sessions finish, then the server ends. A second
    signal ends it at once.
    """
    from wispprof.server import serve as run
    from wispprof.server.json_logging import configure_logging
    from wispprof.settings.server_settings import ServerSettings, read_api_keys

    for path in (api_key_file, estimator, plan, tls_cert, tls_key):
        if path is not None and not path.exists():
            raise fail(f"There is no file {path}.", "Check the path.")
    keys = read_api_keys(api_key_file) if api_key_file is not None else ()
    try:
        settings = ServerSettings(
            target=target or _bundled_target(),
            target_id=target_id,
            estimator=estimator,
            plan=plan,
            step_log=step_log,
            policy=policy,
            host=host,
            port=port,
            api_keys=keys,
            tls_cert=tls_cert,
            tls_key=tls_key,
            device=device,
            dtype=dtype,
            backend=backend,
            tensor_parallel=tensor_parallel,
            kv_tokens=kv_tokens,
            max_items=max_items,
            max_tokens=max_tokens,
            prefill_chunk=prefill_chunk,
            max_drafts=max_drafts,
            max_sessions=max_sessions,
            sessions_per_key=sessions_per_key,
            coalesce_ms=coalesce_ms,
            admit=admit,
            live=live,
            log_level=log_level,
        )
    except ValueError as err:
        raise fail(str(err), "Correct the option.", code=2) from err
    configure_logging(log_level, quiet=live)

    def announce(server: VerificationServer, taken: int) -> None:
        from wispprof.cli.common import console

        console().print(_resolved(server, settings, taken))
        scheme = "wss" if settings.tls_cert is not None else "ws"
        note(f"ready: {scheme}://{settings.host}:{taken}/v1/split (Ctrl-C drains)")

    if ray:
        _serve_replicas(settings, replicas, most_replicas)
        return
    if tensor_parallel == 1:
        note(f"loading {settings.target} …")
        run(settings, announce)
        return
    from wispprof.server import rank_server

    if not rank_server.started_by_torchrun():
        rank_server.launch(tensor_parallel)
        return
    if rank_server.is_rank0():
        note(f"loading {settings.target} …")
    rank_server.serve_ranks(settings, announce)


def _serve_replicas(settings: ServerSettings, replicas: int, most: int) -> None:
    if settings.tensor_parallel > 1:
        raise fail("--ray and --tensor-parallel do not go together yet.", "Use one.", code=2)
    if settings.port == 0:
        raise fail("Ray Serve needs a port of its own.", "Give --port.", code=2)
    if settings.live:
        raise fail("--live shows one server; --ray runs several.", "Leave one out.", code=2)
    from wispprof.server.ray_replicas import serve_replicas

    scheme = "wss" if settings.tls_cert is not None else "ws"

    def announce() -> None:
        note(
            f"ready: {scheme}://{settings.host}:{settings.port}/v1/split, {replicas} replicas; "
            f"metrics from port {settings.port + 1} on (Ctrl-C ends)"
        )

    note(f"starting {replicas} replicas of {settings.target} …")
    serve_replicas(settings, replicas, announce, most=most)


def _bundled_target() -> str:
    from wispprof.artifacts import bundled

    return str(bundled.path("models/reference-pair/target"))


def _resolved(server: VerificationServer, settings: ServerSettings, port: int) -> Table:
    """What this server obeys, and where each of it comes from."""
    shown = table("wispprof serve", "setting", "value")
    rows: list[tuple[str, Any]] = [
        ("target", f"{server.model.id} ({settings.dtype}, context {server.model.max_context})"),
        ("tokenizer", server.model.tokenizer[:16] or "none"),
        ("policy", f"{server.policy.name} ({'stream' if server.stream else 'round'} mode)"),
        (
            "estimator",
            "none given: learnt from this server's own steps"
            if server.clock.learning
            else str(settings.estimator),
        ),
        ("plan", f"{settings.plan} ({server.plan.hash[:12]})" if server.plan else "none"),
        ("step log", settings.step_log or "none"),
        ("KV cache", f"{server.manager.kv_total} tokens"),
        ("ranks", settings.tensor_parallel),
        ("address", f"{settings.host}:{port}{' (TLS)' if settings.tls_cert else ''}"),
        ("API keys", len(settings.api_keys) or "none (loopback only)"),
    ]
    row = server.batch_row
    if row is None:
        limits = f"{settings.max_items} items, {settings.max_tokens} tokens"
        rows.append(("step limits", f"{limits}, prefill chunk {settings.prefill_chunk}"))
    else:
        limits = f"{row.max_items} items, {row.token_budget} tokens"
        rows.append(
            (
                "step limits",
                f"{limits}, prefill chunk {row.prefill_chunk} (plan row "
                f"{row.tokens_per_s:g} tokens/s, load {row.load_level}; by load while serving)",
            )
        )
    for name, value in rows:
        shown.add_row(name, str(value))
    return shown
