"""Import what ``llama-bench -o json`` printed as an edge profile.

llama-bench tells average and single speeds of ``n_prompt`` tokens at once and of ``n_gen`` tokens one by
one, over ``n_depth`` cached ones. Its generation leaves out sampling, so the rows are draft steps
without features: a little optimistic, and marked ``imported``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from wispprof.artifacts import EdgeProfile, EdgeRow, Manifest, ModelInfo, make_profile, save_profile
from wispprof.artifacts.files import parse_json, read_bytes
from wispprof.artifacts.profile import profile_files
from wispprof.artifacts.provenance import command_line, library_versions
from wispprof.errors import ArtifactDamaged, ArtifactError, ProfileError
from wispprof.profiling.session import Output

__all__ = ["import_results", "rows_of"]


def import_results(file: Path, output: Output) -> EdgeProfile:
    """Read the results of one model and write an edge profile.

    Raises :class:`ArtifactDamaged` for what is not llama-bench's JSON, :class:`ProfileError` where it
    holds several models or no generation test.
    """
    data = read_bytes(file, "llama-bench results", "Make it with: llama-bench -o json > FILE.")
    entries = parse_json(data, str(file))
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        raise ArtifactDamaged(f"{file} is not a list of llama-bench tests.", "Use -o json.")
    if output.path is not None and not output.overwrite and profile_files(output.path)[0].exists():
        raise ArtifactError(
            f"{profile_files(output.path)[0]} exists.", "Choose another --out, or add --overwrite."
        )
    profile = make_profile(_manifest(entries, str(file)), rows_of(entries, str(file)))
    if output.path is not None:
        save_profile(profile, output.path)
    return cast(EdgeProfile, profile)


def rows_of(entries: Sequence[dict[str, Any]], where: str) -> list[EdgeRow]:
    """Prefill rows, draft steps and bursts; tests that mix prompt and generation are passed over."""
    rows: dict[str, EdgeRow] = {}
    for number, entry in enumerate(entries, start=1):
        try:
            prompt, generated = int(entry["n_prompt"]), int(entry["n_gen"])
            depth = int(entry.get("n_depth", 0))
            speeds = [float(s) for s in entry.get("samples_ts") or [entry["avg_ts"]]]
            build = f"llama-bench, llama.cpp build {entry.get('build_commit', 'unknown')}"
        except (KeyError, TypeError, ValueError) as fault:
            raise ArtifactDamaged(
                f"{where}, test {number}: {fault!r} is missing or not a number.",
                "Make the file anew with: llama-bench -o json.",
            ) from None
        if (prompt and generated) or not speeds or min(speeds) <= 0:
            continue
        many = prompt if prompt else 1
        # A generation test grows from its depth on: on average half of it lies behind each token.
        context = depth if prompt else depth + generated // 2
        kind = "prefill" if prompt else "draft_step"
        row = EdgeRow(
            f"{kind} {many}@{context}",
            kind,
            context,
            tuple(round(1000 * many / speed, 6) for speed in speeds),
            many,
            source="imported",
            citation=build,
        )
        rows[row.key] = replace(row, order=len(rows))
    if not any(row.kind == "draft_step" for row in rows.values()):
        raise ProfileError(
            f"{where} holds no generation test.", "Run llama-bench with -n 64 or the like."
        )
    return list(rows.values())


def _manifest(entries: Sequence[dict[str, Any]], where: str) -> Manifest:
    first = entries[0] if entries else {}
    names = {str(entry.get("model_filename", "")) for entry in entries}
    if len(names) > 1:
        raise ProfileError(
            f"{where} holds tests of several models: {', '.join(sorted(names))}.",
            "Run llama-bench for one model at a time.",
        )
    kept = ("n_threads", "n_gpu_layers", "backends", "flash_attn", "type_k", "type_v")
    return Manifest(
        kind="edge",
        model=ModelInfo(
            id=Path(str(first.get("model_filename") or "unknown")).name,
            dtype=str(first.get("model_type", "")),
            parameters=_whole(first.get("model_n_params")),
        ),
        command=command_line(),
        engine={"backend": "llama.cpp", **{k: first[k] for k in kept if k in first}},
        hardware={
            "cpu": str(first.get("cpu_info", "")),
            "gpus": [{"name": str(first["gpu_info"])}] if first.get("gpu_info") else [],
        },
        versions=library_versions(),
        started=str(first.get("test_time", "")),
        ended=str(first.get("test_time", "")),
        source="imported",
        citation=f"llama-bench, llama.cpp build {first.get('build_commit', 'unknown')}",
    )


def _whole(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0
