"""Which of several drafts a machine should run: the best by the objective in each cell, and the front.

Drafts of one machine (models, sizes, quantisations) are planned as devices of their own, called
``machine:draft``. Here their rows are held against each other.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from wispprof.artifacts.plan import ChoiceRow, DraftRow, Plan, machine_of
from wispprof.planning.objective import Figures, choose, on_front
from wispprof.settings.planner_settings import PlanSettings

__all__ = ["Option", "choices", "front"]


class Option(NamedTuple):
    """A device, a draft length, and what they give in a cell. ``keeps``: the promise is kept with it;
    ``planned``: it is the length that the device's row names."""

    device: str
    k: int
    figures: Figures
    keeps: bool
    planned: bool


def choices(rows: Iterable[DraftRow], settings: PlanSettings) -> list[ChoiceRow]:
    """The best draft in every cell of every machine that has more than one."""
    cells: dict[tuple[object, ...], list[DraftRow]] = {}
    for row in rows:
        machine = machine_of(row.device)
        key = (machine, row.rtt_ms, row.load_level, row.tokens_per_s, row.mode)
        cells.setdefault(key, []).append(row)
    return [_choice(rivals, settings) for rivals in cells.values() if len(rivals) > 1]


def _choice(rivals: list[DraftRow], settings: PlanSettings) -> ChoiceRow:
    """Each draft with the length its own row names; shares of what any of them attains at any length."""
    figures = [
        Figures(r.expected_tokens_per_s, r.dollars_per_mtoken, r.energy_j_per_token) for r in rivals
    ]
    figures += [option.figures for row in rivals for option in _options(row)]
    keeping = [place for place, row in enumerate(rivals) if row.feasible]
    nearest = max(range(len(rivals)), key=lambda place: rivals[place].nearest_tokens_per_s)
    best = choose(
        figures, keeping or [nearest], settings.weights, energy_slack=settings.energy_slack
    )
    row = rivals[best]
    return ChoiceRow(
        machine_of(row.device),
        row.rtt_ms,
        row.load_level,
        row.tokens_per_s,
        row.mode,
        row.device,
        row.k,
        row.expected_tokens_per_s,
        row.dollars_per_mtoken,
        row.energy_j_per_token,
        row.feasible,
    )


def front(
    plan: Plan, machine: str, rtt_ms: float, load_level: int, tokens_per_s: float, mode: str
) -> tuple[list[Option], list[int]]:
    """(every draft and draft length of a machine in one cell, places of those on the Pareto front by
    falling tokens/s). Arguments as the plan's rows hold them.

    Where the power of one of the drafts is not known, energy counts for none of them: nothing is frugal for
    want of a sensor.
    """
    options = [
        option
        for row in plan.draft
        if machine_of(row.device) == machine
        and (row.rtt_ms, row.load_level, row.tokens_per_s, row.mode)
        == (rtt_ms, load_level, tokens_per_s, mode)
        for option in _options(row)
    ]
    frugal = {option.device for option in options if option.figures.energy_j_per_token}
    if frugal != {option.device for option in options}:
        options = [o._replace(figures=o.figures._replace(energy_j_per_token=0.0)) for o in options]
    return options, on_front([option.figures for option in options])


def _options(row: DraftRow) -> list[Option]:
    # Plans that were made before these figures were kept have none by k.
    dollars = row.dollars_by_k or (0.0,) * len(row.by_k)
    energy = row.energy_by_k or (0.0,) * len(row.by_k)
    return [
        Option(row.device, k, Figures(speed, cost, joules), slow >= row.tokens_per_s, k == row.k)
        for k, (speed, slow, cost, joules) in enumerate(
            zip(row.by_k, row.slow_by_k, dollars, energy, strict=True)
        )
    ]
