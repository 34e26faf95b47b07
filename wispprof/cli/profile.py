"""``profile-server``, ``profile-edge``, ``profile-link``, ``trace`` and the ``profile`` group."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wispprof.cli.common import JsonFlag, console, note, output, result, table, tracker, warn

if TYPE_CHECKING:
    from wispprof.artifacts import EdgeProfile, LinkProfile, Profile, ServerProfile
    from wispprof.profiling.session import Announcement, Output
    from wispprof.profiling.sweep import SweepSettings

__all__ = ["register"]

INTERRUPTED = 130

Out = Annotated[Path, typer.Option("--out", "-o", help="Name of the profile to write.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Seed = Annotated[int, typer.Option(help="Seed of order and contents.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on at the next missing row.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="List the shots and the expected time.")]
Target = Annotated[
    float | None,
    typer.Option(min=0.001, max=0.5, help="Wanted half-width of the median's 95 % interval."),
]
Repeats = Annotated[int | None, typer.Option(min=1, help="Most repeats of a shot.")]


def register(app: typer.Typer) -> None:
    """Add the measuring commands."""
    app.command("profile-server")(profile_server)
    app.command("profile-edge")(profile_edge)
    app.command("profile-link")(profile_link)
    app.command("trace")(trace)
    group = typer.Typer(help="Look at, check, join and compare profiles.", no_args_is_help=True)
    for command in (show, validate, merge, diff, export):
        group.command(command.__name__)(command)
    group.command("import-llama-bench")(import_llama_bench)
    app.add_typer(group, name="profile")


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
        str, typer.Option(help="KV store of the engine: auto, slots, paged.")
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
    """Time ragged batch shapes on the verifier engine."""
    from wispprof.profiling import server
    from wispprof.profiling.grids import load_axes, override

    axes = None
    asked = {k: v for k, v in (("items", items), ("new", new), ("cached", cached)) if v}
    if asked:
        axes = override(load_axes(grid), asked, "options")
    settings = server.ServerSettings(
        model=model,
        shape=shape,
        dtype=dtype,
        device=device,
        backend=backend,
        grid=grid,
        axes=axes,
        kv_tokens=kv_tokens,
        budget_minutes=budget_minutes,
        sweep=_sweep(server.QUICK if grid == "quick" else server.STANDARD, target, repeats, seed),
        output=_output(out, resume, overwrite),
    )
    if dry_run:
        _announce(server.plan_server(settings), as_json)
        return
    profile = _keeping_rows(
        out, "profile-server", lambda report: server.profile_server(settings, report)
    )
    _finished(profile, out, as_json)


def profile_edge(
    draft: Annotated[
        str, typer.Option(help="Folder, hub id or .gguf of the draft. Default: the bundled one.")
    ] = "",
    dtype: Dtype = "float32",
    device: Device = "auto",
    grid: Annotated[str, typer.Option(help="quick, standard or full.")] = "quick",
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
    target: Target = None,
    repeats: Repeats = None,
    seed: Seed = 0,
    out: Out = Path("edge"),
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: JsonFlag = False,
) -> None:
    """Time drafting on this device: by context, in a burst, sustained, with energy."""
    from wispprof.core import Sampling
    from wispprof.profiling import edge
    from wispprof.profiling.sweep import SweepSettings

    sampling = Sampling(temperature, top_k, top_p, seed)
    settings = edge.EdgeSettings(
        draft=draft,
        dtype=dtype,
        device=device,
        grid=grid,
        sampling=sampling,
        sustained_s=sustained_seconds,
        sweep=_sweep(edge.QUICK if grid == "quick" else SweepSettings(), target, repeats, seed),
        output=_output(out, resume, overwrite),
    )
    if dry_run:
        _announce(edge.plan_edge(settings), as_json)
        return
    profile = _keeping_rows(out, "profile-edge", lambda report: edge.profile_edge(settings, report))
    if trace_out is not None:
        trace(
            draft=draft,
            model=target_model,
            dtype=dtype,
            device=device,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            server=server,
            key=key,
            out=trace_out,
            quiet=True,
        )
    _finished(profile, out, as_json)


def profile_link(
    server: Annotated[str, typer.Argument(help="URL of a running server, e.g. ws://host:8765.")],
    key: Annotated[str, typer.Option(help="API key of the server.")] = "",
    count: Annotated[int, typer.Option(min=3, help="Exchanges of each kind.")] = 40,
    out: Out = Path("link"),
    overwrite: Overwrite = False,
    as_json: JsonFlag = False,
) -> None:
    """Measure round trip, jitter and bandwidth to a server, in its own frames."""
    from wispprof.profiling import link

    settings = link.LinkSettings(server, key, count=count, output=_output(out, False, overwrite))
    with tracker("profile-link") as report:
        profile = link.profile_link(settings, report)
    _finished(profile, out, as_json)


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
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write.")] = Path("trace.jsonl"),
    as_json: JsonFlag = False,
    quiet: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Take an acceptance trace: the target's path and what the draft would propose along it."""
    from wispprof.artifacts import save_trace
    from wispprof.core import Sampling
    from wispprof.profiling.acceptance import TraceSettings, trace_pair, trace_remote
    from wispprof.profiling.remote import RemoteTarget

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
    with tracker("trace") as report:
        if server:
            taken = trace_remote(RemoteTarget(server, key), settings, report)
        else:
            taken = trace_pair(settings, report)
    digest = save_trace(taken, out)
    survival = taken.survival_by_position().tolist()
    note(f"wrote {out}")
    if quiet:
        return
    shown = table(f"Accepted drafts of {taken.draft} under {taken.target}", "position", ">survival")
    for position, share in enumerate(survival, start=1):
        shown.add_row(str(position), f"{share:.3f}")
    document = {
        "file": str(out),
        "hash": digest,
        "paths": len(taken.paths),
        "tokens": sum(len(path.path) for path in taken.paths),
        "survival": survival,
    }
    result(document, shown, as_json)


