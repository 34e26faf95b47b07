"""Objectives (goodput, cost, energy or a mix), and the choice among several draft models of one machine.

A choice is a draft model and a draft length in one cell of the plan. *goodput*: most tokens/s. *cost*: fewest
dollars per token. *energy*: least energy among choices nearly as fast as the fastest (no drafting at all
would always take least). A *mix* adds shares of what is attainable in the cell: tokens/s over the most,
least dollars over dollars, and the saved part of the most energy.

Several draft models of one machine are planned as devices called ``machine:draft``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from wispprof.artifacts.plan import ChoiceRow, DraftRow, Plan, machine_of
from wispprof.settings.planner_settings import PlanSettings

Weights = Mapping[str, float]


class Figures(NamedTuple):
    """``tokens_per_s`` of the mean session (more is better); ``dollars_per_mtoken``: server and edge time
    of a million committed tokens, and ``energy_j_per_token`` of drafting (less is better)."""

    tokens_per_s: float
    dollars_per_mtoken: float
    energy_j_per_token: float


def choose(
    figures: Sequence[Figures],
    candidates: Sequence[int],
    weights: Weights,
    *,
    energy_slack: float = 0.05,
    undrafted: int | None = None,
    min_gain: float = 1.0,
) -> int:
    """Index of the best of the ``candidates``; the first of equals.

    Shares are taken over all ``figures``. ``undrafted``: index of not drafting; if it is a candidate,
    another must be better by ``min_gain``. ``energy_slack``: for the objective energy, how much slower
    than the fastest a choice may be.
    """
    if set(weights) == {"energy"}:
        fastest = max(candidates, key=lambda p: figures[p].tokens_per_s)
        least = figures[fastest].tokens_per_s * (1 - energy_slack)
        near = [p for p in candidates if figures[p].tokens_per_s >= least]
        best = min(near, key=lambda p: figures[p].energy_j_per_token)
        scores = [f.tokens_per_s for f in figures]
    else:
        scores = _scores(figures, weights)
        best = max(candidates, key=lambda p: scores[p])
    if undrafted is not None and undrafted in candidates and scores[best] < scores[undrafted] * min_gain:
        return undrafted
    return best


def _scores(figures: Sequence[Figures], weights: Weights) -> list[float]:
    most = max(f.tokens_per_s for f in figures)
    cheapest = min(f.dollars_per_mtoken for f in figures)
    most_energy = max(f.energy_j_per_token for f in figures)

    def shares(one: Figures) -> dict[str, float]:
        return {
            "goodput": one.tokens_per_s / most if most > 0 else 1.0,
            "cost": cheapest / one.dollars_per_mtoken if one.dollars_per_mtoken > 0 else 1.0,
            "energy": 1.0 - one.energy_j_per_token / most_energy if most_energy > 0 else 1.0,
        }

    return [sum(w * shares(f)[name] for name, w in weights.items()) for f in figures]


def pareto_front(figures: Sequence[Figures]) -> list[int]:
    """Indices of the Pareto front, by falling tokens/s; of equal choices only the first."""
    better = [(f.tokens_per_s, -f.dollars_per_mtoken, -f.energy_j_per_token) for f in figures]
    front = [
        idx
        for idx, one in enumerate(better)
        if not any(
            all(a >= b for a, b in zip(other, one, strict=True)) and (other != one or other_idx < idx)
            for other_idx, other in enumerate(better)
            if other_idx != idx
        )
    ]
    return sorted(front, key=lambda idx: -figures[idx].tokens_per_s)


class Option(NamedTuple):
    """A device and a draft length in a cell. ``planned``: it is the draft length of the device's row."""

    device: str
    k: int
    figures: Figures
    meets_slo: bool
    planned: bool


def choice_rows(rows: Iterable[DraftRow], settings: PlanSettings) -> list[ChoiceRow]:
    """The best draft model in every cell of every machine that has more than one."""
    cells: dict[tuple[object, ...], list[DraftRow]] = {}
    for row in rows:
        machine = machine_of(row.device)
        key = (machine, row.rtt_ms, row.load_level, row.tokens_per_s, row.mode, row.context)
        cells.setdefault(key, []).append(row)
    return [_choice(rows, settings) for rows in cells.values() if len(rows) > 1]


def _choice(rows: list[DraftRow], settings: PlanSettings) -> ChoiceRow:
    """The best of the devices' planned draft lengths; shares are taken over all draft lengths."""
    figures = [Figures(r.expected_tokens_per_s, r.dollars_per_mtoken, r.energy_j_per_token) for r in rows]
    figures += [option.figures for row in rows for option in _options(row)]
    feasible = [idx for idx, row in enumerate(rows) if row.feasible]
    nearest = max(range(len(rows)), key=lambda idx: rows[idx].nearest_tokens_per_s)
    best = choose(figures, feasible or [nearest], settings.weights, energy_slack=settings.energy_slack)
    row = rows[best]
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
        row.context,
    )


def draft_front(
    plan: Plan,
    machine: str,
    rtt_ms: float,
    load_level: int,
    tokens_per_s: float,
    mode: str,
    context: int | None = None,
) -> tuple[list[Option], list[int]]:
    """(every draft model and draft length of a machine in one cell, indices of the Pareto front).

    If the power of one draft model is unknown, energy counts for none of them.
    """
    cached = plan.nearest_context(context)
    options = [
        option
        for row in plan.draft
        if machine_of(row.device) == machine
        and (row.context or plan.context) == cached
        and (row.rtt_ms, row.load_level, row.tokens_per_s, row.mode)
        == (rtt_ms, load_level, tokens_per_s, mode)
        for option in _options(row)
    ]
    metered = {option.device for option in options if option.figures.energy_j_per_token}
    if metered != {option.device for option in options}:
        options = [o._replace(figures=o.figures._replace(energy_j_per_token=0.0)) for o in options]
    return options, pareto_front([option.figures for option in options])


def _options(row: DraftRow) -> list[Option]:
    # Older plans have no costs by k.
    dollars = row.dollars_by_k or (0.0,) * len(row.by_k)
    energy = row.energy_by_k or (0.0,) * len(row.by_k)
    return [
        Option(row.device, k, Figures(speed, cost, joules), slow >= row.tokens_per_s, k == row.k)
        for k, (speed, slow, cost, joules) in enumerate(
            zip(row.by_k, row.slow_by_k, dollars, energy, strict=True)
        )
    ]
