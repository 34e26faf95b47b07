"""What both profilers share: where rows go while a sweep runs, and how they become a profile."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wispprof.artifacts import Manifest, ModelInfo, Profile, RowJournal, make_profile, save_profile
from wispprof.artifacts.profile import profile_files
from wispprof.artifacts.provenance import command_line, library_versions, utc_now
from wispprof.errors import ArtifactError
from wispprof.hardware import fingerprint
from wispprof.profiling.sweep import Shot, SweepResult, SweepSettings, drift_summary

__all__ = ["Announcement", "Output", "begin_manifest", "journal_file", "open_journal", "seal"]


@dataclass(frozen=True)
class Output:
    """Where a profile goes. Without ``path`` it is only returned, and nothing is journaled."""

    path: Path | None = None
    resume: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class Announcement:
    """A dry run: the shots in the order of the grid, and what they are expected to take."""

    shots: tuple[Shot[Any], ...]
    expected_s: float


def journal_file(path: Path) -> Path:
    """Where the rows of an unfinished sweep lie: ``NAME.journal.jsonl``."""
    return profile_files(path)[0].with_suffix(".journal.jsonl")


@contextlib.contextmanager
def open_journal(output: Output, manifest: Manifest) -> Iterator[RowJournal | None]:
    """The journal of this sweep; None where nothing is to be written.

    Its header holds what must be equal for rows of two runs to stand in one profile.
    """
    if output.path is None:
        yield None
        return
    rows_file = profile_files(output.path)[0]
    path = journal_file(output.path)
    if rows_file.exists() and not path.exists() and not output.overwrite:
        raise ArtifactError(
            f"{rows_file} exists.", "Choose another --out, or replace it with --overwrite."
        )
    header = {
        "model": dataclasses.asdict(manifest.model),
        "engine": manifest.engine,
        "measure": manifest.measure,
        "seed": manifest.seed,
        "hardware": manifest.hardware.get("hash", ""),
    }
    with RowJournal(
        path, manifest.kind, header, resume=output.resume, overwrite=output.overwrite
    ) as journal:
        yield journal


def begin_manifest(
    kind: str,
    model: ModelInfo,
    sweep: SweepSettings,
    *,
    engine: Mapping[str, Any],
    measure: Mapping[str, Any],
) -> Manifest:
    """A manifest with everything that is known before the first shot."""
    return Manifest(
        kind=kind,
        model=model,
        command=command_line(),
        seed=sweep.seed,
        engine=dict(engine),
        hardware=fingerprint().as_dict(),
        measure={**dataclasses.asdict(sweep), **measure},
        versions=library_versions(),
        started=utc_now(),
    )


def seal(
    manifest: Manifest,
    result: SweepResult,
    output: Output,
    journal: RowJournal | None,
    summary: Mapping[str, Any],
) -> Profile:
    """Rows and manifest become a profile; its files replace the journal."""
    drift = drift_summary(result.rows, float(manifest.measure["drift"]))
    whole = replace(
        manifest,
        ended=utc_now(),
        summary={
            "seconds": round(result.seconds, 2),
            "expected_s": round(result.expected_s, 2),
            "drift": drift,
            "noisy_rows": sum("noisy" in row.flags for row in result.rows),
            "refused": result.refused,
            "out_of_time": result.out_of_time,
            **summary,
        },
    )
    profile = make_profile(whole, result.rows)
    if output.path is not None:
        save_profile(profile, output.path)
        if journal is not None:
            journal.remove()
    return profile