# --- the profile group ----------------------------------------------------------------------------


def show(
    profile: Annotated[Path, typer.Argument(help="A profile.")],
    rows: Annotated[bool, typer.Option("--rows", help="Every row, sentinels too.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Print a profile: where it comes from and what it says."""
    from wispprof.artifacts import load_profile
    from wispprof.profiling.compare import row_record

    loaded = load_profile(_found(profile))
    if as_json:
        document = _document(loaded)
        document["rows"] = [row_record(row) for row in loaded.rows]
        result(document, "", True)
        return
    _print_profile(loaded, everything=rows)


def validate(
    profiles: Annotated[list[Path], typer.Argument(help="Profiles or traces.")],
    as_json: JsonFlag = False,
) -> None:
    """Check files: whole, unchanged, and physically possible. Exit code 1 if one is not."""
    from wispprof.artifacts import ServerProfile, load_profile, load_trace
    from wispprof.errors import ArtifactError, ProfileError
    from wispprof.profiling.physics import check_physics

    verdicts: dict[str, str] = {}
    for path in profiles:
        try:
            if _is_trace(path):
                load_trace(path)
            else:
                loaded = load_profile(_found(path))
                if isinstance(loaded, ServerProfile):
                    check_physics(loaded.rows, loaded.manifest.model)
            verdicts[str(path)] = "good"
        except (ArtifactError, ProfileError) as fault:
            verdicts[str(path)] = str(fault)
    shown = table("Validation", "file", "verdict")
    for name, verdict in verdicts.items():
        shown.add_row(name, verdict)
    result(verdicts, shown, as_json)
    if any(verdict != "good" for verdict in verdicts.values()):
        raise typer.Exit(1)


def merge(
    profiles: Annotated[list[Path], typer.Argument(help="Profiles of one model on one machine.")],
    out: Out,
    overwrite: Overwrite = False,
    as_json: JsonFlag = False,
) -> None:
    """Join profiles; of rows with the same key the cleaner one is kept."""
    from wispprof.artifacts import load_profile, save_profile
    from wispprof.artifacts.profile import profile_files
    from wispprof.cli.common import fail
    from wispprof.profiling.compare import merge_profiles

    if profile_files(out)[0].exists() and not overwrite:
        raise fail(f"{profile_files(out)[0]} exists.", "Choose another --out, or add --overwrite.")
    merged = merge_profiles([load_profile(_found(path)) for path in profiles])
    save_profile(merged, out)
    _finished(merged, out, as_json)


def diff(
    before: Annotated[Path, typer.Argument(help="The earlier profile.")],
    after: Annotated[Path, typer.Argument(help="The later profile.")],
    tolerance: Annotated[
        float, typer.Option(min=0.0, help="Medians closer than this share count as equal.")
    ] = 0.05,
    as_json: JsonFlag = False,
) -> None:
    """Say which shapes changed beyond noise between two profiles of the same machine."""
    from wispprof.artifacts import load_profile
    from wispprof.profiling.compare import diff_profiles

    found = diff_profiles(load_profile(_found(before)), load_profile(_found(after)), tolerance)
    if not found.same_machine:
        warn("the profiles are of different machines")
    if not found.same_model:
        warn("the profiles are of different models")
    if found.drifted:
        warn("drift was seen while measuring: rows marked * may say more of the machine's load")
    shown = table(
        f"{len(found.changed)} of {len(found.rows)} shapes changed beyond noise "
        f"(median ratio of all: {found.median_ratio:.3f})",
        "shape",
        ">before ms",
        ">after ms",
        ">ratio",
    )
    for row in sorted(found.changed, key=lambda row: -abs(row.ratio - 1)):
        mark = " *" if row.doubtful else ""
        shown.add_row(
            row.key + mark, f"{row.before_ms:.3f}", f"{row.after_ms:.3f}", f"{row.ratio:.3f}"
        )
    document = {
        "compared": len(found.rows),
        "changed": [
            {"key": r.key, "before_ms": r.before_ms, "after_ms": r.after_ms, "doubtful": r.doubtful}
            for r in found.changed
        ],
        "changed_share": found.changed_share,
        "median_ratio": found.median_ratio,
        "only_before": found.only_before,
        "only_after": found.only_after,
        "same_machine": found.same_machine,
        "same_model": found.same_model,
        "drifted": found.drifted,
    }
    result(document, shown, as_json)


def export(
    profile: Annotated[Path, typer.Argument(help="A profile.")],
    to: Annotated[Path, typer.Argument(help="A file in .csv or .parquet.")],
) -> None:
    """Write a profile's rows as a table for other tools."""
    from wispprof.artifacts import load_profile
    from wispprof.profiling.compare import export_rows

    count = export_rows(load_profile(_found(profile)), to)
    note(f"wrote {count} rows to {to}")


def import_llama_bench(
    file: Annotated[Path, typer.Argument(help="What llama-bench -o json printed.")],
    out: Out = Path("edge"),
    overwrite: Overwrite = False,
    as_json: JsonFlag = False,
) -> None:
    """Make an edge profile of llama-bench's results."""
    from wispprof.profiling.llama_bench import import_results

    profile = import_results(file, _output(out, False, overwrite))
    _finished(profile, out, as_json)


# --- shared ---------------------------------------------------------------------------------------


def _sweep(
    base: SweepSettings, target: float | None, repeats: int | None, seed: int
) -> SweepSettings:
    changed = replace(base, seed=seed)
    if target is not None:
        changed = replace(changed, target=target)
    if repeats is not None:
        changed = replace(changed, most=repeats, least=min(base.least, repeats))
    return changed


def _output(out: Path, resume: bool, overwrite: bool) -> Output:
    from wispprof.profiling.session import Output

    return Output(out, resume, overwrite)


def _keeping_rows(out: Path, name: str, run: Callable[[Any], Any]) -> Any:
    """Run with a progress bar; on Ctrl-C say where the finished rows are and how to go on."""
    from wispprof.profiling.session import journal_file

    try:
        with _bar(name) as report:
            return run(report)
    except KeyboardInterrupt:
        journal = journal_file(out)
        if journal.exists():
            rows = max(0, journal.read_bytes().count(b"\n") - 1)
            said = f"Interrupted. {rows} finished rows are in {journal}; go on with --resume."
        else:
            said = "Interrupted before the first row; nothing was written."
        console().print(said, style="yellow", markup=False)
        raise typer.Exit(INTERRUPTED) from None


@contextmanager
def _bar(name: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar for a sweep, which tells its own ETA: shots differ too much for one by their number."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
    )

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[status]}", style="dim", markup=False),
    )
    with Progress(*columns, console=console()) as bars:
        task = bars.add_task(name, total=None, status="")

        def report(done: int, total: int, status: str) -> None:
            bars.update(task, completed=done, total=total, status=status)

        yield report


def _announce(plan: Announcement, as_json: bool) -> None:
    from wispprof.profiling.sweep import duration

    shown = table(f"{len(plan.shots)} shots, about {duration(plan.expected_s)}", "kind", "shot")
    for shot in plan.shots:
        shown.add_row(shot.kind, shot.key)
    document = {
        "shots": [{"kind": shot.kind, "key": shot.key} for shot in plan.shots],
        "expected_s": plan.expected_s,
    }
    result(document, shown, as_json)


def _finished(profile: ServerProfile | EdgeProfile | LinkProfile, out: Path, as_json: bool) -> None:
    from wispprof.artifacts.profile import profile_files

    summary = profile.manifest.summary
    drift = summary.get("drift", {})
    if drift.get("drifted"):
        warn(
            f"{drift['drifted_rows']} rows were measured while the machine drifted (flag 'drift'): "
            "measure again when it is quiet."
        )
    if summary.get("out_of_time"):
        warn(f"{summary['out_of_time']} shots were left out: the time was up.")
    for key, reason in dict(summary.get("refused", {})).items():
        warn(f"{key} was left out: {reason}")
    note(f"wrote {profile_files(out)[0]} and its manifest")
    if as_json:
        result({"file": str(profile_files(out)[0]), **_document(profile)}, "", True)
    else:
        _print_profile(profile, everything=False)


def _document(profile: Profile) -> dict[str, Any]:
    return {"hash": profile.hash, "manifest": profile.manifest.as_dict()}


def _print_profile(profile: Profile, everything: bool) -> None:
    from wispprof.artifacts import StepRow

    manifest = profile.manifest
    machine = manifest.hardware.get("board") or manifest.hardware.get("cpu") or "unknown machine"
    title = f"{manifest.kind} profile: {manifest.model.id} {manifest.model.dtype} on {machine}"
    if manifest.source != "measured":
        title += f" ({manifest.source})"
    if manifest.kind == "server":
        shown = table(title, "kind", "shape", ">median ms", ">± %", ">samples", "flags")
    else:
        shown = table(title, "kind", "what", ">median ms", ">± %", ">samples", "flags")
    from wispprof.profiling.stats import half_width

    rows = [row for row in profile.rows if everything or row.kind != "sentinel"]
    if not everything:
        rows.sort(key=lambda row: (row.kind, _size(row), row.key))
    for row in rows:
        width = half_width(row.samples_ms)
        spread = f"{100 * width:.1f}" if width < float("inf") else "–"
        flags = " ".join(row.flags)
        name = row.shape.key() if isinstance(row, StepRow) else row.key
        shown.add_row(
            row.kind, name, f"{row.median_ms:.4g}", spread, str(len(row.samples_ms)), flags
        )
    output().print(shown)
    skip = ("drift", "physics", "refused")
    facts = {k: v for k, v in manifest.summary.items() if k not in skip and v is not None}
    if facts:
        output().print("  ".join(f"{k} {v}" for k, v in facts.items()), markup=False)
    if manifest.citation:
        output().print(manifest.citation, markup=False)


def _size(row: Any) -> int:
    shape = getattr(row, "shape", None)
    if shape is not None:
        return int(shape.attention_pairs)
    return int(getattr(row, "context", getattr(row, "payload_bytes", 0)))


def _found(path: Path) -> Path:
    """A profile here, or the shipped one of that name."""
    from wispprof.artifacts import bundled
    from wispprof.artifacts.profile import profile_files
    from wispprof.errors import ArtifactMissing

    if profile_files(path)[1].exists() or len(path.parts) > 1:
        return path
    try:
        return bundled.path(f"profiles/{profile_files(path)[0].name}")
    except ArtifactMissing:
        return path


def _is_trace(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(40).startswith(b'{"format":"wispprof/trace"')
