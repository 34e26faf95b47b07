"""Where results are written, and whether those already there can be read."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from wispprof.doctor.findings import Finding, Situation

__all__ = ["artifacts", "output_folder"]

ROOM_BYTES = 200 << 20


def output_folder(situation: Situation) -> Finding:
    """Results can be written, and there is room for them."""
    folder = situation.out.absolute()
    there = next(f for f in (folder, *folder.parents) if f.exists())
    if not there.is_dir():
        return Finding(
            "output folder", "fail", f"{there} is a file.", "Move it, or choose another --out."
        )
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as fault:
        return Finding(
            "output folder",
            "fail",
            f"Nothing can be written to {there}: {fault.strerror}.",
            "Choose another --out, or change its permissions.",
        )
    free = shutil.disk_usage(there).free
    if free < ROOM_BYTES:
        return Finding(
            "output folder",
            "warn",
            f"{free >> 20} MiB are free on the disk of {there}.",
            "Make room: profiles keep every raw sample.",
        )
    return Finding("output folder", "ok", f"{situation.out}, {free >> 30} GiB free")


def artifacts(situation: Situation) -> Finding:
    """Every artifact of a run is whole, of a version this tool reads, and made from its neighbours."""
    if situation.run is None:
        return Finding("artifacts", "skip", "no --run folder named")
    if not situation.run.is_dir():
        return Finding("artifacts", "fail", f"There is no folder {situation.run}.", "Check --run.")
    from wispprof.reporting.run import load_run

    run = load_run(Path(situation.run))
    stale = run.stale()
    if stale:
        return Finding(
            "artifacts",
            "warn",
            f"Made from files that have changed since: {', '.join(stale)}.",
            "Fit and plan again.",
        )
    return Finding("artifacts", "ok", f"{', '.join(run.names())} are whole and belong together")
