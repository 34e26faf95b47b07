"""``wispprof serve`` and ``bench``: the verification server as a process, and replayed edges against one."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wispprof.cli.console import FAULT, console, fail, note, result, table, tracker, warn
from wispprof.cli.options import JsonFlag, with_settings
from wispprof.errors import WispprofError
from wispprof.settings.fleet_settings import BenchSettings
from wispprof.settings.server_settings import ReplicaSettings, ServerSettings

if TYPE_CHECKING:
    from rich.table import Table

    from wispprof.bench import BenchResult
    from wispprof.server import VerificationServer


BUNDLED = "the bundled target"


@with_settings
def serve(settings: ServerSettings, scaling: ReplicaSettings) -> None:
    """Verify the drafts of many edges with one target model.

    Ctrl-C or SIGTERM drains: the server accepts nothing new, sessions finish, then it ends. A second
    signal ends it at once.
    """
    from wispprof.doctor.findings import DoctorContext, require
    from wispprof.doctor.serving_checks import port, tls

    for path in (settings.estimator, settings.plan, settings.tls_cert, settings.tls_key):
        if path is not None and not path.exists():
            raise fail(f"There is no file {path}.", "Check the path.")
    if os.environ.get("RANK") is None:
        chosen = {name: getattr(settings, name) for name in ("host", "port", "tls_cert", "tls_key")}
        require(DoctorContext(**chosen), port, *([tls] if settings.tls_cert else []))
    from wispprof.server import serve as run
    from wispprof.server.fronts import TokenizerStays
    from wispprof.server.logs import configure_logging
    from wispprof.server.supervisor import can_supervise, supervise

    configure_logging(settings.log_level, quiet=settings.live)
    if scaling.ray:
        _serve_replicas(settings, scaling)
        return
    if settings.tensor_parallel > 1 and settings.engine == "torch":
        _serve_ranks(settings)
        return
    note(f"loading {settings.target or BUNDLED} …")
    if can_supervise(settings):
        try:
            supervise(settings, (sys.executable, "-c", _ENGINE_PROCESS))
            return
        except TokenizerStays as err:
            note(str(err))
            settings = replace(settings, fronts=0)
    run(settings, _announcing(settings))


_ENGINE_PROCESS = "from wispprof.cli.serve import engine_process; engine_process()"


def engine_process() -> None:
    """Run the engine process of ``serve``, for its supervisor."""
    from wispprof.server import serve as run
    from wispprof.server.logs import configure_logging
    from wispprof.server.supervisor import Supervised

    supervised = Supervised.take()
    settings = supervised.settings
    configure_logging(settings.log_level, quiet=settings.live)
    try:
        run(settings, _announcing(settings), supervised=supervised)
    except WispprofError as err:
        supervised.failed(err)
        raise SystemExit(FAULT) from None


def _announcing(settings: ServerSettings) -> Callable[[VerificationServer, int], None]:
    def announce(server: VerificationServer, taken: int) -> None:
        console().print(_resolved(server, settings, taken))
        scheme = "wss" if settings.tls_cert is not None else "ws"
        address = f"{settings.host}:{taken}"
        page = f"{scheme.replace('ws', 'http')}://{address}"
        note(f"ready: {scheme}://{address}/v1/split; page: {page} (Ctrl-C drains)")

    return announce


def _serve_ranks(settings: ServerSettings) -> None:
    from wispprof.server.process import launch_ranks, serve_ranks

    rank = os.environ.get("RANK")
    if rank is None:
        launch_ranks(settings.tensor_parallel)
        return
    if rank == "0":
        note(f"loading {settings.target or BUNDLED} …")
    serve_ranks(settings, _announcing(settings))


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
        limits = f"{row.max_items} items, {row.token_budget} tokens, prefill chunk {row.prefill_chunk}"
        limits += f" (plan row {row.tokens_per_s:g} tokens/s, load {row.load_level}; adapts to load)"
    rows: dict[str, Any] = {
        "target": f"{server.model.id} ({server.dtype}, context {server.model.max_context})",
        "tokenizer": server.model.tokenizer[:16] or "none",
        "policy": f"{server.policy.name} ({'stream' if server.policy.stream else 'round'} mode)",
        "estimator": estimator,
        "plan": f"{settings.plan} ({server.plan.hash[:12]})" if server.plan else "none",
        "step log": str(settings.step_log or "none"),
        "request log": str(settings.request_log or "none"),
        "KV cache": f"{server.manager.kv_total} tokens",
        "ranks": settings.tensor_parallel,
        "address": f"{settings.host}:{port}{' (TLS)' if settings.tls_cert else ''}",
        "API keys": len(settings.api_keys) or "none (loopback only)",
        "step limits": limits,
    }
    return table("wispprof serve", "setting|value", rows.items())


@with_settings
def bench(
    trace: Annotated[Path, typer.Option(help="Acceptance trace of the served pair.")],
    settings: BenchSettings,
    server: Annotated[str, typer.Option(help="Address of the server.")] = "127.0.0.1:8200",
    system: Annotated[
        list[str], typer.Option(help="How edges draft: wispprof, wisp, sled, server-only, …; repeatable.")
    ] = ["wispprof"],
    device: Annotated[
        list[str],
        typer.Option(
            help="Kind of device: fast, medium, slow, the ms of a draft step, or an edge profile (a file, "
            "or a shipped one such as rpi-5); repeatable, for a mixed fleet."
        ),
    ] = ["medium"],
    k: Annotated[int | None, typer.Option(min=0, help="Draft length of a fixed controller.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Load a running server with replayed edges; print their metrics.

    Every text is compared with the trace: if one differs, the exit code is 1.
    """
    from wispprof.artifacts import load_trace
    from wispprof.bench import bench as run
    from wispprof.simulation.devices import device_of

    recorded = load_trace(trace)
    settings = replace(
        settings,
        device=tuple(map(device_of, device)),
        controller=settings.controller or ("" if k is None else "fixed"),
        options={} if k is None else {"k": k},
    )
    results = []
    for name in system:
        with tracker(f"bench {name}") as report:
            results.append(run(replace(settings, system=name), server, recorded, report))
    document = [each.record(requests=True) for each in results]
    result(document if len(document) > 1 else document[0], _bench_table(results), as_json)
    for each in results:
        for err, count in each.errors.items():
            warn(f"{each.policy}: {count} requests failed: {err}")
    for name in undrafted(results):
        warn(f"{name}: no draft was accepted, so equal texts say nothing about drafting.")
    wrong = [each.policy for each in results if not each.lossless]
    if wrong:
        raise fail(
            f"Texts under {', '.join(wrong)} differ from the trace.",
            "Serve the target that the trace was taken with, in float32.",
        )


