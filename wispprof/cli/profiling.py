"""What the measuring commands share: options, the bar, dry runs, and how a profile is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wispprof.cli.console import console, note, output, result, table, warn

if TYPE_CHECKING:
    from wispprof.artifacts import EdgeProfile, LinkProfile, Profile, ServerProfile
    from wispprof.profiling.profile_run import Output, SweepPlan
    from wispprof.profiling.workload import SweepSettings

__all__ = [
    "Device",
    "DryRun",
    "Dtype",
    "Out",
    "Overwrite",
    "Repeats",
    "Resume",
    "Seed",
    "Target",
    "announce",
    "finished",
    "found_profile",
    "keeping_rows",
    "output_of",
    "print_profile",
    "profile_document",
    "sweep_settings",
]

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


def sweep_settings(
    base: SweepSettings, target: float | None, repeats: int | None, seed: int
) -> SweepSettings:
    changed = replace(base, seed=seed)
    if target is not None:
        changed = replace(changed, target=target)
    if repeats is not None:
        changed = replace(changed, max_samples=repeats, min_samples=min(base.min_samples, repeats))
    return changed


def output_of(out: Path, resume: bool, overwrite: bool) -> Output:
    from wispprof.profiling.profile_run import Output

    return Output(out, resume, overwrite)


def keeping_rows(out: Path, name: str, run: Callable[[Any], Any]) -> Any:
    """Run with a progress bar; on Ctrl-C say where the finished rows are and how to go on."""
    from wispprof.profiling.profile_run import journal_path

    try:
        with _bar(name) as report:
            return run(report)
    except KeyboardInterrupt:
        journal = journal_path(out)
        if journal.exists():
            rows = max(0, journal.read_bytes().count(b"\n") - 1)
            said = f"Interrupted. {rows} finished visits are in {journal}; go on with --resume."
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


def announce(plan: SweepPlan, as_json: bool) -> None:
    from wispprof.profiling.workload import format_duration

    shown = table(
        f"{len(plan.workloads)} shots, about {format_duration(plan.expected_s)} (by {plan.basis})",
        "kind",
        "workload",
    )
    for workload in plan.workloads:
        shown.add_row(workload.kind, workload.key)
    document = {
        "workloads": [{"kind": workload.kind, "key": workload.key} for workload in plan.workloads],
        "expected_s": plan.expected_s,
        "basis": plan.basis,
    }
    result(document, shown, as_json)


def finished(profile: ServerProfile | EdgeProfile | LinkProfile, out: Path, as_json: bool) -> None:
    from wispprof.artifacts.profile import profile_files

    summary = profile.manifest.summary
    drift = summary.get("drift", {})
    if drift.get("drifted"):
        warn(
            f"the machine drifted: {drift['off']} of {drift['sentinels']} looks at the sentinel were "
            f"off, {drift['set_aside']} samples were set aside, and {drift['drifted_rows']} rows rest on "
            "disturbed ones (flag 'drift'). Measure again when it is quiet."
        )
    if summary.get("left_out"):
        warn(
            f"{summary['left_out']} shots of the grid did not fit into the time. Give --budget-minutes, "
            "or --grid standard, for more."
        )
    if summary.get("out_of_time"):
        warn(f"{summary['out_of_time']} shots were left out: the time was up.")
    for key, reason in dict(summary.get("refused", {})).items():
        warn(f"{key} was left out: {reason}")
    note(f"wrote {profile_files(out)[0]} and its manifest")
    if as_json:
        result({"file": str(profile_files(out)[0]), **profile_document(profile)}, "", True)
    else:
        print_profile(profile, everything=False)


def profile_document(profile: Profile) -> dict[str, Any]:
    return {"hash": profile.hash, "manifest": profile.manifest.as_dict()}


def print_profile(profile: Profile, everything: bool) -> None:
    from wispprof.artifacts import StepRow

    manifest = profile.manifest
    machine = manifest.hardware.get("board") or manifest.hardware.get("cpu") or "unknown machine"
    model = " ".join(filter(None, (manifest.model.id, manifest.model.dtype)))
    title = f"{manifest.kind} profile: {model} on {machine}"
    if manifest.source != "measured":
        title += f" ({manifest.source})"
    if manifest.kind == "server":
        shown = table(title, "kind", "shape", ">median ms", ">± %", ">samples", "flags")
    else:
        shown = table(title, "kind", "what", ">median ms", ">± %", ">samples", "flags")
    from wispprof.profiling.measurement_log import half_width

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


def found_profile(path: Path) -> Path:
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
