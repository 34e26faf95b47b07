"""``wispprof report``: the HTML report of a run, made again from its artifacts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wispprof.cli import common

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add ``report`` to the commands."""
    app.command("report")(report)


def report(
    run: Annotated[Path, typer.Argument(help="Folder with the artifacts of a run.")] = Path(
        "out/demo"
    ),
    out: Annotated[
        Path | None, typer.Option(help="File to write (default: report.html in the folder).")
    ] = None,
    as_json: common.JsonFlag = False,
) -> None:
    """Write one self-contained HTML page from whatever artifacts a folder holds."""
    from wispprof.reporting import load_run, write_report

    loaded = load_run(run)
    stale = loaded.stale()
    if stale:
        common.warn(f"{', '.join(stale)}: made from files that have changed since.")
    file = write_report(loaded, out or run / "report.html")
    common.result(
        {"report": file, "artifacts": loaded.names(), "stale": stale},
        f"{file} ({file.stat().st_size / 1024:.0f} KiB, from {len(loaded.names())} artifacts)",
        as_json,
    )
