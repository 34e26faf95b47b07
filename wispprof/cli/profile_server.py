"""``wispprof profile-server``: step times of ragged batch shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wispprof.cli.options import JsonFlag
from wispprof.cli.profiling import (
    Device,
    DryRun,
    Dtype,
    Out,
    Overwrite,
    Repeats,
    Resume,
    Seed,
    Target,
    announce,
    finished,
    keeping_rows,
    output_of,
    sweep_settings,
)

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command to the tool."""
    app.command("profile-server")(profile_server)


def profile_server(
    model: Annotated[
        str, typer.Option(help="Folder or hub id of the target. Default: the bundled one.")
    ] = "",
    shape: Annotated[
        str, typer.Option(help="Instead: random weights in a known shape, such as qwen3-8b.")
    ] = "",
    dtype: Dtype = "float32",
    device: Device = "auto",
    backend: Annotated[
        str, typer.Option(help="KV store of the engine: auto, dense, paged.")
    ] = "auto",
    grid: Annotated[
        str, typer.Option(help="quick, standard, full, or a TOML file of axes.")
    ] = "quick",
    items: Annotated[str, typer.Option(help="Sessions in a step, e.g. 1-32*2.")] = "",
    new: Annotated[str, typer.Option(help="New tokens per session, e.g. 1,2,5,9.")] = "",
    cached: Annotated[str, typer.Option(help="Cached tokens per session, e.g. 64-4096*2.")] = "",
    kv_tokens: Annotated[
        int | None, typer.Option(min=1, help="KV tokens of the engine. Default: what fits.")
    ] = None,
    budget_minutes: Annotated[
        float | None,
        typer.Option(min=0.01, help="Measure the most informative shots in this time."),
    ] = None,
    target: Target = None,
    repeats: Repeats = None,
    seed: Seed = 0,
    out: Out = Path("server"),
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: JsonFlag = False,
) -> None:
    """Time ragged batch shapes on the verification engine."""
    from wispprof.profiling import server_profiler
    from wispprof.profiling.shape_grid import load_axes, override_axes

    axes = None
    asked = {k: v for k, v in (("items", items), ("new", new), ("cached", cached)) if v}
    if asked:
        axes = override_axes(load_axes(grid), asked, "options")
    settings = server_profiler.ServerProfilerSettings(
        model=model,
        shape=shape,
        dtype=dtype,
        device=device,
        backend=backend,
        grid=grid,
        axes=axes,
        kv_tokens=kv_tokens,
        budget_minutes=budget_minutes,
        sweep=sweep_settings(
            server_profiler.QUICK if grid == "quick" else server_profiler.STANDARD,
            target,
            repeats,
            seed,
        ),
        output=output_of(out, resume, overwrite),
    )
    if dry_run:
        announce(server_profiler.plan_server(settings), as_json)
        return
    profile = keeping_rows(
        out, "profile-server", lambda report: server_profiler.profile_server(settings, report)
    )
    finished(profile, out, as_json)