_ROWS = (
    ("attainment", "SLO attainment", "{:.0%}"),
    ("goodput_tokens_per_s", "goodput, tokens/s", "{:.1f}"),
    ("tokens_per_s", "all tokens, tokens/s", "{:.1f}"),
    ("ttft_p50_ms", "TTFT p50, ms", "{:.0f}"),
    ("ttft_p95_ms", "TTFT p95, ms", "{:.0f}"),
    ("tpot_p50_ms", "TPOT p50, ms", "{:.1f}"),
    ("tpot_p95_ms", "TPOT p95, ms", "{:.1f}"),
    ("accepted_per_round", "accepted per round", "{:.2f}"),
    ("acceptance", "acceptance of verified drafts", "{:.0%}"),
    ("wasted_ms", "wasted drafting, ms", "{:.0f}"),
    ("wasted_share", "wasted share of drafting", "{:.0%}"),
    ("proactive_hit_rate", "proactive hit rate", "{:.0%}"),
    ("queue_ms", "queue per round, ms", "{:.1f}"),
    ("verify_ms", "verify per round, ms", "{:.1f}"),
    ("step_predicted_p50_ms", "step predicted p50, ms", "{:.1f}"),
    ("step_p50_ms", "step measured p50, ms", "{:.1f}"),
    ("step_error", "step error, median", "{:.0%}"),
    ("step_predicted_mean_ms", "step predicted, mean ms", "{:.1f}"),
    ("step_mean_ms", "step measured, mean ms", "{:.1f}"),
    ("up_bytes_per_token", "bytes up per token", "{:.1f}"),
    ("down_bytes_per_token", "bytes down per token", "{:.1f}"),
    ("failed", "failed requests", "{:.0f}"),
    ("mismatches", "texts that differ", "{:.0f}"),
)


def undrafted(results: list[BenchResult]) -> list[str]:
    """Ways of drafting under which no draft was accepted: their losslessness check is vacuous."""
    return [
        each.policy
        for each in results
        if each.policy != "server-only" and not each.figures.get("accepted_per_round", 0.0) > 0.0
    ]


def _bench_table(results: list[BenchResult]) -> Table:
    rows = []
    for name, label, form in _ROWS:
        values = [each.figures.get(name) for each in results]
        if all(value is None or value != value for value in values):
            continue
        cells = ["–" if v is None or v != v else form.format(v) for v in values]
        rows.append((label, *cells))
    columns = "|".join(("edges draft as", *(f"{each.policy}:g" for each in results)))
    return table("bench", columns, rows)
