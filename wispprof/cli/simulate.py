"""``wispprof simulate`` and ``reproduce``: simulated fleets, and published results beside simulated ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wispprof.cli.console import note, result, table, tracker
from wispprof.cli.options import Jobs, JsonFlag, with_settings
from wispprof.settings.fleet_settings import SimulationSettings

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from wispprof.simulation.metrics import Report
    from wispprof.simulation.reproduce import Figure, ReproducedTable


@with_settings
def simulate(settings: SimulationSettings, jobs: Jobs = None, as_json: JsonFlag = False) -> None:
    """Simulate a fleet of edges on one server under several policies."""
    from wispprof.simulation.scenario_inputs import scenarios_of

    scenarios, notes = scenarios_of(settings)
    for line in notes:
        note(line)
    run = _capacities if settings.capacity else _runs
    document, shown = run(scenarios, settings.violations, jobs)
    load = _load(settings)
    if settings.out is not None:
        _write_curves(settings, document, f"{load} {'; '.join(notes) or 'no files'}.")
    document |= {"load": load, "inputs": list(notes)}
    shown.caption = f"{load} {shown.caption or ''}".rstrip()
    result(document, shown, as_json)


def _load(settings: SimulationSettings) -> str:
    """What was simulated, in a sentence."""
    speeds, load = ", ".join(f"{speed:g}" for speed in settings.tokens_per_s), settings.load
    who = f"{load.devices} devices" if load.arrivals == "closed" else f"arrivals {load.arrivals}"
    if settings.capacity:
        who = "Closed fleets"
    ttft = f", first token in {settings.ttft_ms:g} ms" if settings.ttft_ms else ""
    return (
        f"{who}, SLO of {speeds} tokens/s{ttft}, round trip {settings.link.rtt_ms:g} ms, prompts of "
        f"{load.prompt} and outputs of {load.output} tokens (medians), {settings.seconds:g} s of which "
        f"{settings.uncounted_s:g} are not counted, seed {settings.seed}."
    )


def _runs(scenarios: list[Any], violations: float, jobs: int | None) -> tuple[dict[str, Any], Table]:
    from wispprof.simulation.capacity_search import run_all, workers

    with (
        workers(jobs if len(scenarios) > 1 else 1) as executor,
        tracker("simulate", len(scenarios)) as report,
    ):
        reports = run_all(scenarios, executor, lambda done, word: report(done, status=word))
    return {"runs": [asdict(r) for r in reports]}, _report_table(reports)


def _capacities(scenarios: list[Any], violations: float, jobs: int | None) -> tuple[dict[str, Any], Table]:
    import os

    from wispprof.simulation.capacity_search import capacity, workers

    wide = jobs or os.cpu_count() or 1
    rows, found = [], []
    with workers(wide) as executor, tracker("capacity", eta=False) as report:
        for scenario in scenarios:
            answer = capacity(
                scenario,
                violations=violations,
                wide=wide,
                executor=executor,
                progress=lambda done, word, s=scenario: report(  # type: ignore[misc]
                    done, status=f"{s.system.label}, {word}"
                ),
            )
            best, label = answer.report, scenario.system.label
            devices = answer.devices if answer.bounded else f">= {answer.devices}"
            figures = (best.attainment, best.goodput, best.mean_step_ms) if best else (None,) * 3
            rows.append((label, devices, *figures, len(answer.probes)))
            found.append(
                {
                    "system": label,
                    "devices": answer.devices,
                    "bounded": answer.bounded,
                    "violations": answer.violations,
                    "probes": [list(p) for p in answer.probes],
                    "report": asdict(best) if best else None,
                }
            )
    columns = "system|devices|SLO met:.1%|goodput|step ms|runs"
    return {"capacities": found}, table(f"Capacity within {violations:.0%} violations", columns, rows)


def _write_curves(settings: SimulationSettings, document: Mapping[str, Any], load: str) -> None:
    """Write the curves of a capacity search as an artifact that ``wispprof report`` draws."""
    from wispprof.artifacts import write_document
    from wispprof.reporting import CAPACITY_KIND

    assert settings.out is not None
    systems = [
        {
            "system": c["system"],
            "devices": c["devices"],
            "bounded": c["bounded"],
            # A fleet in which no session was counted has no share.
            "probes": [[n, None if math.isnan(share) else share] for n, share in c["probes"]],
        }
        for c in document["capacities"]
    ]
    body = {"violations": settings.violations, "load": load, "systems": systems}
    write_document(settings.out, CAPACITY_KIND, body)
    note(f"wrote {settings.out}")


def _report_table(reports: list[Report]) -> Table:
    rows = (
        (
            r.system,
            r.attainment,
            r.goodput,
            *r.ttft_ms[:2],
            *r.tpot_ms[:2],
            r.mean_step_ms,
            r.accepted_per_round,
            r.wasted_share,
        )
        for r in reports
    )
    shown = table(
        "Simulated fleet",
        "system|SLO met:.1%|goodput:.0f|TTFT p50:.0f|TTFT p95:.0f|TPOT p50|TPOT p95|step|accepted|wasted:.1%",
        rows,
        "goodput: tokens/s of sessions that met their SLO; TTFT, TPOT (at the device) and mean step "
        "in ms; accepted: drafts per round (asynchronous drafting: per step); wasted: share "
        "of drafting time. Compare with server-only: not all of a gain is due to drafts.",
    )
    shown.padding = 0  # ten columns within 80 characters
    return shown


def reproduce(
    paper: Annotated[str, typer.Argument(help="wisp, specedge or configspec.")],
    jobs: Jobs = None,
    as_json: JsonFlag = False,
) -> None:
    """Compare published results with the simulator's.

    configspec takes seconds, specedge a minute. wisp searches 50 capacities: half an hour on one core, less
    with more (--jobs). Nothing is written; --json prints what a file may keep.
    """
    from wispprof.errors import PlanError, suggestion
    from wispprof.simulation.capacity_search import workers
    from wispprof.simulation.reproduce import PAPERS

    make = PAPERS.get(paper)
    if make is None:
        raise PlanError(f"There is no paper {paper!r}.", suggestion(paper, PAPERS))
    with workers(jobs) as executor, tracker(f"reproduce {paper}", eta=False) as report:
        found = make(executor, lambda done, word: report(done, status=word))
    result(_comparison(found), comparison_table(found), as_json)


def _comparison(found: ReproducedTable) -> Mapping[str, Any]:
    return {
        "paper": found.title,
        "citation": found.citation,
        "within": found.within,
        "assumptions": found.assumptions,
        "figures": [
            {"name": f.name, "published": f.published, "simulated": f.simulated, "verdict": found.verdict(f)}
            for f in found.figures
        ],
    }


def comparison_table(found: ReproducedTable) -> RenderableType:
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
    shown = table(f"{found.title} ({found.citation})", columns, rows)
    shown.padding = 0  # ten setups within 80 characters
    return Group(
        shown,
        legend,
        f"\nwithin {found.within:.0%}: the setups that differ from the paper by no more; if there is none, "
        "the nearest one and by how much it differs.",
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
