"""The ``wispprof profile`` group: show, validate, merge, diff, export, import."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wispprof.cli.console import note, result, table, warn
from wispprof.cli.options import JsonFlag
from wispprof.cli.profiling import (
    Out,
    Overwrite,
    finished,
    found_profile,
    output_of,
    print_profile,
    profile_document,
)

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the group to the tool."""
    group = typer.Typer(
        help="Show, validate, merge, compare, export and import profiles.", no_args_is_help=True
    )
    for command in (show, validate, merge, diff, export):
        group.command(command.__name__)(command)
    group.command("import-llama-bench")(import_llama_bench)
    app.add_typer(group, name="profile")


def show(
    profile: Annotated[Path, typer.Argument(help="A profile.")],
    rows: Annotated[bool, typer.Option("--rows", help="Every row, sentinels too.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Print a profile: where it comes from and what it says."""
    from wispprof.artifacts import load_profile
    from wispprof.profiling.profile_tools import row_record

    loaded = load_profile(found_profile(profile))
    if as_json:
        document = profile_document(loaded)
        document["rows"] = [row_record(row) for row in loaded.rows]
        result(document, "", True)
        return
    print_profile(loaded, everything=rows)


def validate(
    profiles: Annotated[list[Path], typer.Argument(help="Profiles or traces.")],
    as_json: JsonFlag = False,
) -> None:
    """Check files: whole, unchanged, and physically possible. Exit code 1 if one is not."""
    from wispprof.artifacts import ServerProfile, load_profile, load_trace
    from wispprof.errors import ArtifactError, ProfileError
    from wispprof.profiling.physics_checks import check_physics

    verdicts: dict[str, str] = {}
    for path in profiles:
        try:
            if _is_trace(path):
                load_trace(path)
            else:
                loaded = load_profile(found_profile(path))
                if isinstance(loaded, ServerProfile):
                    check_physics(loaded.rows, loaded.manifest.model)
            verdicts[str(path)] = "good"
        except (ArtifactError, ProfileError) as err:
            verdicts[str(path)] = str(err)
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
    from wispprof.cli.console import fail
    from wispprof.profiling.profile_tools import merge_profiles

    if profile_files(out)[0].exists() and not overwrite:
        raise fail(f"{profile_files(out)[0]} exists.", "Choose another --out, or add --overwrite.")
    merged = merge_profiles([load_profile(found_profile(path)) for path in profiles])
    save_profile(merged, out)
    finished(merged, out, as_json)


def diff(
    before: Annotated[Path, typer.Argument(help="The earlier profile.")],
    after: Annotated[Path, typer.Argument(help="The later profile.")],
    tolerance: Annotated[
        float, typer.Option(min=0.0, help="Medians closer than this share count as equal.")
    ] = 0.05,
    absolute: Annotated[
        bool,
        typer.Option("--absolute", help="A machine slower as a whole counts as changed, too."),
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Say which shapes changed beyond noise between two profiles of the same machine."""
    from wispprof.artifacts import load_profile
    from wispprof.profiling.profile_tools import diff_profiles

    found = diff_profiles(
        load_profile(found_profile(before)),
        load_profile(found_profile(after)),
        tolerance,
        absolute=absolute,
    )
    if not found.same_machine:
        warn("the profiles are of different machines")
    if not found.same_model:
        warn("the profiles are of different models")
    if found.drifted:
        warn("drift was seen while measuring: rows marked * may say more of the machine's load")
    shown = table(
        f"{len(found.changed)} of {len(found.rows)} shapes changed beyond noise "
        f"(median ratio of all {found.median_ratio:.3f}, of the sentinel "
        f"{found.sentinel_ratio:.3f}, divided out {found.slowdown:.3f})",
        "shape",
        ">before ms",
        ">after ms",
        ">ratio",
        ">p",
    )
    for row in sorted(found.changed, key=lambda row: -abs(row.ratio - 1)):
        mark = " *" if row.doubtful else ""
        shown.add_row(
            row.key + mark,
            f"{row.before_ms:.3f}",
            f"{row.after_ms:.3f}",
            f"{row.ratio:.3f}",
            f"{row.p_value:.1e}",
        )
    document = {
        "compared": len(found.rows),
        "changed": [
            {
                "key": r.key,
                "before_ms": r.before_ms,
                "after_ms": r.after_ms,
                "p_value": r.p_value,
                "doubtful": r.doubtful,
            }
            for r in found.changed
        ],
        "changed_share": found.changed_share,
        "median_ratio": found.median_ratio,
        "sentinel_ratio": found.sentinel_ratio,
        "slowdown": found.slowdown,
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
    from wispprof.profiling.profile_tools import export_rows

    count = export_rows(load_profile(found_profile(profile)), to)
    note(f"wrote {count} rows to {to}")


def import_llama_bench(
    file: Annotated[Path, typer.Argument(help="What llama-bench -o json printed.")],
    out: Out = Path("edge"),
    overwrite: Overwrite = False,
    as_json: JsonFlag = False,
) -> None:
    """Make an edge profile of llama-bench's results."""
    from wispprof.profiling.imported_profiles import import_results

    profile = import_results(file, output_of(out, False, overwrite))
    finished(profile, out, as_json)


def _is_trace(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(40).startswith(b'{"format":"wispprof/trace"')
