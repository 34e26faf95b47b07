"""``wispprof bench``: N replay edges against a running server."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wispprof.cli import console
from wispprof.cli.options import JsonFlag, with_settings
from wispprof.settings.fleet_settings import BenchSettings

if TYPE_CHECKING:
    from rich.console import RenderableType

    from wispprof.bench import BenchResult


def register(app: typer.Typer) -> None:
    """Add the command to the tool."""
    app.command("bench")(bench)


@with_settings
def bench(
    trace: Annotated[Path, typer.Option(help="Acceptance trace of the served pair.")],
    settings: BenchSettings,
    server: Annotated[str, typer.Option(help="Address of the server.")] = "127.0.0.1:8200",
    system: Annotated[
        list[str],
        typer.Option(help="How edges draft: wispprof, wisp, sled, server-only, …; repeatable."),
    ] = ["wispprof"],
    device: Annotated[
        list[str],
        typer.Option(
            help="Kind of device: fast, medium, slow, the ms of a draft step, or an edge profile (a file, "
            "or a shipped one such as rpi-5); repeatable, for a mixed fleet."
        ),
    ] = ["medium"],
    k: Annotated[
        int | None, typer.Option(min=0, help="Draft length of a fixed controller.")
    ] = None,
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
        with console.tracker(f"bench {name}") as report:
            results.append(run(replace(settings, system=name), server, recorded, report))
    document = [result.record(requests=True) for result in results]
    console.result(document if len(document) > 1 else document[0], _shown(results), as_json)
    for result in results:
        for err, count in result.errors.items():
            console.warn(f"{result.policy}: {count} requests failed: {err}")
    wrong = [result.policy for result in results if not result.lossless]
    if wrong:
        raise console.fail(
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
    rows = []
    for name, label, form in _ROWS:
        values = [result.figures.get(name) for result in results]
        if all(value is None or value != value for value in values):
            continue
        cells = ["–" if v is None or v != v else form.format(v) for v in values]
        rows.append((label, *cells))
    columns = "|".join(("edges draft as", *(f"{result.policy}:g" for result in results)))
    return console.table("bench", columns, rows)
