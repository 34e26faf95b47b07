"""``wispprof report`` and ``reproduce``: a run's HTML report; published results beside simulated ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wispprof.cli.console import result, table, tracker, warn
from wispprof.cli.options import Jobs, JsonFlag
from wispprof.settings.shared_settings import DEMO_FOLDER

if TYPE_CHECKING:
    from rich.console import RenderableType

    from wispprof.simulation.reproduce import Figure, ReproducedTable


def register(app: typer.Typer) -> None:
    """Add the commands to the tool."""
    app.command("reproduce")(reproduce)
    app.command("report")(report)


def report(
    run: Annotated[Path, typer.Argument(help="Folder with the artifacts of a run.")] = DEMO_FOLDER,
    out: Annotated[
        Path | None, typer.Option(help="File to write; default: report.html in the folder.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Write a self-contained HTML report of a folder of artifacts."""
    from wispprof.reporting import load_run, write_report

    loaded = load_run(run)
    stale = loaded.stale()
    if stale:
        warn(f"{', '.join(stale)}: made from files that have changed since.")
    file = write_report(loaded, out or run / "report.html")
    result(
        {"report": file, "artifacts": loaded.names(), "stale": stale},
        f"{file} ({file.stat().st_size / 1024:.0f} KiB, from {len(loaded.names())} artifacts)",
        as_json,
    )


def reproduce(
    paper: Annotated[str, typer.Argument(help="wisp, specedge or configspec.")],
    jobs: Jobs = None,
    as_json: JsonFlag = False,
) -> None:
    """Compare published results with the simulator's."""
    from wispprof.errors import PlanError, suggestion
    from wispprof.simulation.capacity_search import workers
    from wispprof.simulation.reproduce import PAPERS

    make = PAPERS.get(paper)
    if make is None:
        raise PlanError(f"There is no paper {paper!r}.", suggestion(paper, PAPERS))
    with workers(jobs) as executor, tracker(f"reproduce {paper}") as report:
        found = make(executor, lambda done, word: report(done, status=word))
    result(_document(found), shown(found), as_json)


def _document(found: ReproducedTable) -> Mapping[str, Any]:
    return {
        "paper": found.title,
        "citation": found.citation,
        "within": found.within,
        "assumptions": found.assumptions,
        "figures": [
            {
                "name": f.name,
                "published": f.published,
                "simulated": f.simulated,
                "verdict": found.verdict(f),
            }
            for f in found.figures
        ],
    }


def shown(found: ReproducedTable) -> RenderableType:
    """A table with one lettered column per setup, which fits 80 characters, and its legend."""
    from rich.console import Group
    from rich.table import Table as Grid

    letters = dict(zip(found.assumptions, "ABCDEFGHIJ", strict=False))
    rows: list[tuple[str, ...]] = []

    def row(label: str, figure: Figure) -> None:
        good = " ".join(letters[name] for name in figure.within(found.within))
        nearest = figure.nearest()
        if not good and nearest is not None:
            good = f"no: {letters[nearest[0]]} {nearest[1] - 1.0:+.0%}"
        figures = map(_number, (figure.published, *figure.simulated.values()))
        rows.append((label, *figures, good or "–"))

    for group, members in groupby(found.figures, lambda figure: _parts(figure.name)[0]):
        figures = list(members)
        if len(figures) == 1:
            row(figures[0].name, figures[0])
            continue
        rows.append((group, *("" for _ in range(len(letters) + 2))))
        for figure in figures:
            row(f"  {_parts(figure.name)[1]}", figure)
    columns = "|".join(
        ("figure", "paper:g", *(f"{c}:g" for c in letters.values()), f"within {found.within:.0%}")
    )
    legend = Grid.grid(padding=(0, 1))
    for name, why in found.assumptions.items():
        legend.add_row(letters[name], f"[bold]{name}[/bold]: {why}")
    return Group(
        table(f"{found.title} ({found.citation})", columns, rows),
        legend,
        f"\nwithin {found.within:.0%}: the setups that differ from the paper by no more, or the nearest.",
    )


def _number(value: float) -> str:
    if math.isnan(value):
        return "–"
    digits = 0 if value == round(value) or value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{digits}f}"


def _parts(name: str) -> tuple[str, str]:
    """A figure's name as group and label."""
    group, _, label = name.rpartition(": " if ": " in name else ", ")
    return group, label
