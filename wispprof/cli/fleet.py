"""``wispprof fleet``: how many of which server for a fleet of devices, at what price."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wispprof.cli.console import INTERRUPTED, note, output, result, table, tracker
from wispprof.cli.options import Jobs, JsonFlag, OutputFile, with_settings
from wispprof.settings.planner_settings import FleetSettings

if TYPE_CHECKING:
    from rich.table import Table

    from wispprof.artifacts.fleet_answer import FleetAnswer


@with_settings
def fleet(
    description: Annotated[Path, typer.Argument(help="Fleet description (TOML), see docs/fleet.md.")],
    settings: FleetSettings,
    prices: Annotated[Path | None, typer.Option(help="Price list; default: the shipped one.")] = None,
    pays: Annotated[
        bool, typer.Option("--pays", help="Also map where drafting pays, for every shipped GPU profile.")
    ] = False,
    jobs: Jobs = None,
    out: OutputFile = Path("fleet.json"),
    as_json: JsonFlag = False,
) -> None:
    """Rank servers and systems for a fleet by price, and verify the best by simulation.

    Takes minutes to half an hour, by the number of requests; --estimate takes seconds. Ctrl-C prints what is
    known by then.
    """
    from dataclasses import replace

    from wispprof.artifacts.fleet_answer import load_fleet, save_fleet
    from wispprof.planning.explain_fleet import in_words
    from wispprof.planning.fleet_file import read_fleet
    from wispprof.planning.fleet_planner import plan_fleet
    from wispprof.planning.pays_map import pays_map
    from wispprof.planning.replica_model import SYSTEM_NAMES
    from wispprof.simulation.capacity_search import workers

    spec = read_fleet(description, SYSTEM_NAMES, prices)
    with workers(jobs) as executor, tracker("fleet", eta=False) as report:
        done = 0

        def progress(doing: str) -> None:
            nonlocal done
            done += 1
            report(done, status=doing)

        answer = plan_fleet(spec, settings, executor, progress)
        if pays and answer.complete:
            answer = replace(answer, pays=pays_map(spec, progress))
    save_fleet(answer, out)
    note(f"wrote {out}")
    answer = load_fleet(out)
    result(answer, _ranking(answer), as_json)
    if not as_json:
        for line in (*in_words(answer), *answer.notes):
            output().print(line, markup=False)
    if not answer.complete:
        raise typer.Exit(INTERRUPTED)


def _ranking(answer: FleetAnswer) -> Table:
    from wispprof.planning.explain_fleet import LIMITS

    rows = (
        (
            o.system,
            o.server,
            f"{o.servers} + {answer.spare}" if o.servers else "–",
            o.dollars_per_h or None,
            o.dollars_per_mtoken or None,
            o.joules_per_token or None,
            o.attainment,
            o.fleet_attainment,
            f"× {o.burst:g}" if o.burst else None,
            LIMITS[o.bound_by] + ("" if o.simulated or o.bound_by in ("never", "dear") else " (estimated)"),
        )
        for o in answer.options
    )
    return table(
        answer.title,
        "system|server|servers|$/h:.2f|$/M:.2f|J/tok:.2f|SLO met:.1%|whole\nfleet:.1%|burst|bound by",
        rows,
        f"Prices of {answer.prices_as_of}. $/M: dollars for a million tokens over the day; J/tok: at the "
        "busiest hour. SLO met: with the servers that suffice. Whole fleet: the same, all servers simulated "
        "with other random numbers. Burst: greatest one that the bought servers bear.",
    )
