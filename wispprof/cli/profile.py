"""``wispprof profile``: show, validate, merge, compare, export and import profiles."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wispprof.cli.console import note, output, result, table, warn
from wispprof.cli.options import JsonFlag
from wispprof.settings.sources import named_value

if TYPE_CHECKING:
    from wispprof.artifacts import EdgeProfile, LinkProfile, Profile, ServerProfile
    from wispprof.artifacts.manifest import Manifest
    from wispprof.artifacts.rows import EdgeRow, LinkRow, StepRow

Out = Annotated[Path, typer.Option("--out", "-o", help="Name of the profile to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]


group = typer.Typer(help="Show, validate, merge, compare, export and import profiles.", no_args_is_help=True)


@group.command()
def show(
    profile: Annotated[Path, typer.Argument(help="A profile, or the name of a shipped one.")],
    rows: Annotated[
        bool, typer.Option("--rows", help="Every row, also ragged shapes and the reference workload.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Print a profile with its origin."""
    from wispprof.artifacts import load_profile
    from wispprof.profiling.profile_tools import row_record

    loaded = load_profile(profile)
    if as_json:
        document = _profile_document(loaded)
        document["rows"] = [row_record(row) for row in loaded.rows]
        result(document, "", True)
        return
    _print_profile(loaded, everything=rows)


@group.command()
def validate(
    profiles: Annotated[list[Path], typer.Argument(help="Profiles or traces.")], as_json: JsonFlag = False
) -> None:
    """Check that files are complete, unmodified and physically possible; exit code 1 if not."""
    from wispprof.artifacts import EdgeProfile, ServerProfile, load_profile, load_trace
    from wispprof.errors import ArtifactError, ProfileError
    from wispprof.profiling.physics_checks import check_edge, check_physics

    verdicts: dict[str, str] = {}
    for path in profiles:
        try:
            if _is_trace(path):
                load_trace(path)
            else:
                loaded = load_profile(path)
                if isinstance(loaded, ServerProfile):
                    check_physics(loaded.rows, loaded.manifest.model)
                if isinstance(loaded, EdgeProfile):
                    check_edge(loaded.rows)
            verdicts[str(path)] = "good"
        except (ArtifactError, ProfileError) as err:
            verdicts[str(path)] = str(err)
    result(verdicts, table("Validation", "file|verdict", verdicts.items()), as_json)
    if any(verdict != "good" for verdict in verdicts.values()):
        raise typer.Exit(1)


@group.command()
def merge(
    profiles: Annotated[list[Path], typer.Argument(help="Profiles of one model on one machine.")],
    out: Out,
    overwrite: Overwrite = False,
    as_json: JsonFlag = False,
) -> None:
    """Merge profiles; of rows with the same key the less disturbed one stays."""
    from wispprof.artifacts import load_profile, save_profile
    from wispprof.artifacts.profile import profile_files
    from wispprof.cli.console import fail
    from wispprof.profiling.profile_tools import merge_profiles

    if profile_files(out)[0].exists() and not overwrite:
        raise fail(f"{profile_files(out)[0]} exists.", "Choose another --out, or add --overwrite.")
    merged = merge_profiles([load_profile(path) for path in profiles])
    save_profile(merged, out)
    finished(merged, out, as_json)


