"""``wispprof bench``: N replay edges against a running server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wispprof.cli import common

if TYPE_CHECKING:
    from rich.console import RenderableType

    from wispprof.bench import BenchResult


def register(app: typer.Typer) -> None:
    """Add the command to the tool."""
    app.command("bench", rich_help_panel="Run")(bench)


def bench(
    trace: Annotated[Path, typer.Option(help="Acceptance trace of the served pair.")],
    server: Annotated[str, typer.Option(help="Address of the server.")] = "127.0.0.1:8200",
    key: Annotated[str, typer.Option(help="API key of the server.", show_default=False)] = "",
    ca_file: common.CaFile = None,
    system: Annotated[
        list[str] | None,
        typer.Option(
            help="How edges draft: wispprof, wisp, sled, server-only, … May be repeated [wispprof]."
        ),
    ] = None,
    devices: Annotated[int, typer.Option(min=1, help="How many edges.")] = 8,
    device: Annotated[
        list[str] | None,
        typer.Option(
            help="Kind of device: fast, medium, slow, the ms of a draft step, or an edge profile "
            "(a file, or a shipped one: rpi-5). May be repeated: a mixed fleet [medium]."
        ),
    ] = None,
    slo: Annotated[
        list[float] | None,
        typer.Option(help="Promised tokens/s; may be repeated: classes in turn [4]."),
    ] = None,
    ttft: Annotated[float | None, typer.Option(help="Promised ms to the first token.")] = None,
    requests: Annotated[int, typer.Option(min=1, help="Per device; with --rate in all.")] = 2,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens per request.")] = 48,
    rate: Annotated[
        float, typer.Option(min=0.0, help="Poisson arrivals per second; 0 is a closed fleet.")
    ] = 0.0,
    think: Annotated[float, typer.Option(min=0.0, help="Mean pause between requests, ms.")] = 0.0,
    rtt: Annotated[float, typer.Option(min=0.0, help="Emulated round trip, ms.")] = 0.0,
    jitter: Annotated[float, typer.Option(min=0.0, help="Emulated jitter each way, ms.")] = 0.0,
    controller: Annotated[str, typer.Option(help="Replaces the system's controller.")] = "",
    k: Annotated[
        int | None, typer.Option("--k", min=0, help="Draft length of a fixed controller.")
    ] = None,
    predictor: Annotated[Path | None, typer.Option(help="Rejection predictor.")] = None,
    seed: Annotated[int, typer.Option(help="Of arrivals, jitter and loss.")] = 0,
    as_json: common.JsonFlag = False,
) -> None:
    """Load a running server with replay edges and print what their users saw.

    Every text is compared with the trace: a result whose texts differ ends with exit code 1.
    """
    from wispprof.artifacts import load_trace
    from wispprof.bench import bench as run
    from wispprof.settings.bench_settings import BenchSettings, device_of
    from wispprof.simulation.devices import LinkModel

    recorded = load_trace(trace)
    kinds = tuple(device_of(name) for name in device or ["medium"])
    results = []
    for name in system or ["wispprof"]:
        fixed = k is not None
        settings = BenchSettings(
            system=name,
            devices=devices,
            device=kinds,
            tokens_per_s=tuple(slo or [4.0]),
            ttft_ms=ttft,
            requests=requests,
            max_new=max_tokens,
            rate_per_s=rate,
            think_ms=think,
            link=LinkModel(rtt_ms=rtt, jitter_ms=jitter),
            controller="fixed" if fixed and not controller else controller,
            options={"k": k} if fixed else {},
            predictor=predictor,
            key=key,
            ca_file=ca_file,
            seed=seed,
        )
        with common.tracker(f"bench {name}") as report:
            results.append(run(settings, server, recorded, report))
    document = [result.record(requests=True) for result in results]
    common.result(document if len(document) > 1 else document[0], _shown(results), as_json)
    for result in results:
        for err, count in result.faults.items():
            common.warn(f"{result.policy}: {count} requests failed: {err}")
    wrong = [result.policy for result in results if not result.lossless]
    if wrong:
        raise common.fail(
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


def _shown(results: list[BenchResult]) -> RenderableType:
    table = common.table("bench", "edges draft as", *(f">{result.policy}" for result in results))
    for name, label, form in _ROWS:
        values = [result.figures.get(name) for result in results]
        if all(value is None or value != value for value in values):
            continue
        cells = ["–" if v is None or v != v else form.format(v) for v in values]
        table.add_row(label, *cells)
    return table
