"""``wispprof profile-edge`` and ``trace``: what drafting costs here, and how much of it is accepted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wispprof.cli.console import note, result, table, tracker
from wispprof.cli.options import CaFile, JsonFlag
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

if TYPE_CHECKING:
    from wispprof.artifacts.rows import AcceptanceTrace
    from wispprof.profiling.acceptance_trace import TraceSettings

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the commands to the tool."""
    app.command("profile-edge")(profile_edge)
    app.command("trace")(trace)


def profile_edge(
    draft: Annotated[
        str, typer.Option(help="Folder, hub id or .gguf of the draft. Default: the bundled one.")
    ] = "",
    dtype: Dtype = "float32",
    device: Device = "auto",
    grid: Annotated[
        str, typer.Option(help="quick, standard, full, or a TOML file of axes.")
    ] = "quick",
    contexts: Annotated[
        str, typer.Option(help="Cached tokens under a draft step, e.g. 64-4096*2.")
    ] = "",
    chunks: Annotated[str, typer.Option(help="Tokens prefilled at once, e.g. 64,256.")] = "",
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="0 switches it off.")] = 0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0, help="1 switches it off.")] = 1.0,
    sustained_seconds: Annotated[
        float | None, typer.Option(min=0.0, help="Length of the sustained window; 0 leaves it out.")
    ] = None,
    trace_out: Annotated[
        Path | None,
        typer.Option("--trace", help="Also take an acceptance trace into this file."),
    ] = None,
    target_model: Annotated[
        str, typer.Option("--model", help="Target of the trace. Default: the bundled one.")
    ] = "",
    server: Annotated[
        str, typer.Option(help="Ask a running server for the trace's paths instead of --model.")
    ] = "",
    key: Annotated[str, typer.Option(help="API key of that server.")] = "",
    ca_file: CaFile = None,
    target: Target = None,
    repeats: Repeats = None,
    seed: Seed = 0,
    out: Out = Path("edge"),
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: JsonFlag = False,
) -> None:
    """Time drafting on this device, in bursts and sustained."""
    from wispprof.profiling import edge_profiler
    from wispprof.profiling.acceptance_trace import TraceSettings
    from wispprof.profiling.drafter_runner import load_edge_axes, override_edge_axes
    from wispprof.types import Sampling

    asked = {k: v for k, v in (("contexts", contexts), ("chunks", chunks)) if v}
    axes = override_edge_axes(load_edge_axes(grid), asked, "options") if asked else None
    sampling = Sampling(temperature, top_k, top_p, seed)
    settings = edge_profiler.EdgeProfilerSettings(
        draft=draft,
        dtype=dtype,
        device=device,
        grid=grid,
        axes=axes,
        sampling=sampling,
        sustained_s=sustained_seconds,
        sweep=sweep_settings(
            edge_profiler.QUICK if grid == "quick" else edge_profiler.STANDARD,
            target,
            repeats,
            seed,
        ),
        output=output_of(out, resume, overwrite),
    )
    if dry_run:
        announce(edge_profiler.plan_edge(settings), as_json)
        return
    profile = keeping_rows(
        out, "profile-edge", lambda report: edge_profiler.profile_edge(settings, report)
    )
    if trace_out is not None:
        asked_of_trace = TraceSettings(
            target=target_model,
            draft=draft,
            dtype=dtype,
            device=device,
            sampling=sampling,
            seed=seed,
        )
        _take(asked_of_trace, server, key, ca_file, trace_out)
    finished(profile, out, as_json)


def trace(
    model: Annotated[
        str, typer.Option(help="Folder or hub id of the target. Default: the bundled one.")
    ] = "",
    draft: Annotated[
        str, typer.Option(help="Folder or hub id of the draft. Default: the bundled one.")
    ] = "",
    dtype: Dtype = "float32",
    device: Device = "auto",
    prompts: Annotated[
        Path | None, typer.Option(help="Text or JSON lines. Default: held-out sources.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Prompts.")] = 32,
    prompt_tokens: Annotated[int, typer.Option(min=2, help="Longest prompt.")] = 128,
    path_tokens: Annotated[int, typer.Option(min=2, help="Longest path.")] = 128,
    depth: Annotated[int, typer.Option("--k", min=1, max=64, help="Drafts per position.")] = 8,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="0 switches it off.")] = 0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0, help="1 switches it off.")] = 1.0,
    seed: Seed = 0,
    server: Annotated[
        str, typer.Option(help="Ask a running server for the target's paths instead of --model.")
    ] = "",
    key: Annotated[str, typer.Option(help="API key of that server.")] = "",
    ca_file: CaFile = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write.")] = Path("trace.jsonl"),
    as_json: JsonFlag = False,
) -> None:
    """Take an acceptance trace of a draft model under a target model."""
    from wispprof.profiling.acceptance_trace import TraceSettings
    from wispprof.types import Sampling

    settings = TraceSettings(
        target=model,
        draft=draft,
        dtype=dtype,
        device=device,
        sampling=Sampling(temperature, top_k, top_p, seed),
        prompts=prompts,
        count=count,
        prompt_tokens=prompt_tokens,
        path_tokens=path_tokens,
        depth=depth,
        seed=seed,
    )
    taken, digest = _take(settings, server, key, ca_file, out)
    cum_acceptance = taken.cum_acceptance_by_position().tolist()
    shown = table(f"Accepted drafts of {taken.draft} under {taken.target}", "position", ">survival")
    for position, share in enumerate(cum_acceptance, start=1):
        shown.add_row(str(position), f"{share:.3f}")
    document = {
        "file": str(out),
        "hash": digest,
        "paths": len(taken.paths),
        "tokens": sum(len(path.path) for path in taken.paths),
        "cum_acceptance": cum_acceptance,
    }
    result(document, shown, as_json)


def _take(
    settings: TraceSettings, server: str, key: str, ca_file: Path | None, out: Path
) -> tuple[AcceptanceTrace, str]:
    """Take a trace, of a running server's paths where one is named, and keep it; its content hash."""
    from wispprof.artifacts import save_trace
    from wispprof.profiling.acceptance_trace import trace_pair, trace_remote
    from wispprof.profiling.remote_target import RemoteTarget

    with tracker("trace") as report:
        if server:
            taken = trace_remote(RemoteTarget(server, key, ca_file=ca_file), settings, report)
        else:
            taken = trace_pair(settings, report)
    digest = save_trace(taken, out)
    note(f"wrote {out}")
    return taken, digest