@group.command()
def diff(
    before: Annotated[Path, typer.Argument(help="The earlier profile.")],
    after: Annotated[Path, typer.Argument(help="The later profile.")],
    tolerance: Annotated[
        float, typer.Option(min=0.0, help="Medians closer than this share count as equal.")
    ] = 0.05,
    absolute: Annotated[
        bool, typer.Option("--absolute", help="Count a machine that is slower as a whole as changed.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """List the shapes that changed beyond noise between two profiles of a machine."""
    from wispprof.artifacts import load_profile
    from wispprof.profiling.profile_tools import diff_profiles

    found = diff_profiles(
        load_profile(before),
        load_profile(after),
        tolerance,
        absolute=absolute,
    )
    if not found.same_machine:
        warn("the profiles are of different machines")
    if not found.same_model:
        warn("the profiles are of different models")
    if found.drifted:
        warn("the machine's speed drifted while measuring: rows marked * are doubtful")
    shown = table(
        f"{len(found.changed)} of {len(found.rows)} shapes changed beyond noise "
        f"(median ratio of all {found.median_ratio:.3f}, of the reference workload "
        f"{found.sentinel_ratio:.3f}, divided out {found.slowdown:.3f})",
        "shape|before ms:.3f|after ms:.3f|ratio:.3f|p:.1e",
        (
            (f"{r.key} *" if r.doubtful else r.key, r.before_ms, r.after_ms, r.ratio, r.p_value)
            for r in sorted(found.changed, key=lambda row: -abs(row.ratio - 1))
        ),
    )
    names = (
        *("changed", "changed_share", "median_ratio", "sentinel_ratio", "slowdown"),
        *("only_before", "only_after", "same_machine", "same_model", "drifted"),
    )
    document = {"compared": len(found.rows), **{name: getattr(found, name) for name in names}}
    result(document, shown, as_json)


@group.command()
def export(
    profile: Annotated[Path, typer.Argument(help="A profile, or the name of a shipped one.")],
    to: Annotated[Path, typer.Argument(help="A file in .csv or .parquet.")],
) -> None:
    """Write a profile's rows as a table for other tools."""
    from wispprof.artifacts import load_profile
    from wispprof.profiling.profile_tools import export_rows

    count = export_rows(load_profile(profile), to)
    note(f"wrote {count} rows to {to}")


@group.command()
def import_llama_bench(
    file: Annotated[Path, typer.Argument(help="What llama-bench -o json or -o jsonl printed.")],
    where: Annotated[
        list[str] | None,
        typer.Option(help="Only tests with this field, as n_threads=4, of a matrix; repeatable."),
    ] = None,
    out: Out = Path("edge"),
    overwrite: Overwrite = False,
    as_json: JsonFlag = False,
) -> None:
    """Make an edge profile of llama-bench's results."""
    from wispprof.profiling.llama_bench import import_results
    from wispprof.settings.profiler_settings import Output

    profile = import_results(file, Output(out, overwrite=overwrite), dict(map(named_value, where or ())))
    finished(profile, out, as_json)


@group.command()
def import_gpu(
    system: Annotated[str, typer.Option(help="GPU by its name in the tables, as h200_sxm.")],
    model: Annotated[
        str, typer.Option(help="Model by its hub id, as Qwen/Qwen3-32B. Nothing is downloaded.")
    ],
    tp: Annotated[int, typer.Option(help="GPUs of a replica (tensor parallel): 1, 2, 4 or 8.")] = 1,
    framework: Annotated[str, typer.Option(help="vllm, trtllm or sglang.")] = "vllm",
    dtype: Annotated[str, typer.Option(help="Weights: bf16 or fp8.")] = "bf16",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Profile to write; default: the target's name, such as h200-sxm-qwen3-32b-vllm-bf16-tp2.",
        ),
    ] = None,
    overwrite: Overwrite = False,
    as_json: JsonFlag = False,
) -> None:
    """Make a server profile and its estimator from measured operators of a GPU (extra: gpu-tables)."""
    from wispprof.cli.console import tracker
    from wispprof.fitting.pipeline import save_beside
    from wispprof.profiling.gpu_import import import_profile
    from wispprof.profiling.operator_tables import GpuTarget
    from wispprof.settings.profiler_settings import Output

    target = GpuTarget(system, model, tp, framework, dtype)
    path = out or Path(target.name)
    with tracker("import-gpu") as report:
        profile = import_profile(target, Output(path, overwrite=overwrite), report)
    note(f"wrote {save_beside(profile, path)}")
    finished(profile, path, as_json)


@group.command()
def gpus(as_json: JsonFlag = False) -> None:
    """List the GPUs and models that import-gpu knows (extra: gpu-tables), and the profiles that ship."""
    from rich.console import Group

    from wispprof.artifacts.manifest import origin_shares
    from wispprof.artifacts.profile import shipped_servers
    from wispprof.errors import ProfileError
    from wispprof.profiling import operator_tables

    shipped = shipped_servers()
    known: dict[str, Any] = {"shipped": sorted(shipped)}
    columns = "profile|framework|KV tokens:,|step time"
    rows = [
        (
            name,
            f"{manifest.engine['backend']} {manifest.engine['version']}",
            manifest.engine["kv_tokens"],
            origin_shares(manifest),
        )
        for name, manifest in sorted(shipped.items())
    ]
    shown: list[Any] = [table("Shipped profiles of GPUs", columns, rows)]
    try:
        known["systems"], known["models"] = operator_tables.systems(), operator_tables.models()
    except ProfileError as err:
        note(str(err))
    else:
        cells = (
            (s["system"], s["memory_gib"], *(s["versions"].get(f, "–") for f in operator_tables.FRAMEWORKS))
            for s in known["systems"]
            if s["versions"]
        )
        heads = "|".join(("system", "GiB", *operator_tables.FRAMEWORKS))
        shown.append(table("GPUs in the tables, and the version measured under each framework", heads, cells))
        shown.append(f"Models: {', '.join(known['models'])}")
    result(known, Group(*shown), as_json)


def _is_trace(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(40).startswith(b'{"format":"wispprof/trace"')


def finished(profile: ServerProfile | EdgeProfile | LinkProfile, out: Path, as_json: bool) -> None:
    """Print a profile that was just written, and what is wrong with it."""
    from wispprof.artifacts.profile import profile_files

    summary = profile.manifest.summary
    drift = summary.get("drift", {})
    if drift.get("drifted"):
        warn(
            f"the machine's speed drifted: {drift['off']} of {drift['sentinels']} reference "
            f"measurements deviated, {drift['set_aside']} samples were set aside, and "
            f"{drift['drifted_rows']} rows rest on disturbed samples (flag 'drift'). "
            "Measure again when the machine is idle."
        )
    if summary.get("left_out"):
        warn(
            f"{summary['left_out']} shapes of the grid did not fit into the time limit. Give "
            "--budget-minutes, or --grid standard, to measure more."
        )
    if summary.get("out_of_time"):
        warn(f"the time limit left {summary['out_of_time']} of the chosen shapes unmeasured.")
    for key, reason in dict(summary.get("refused", {})).items():
        warn(f"{key} was skipped: {reason}")
    note(f"wrote {profile_files(out)[0]} and its manifest")
    if as_json:
        result({"file": str(profile_files(out)[0]), **_profile_document(profile)}, "", True)
    else:
        _print_profile(profile, everything=False)


def _profile_document(profile: Profile) -> dict[str, Any]:
    return {"hash": profile.hash, "manifest": profile.manifest}


_FACTS = {
    "seconds": "seconds taken",
    "expected_s": "seconds announced",
    "noisy_rows": "noisy rows",
    "out_of_time": "not measured in time",
    "left_out": "left out of the grid",
    "weight_bytes_per_gpu": "bytes of weights on a GPU",
    "tables_hash": "tables",
    "split": "largest error of a batch priced as two groups",
    "naive_split": "the same if the attention of both is added",
    "rows_moved": "curves by rows moved by at most",
    "head_moved": "output head moved by at most",
}
"""What the fields of a manifest's summary are called in print."""
_SHARES = ("split", "naive_split", "rows_moved", "head_moved")


def _print_profile(profile: Profile, everything: bool) -> None:
    from wispprof.artifacts import StepRow
    from wispprof.artifacts.median_interval import half_width

    manifest = profile.manifest
    machine = manifest.hardware.get("board") or manifest.hardware.get("cpu") or _gpus(manifest)
    model = " ".join(filter(None, (manifest.model.id, manifest.model.dtype)))
    title = f"{manifest.kind} profile: {model} on {machine}"
    if manifest.source != "measured":
        title += f" ({manifest.source})"
    _print_origin(manifest)
    subject = "shape" if manifest.kind == "server" else "workload"
    rows = [row for row in profile.rows if everything or row.kind != "sentinel"]
    left_out = 0
    if not everything:
        rows.sort(key=lambda row: (row.kind, _size(row), row.key))
        shown = [row for row in rows if not isinstance(row, StepRow) or "+" not in row.shape.key()]
        rows, left_out = shown, len(rows) - len(shown)
    cells = (
        (
            row.kind,
            row.shape.key() if isinstance(row, StepRow) else row.key,
            row.median_ms,
            100 * width if (width := half_width(row.samples_ms)) < math.inf else None,
            len(row.samples_ms),
            " ".join(row.flags),
        )
        for row in rows
    )
    columns = f"kind|{subject}|median ms:.4g|± %:.1f|samples|flags"
    below = []
    if manifest.source == "measured":
        below.append("± %: 95 % interval of the median; none of fewer than 6 samples.")
    if left_out:
        below.append(f"{left_out} shapes of unequal sessions are not shown: --rows prints all.")
    output().print(table(title, columns, cells, " ".join(below)))


def _print_origin(manifest: Manifest) -> None:
    """Where the rows come from, and what the profiler found besides."""
    from wispprof.artifacts.manifest import origin_shares

    if manifest.citation:
        output().print(f"{manifest.source}: {manifest.citation}", markup=False)
    if shares := origin_shares(manifest):
        output().print(f"step time: {shares}", markup=False)
    if step := manifest.summary.get("draft_step"):
        line = (
            f"draft step on the server: {step['model']}, {step['ms']:.2f} ms + {step['row_ms']:.3f} a session"
        )
        output().print(line, markup=False)
    skip = ("drift", "physics", "refused", "origins", "draft_step")
    facts = [(k, v) for k, v in manifest.summary.items() if k not in skip and v is not None]
    if facts:
        output().print("  ".join(f"{_FACTS.get(k, k)}: {_fact(k, v)}" for k, v in facts), markup=False)


def _fact(key: str, value: Any) -> str:
    return f"{value:.2g} of the time" if key in _SHARES else str(value)


def _gpus(manifest: Manifest) -> str:
    """The GPUs of a machine that has no other name."""
    found = (f"{gpu.get('count', 1)} × {gpu['name']}" for gpu in manifest.hardware.get("gpus", ()))
    return ", ".join(found) or "unknown machine"


def _size(row: StepRow | EdgeRow | LinkRow) -> int:
    from wispprof.artifacts.rows import EdgeRow, StepRow

    if isinstance(row, StepRow):
        return row.shape.attention_pairs
    return row.context if isinstance(row, EdgeRow) else row.payload_bytes
