"""What a choice is worth by an objective: goodput, cost, energy, or a weighted mix of them.

A choice is a draft and a draft length in one cell of the plan; its :class:`Figures` come from the plan's own
timing models. *goodput*: the most tokens/s. *cost*: the fewest dollars per token. *energy*: the least energy
among the choices that are nearly as fast as the fastest (no drafting at all would always take least). A *mix*
adds shares of what is attainable in the cell: tokens/s over the most, the least dollars over dollars, and the
part of the most energy that is saved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

__all__ = ["Figures", "choose", "on_front"]

Weights = Mapping[str, float]


class Figures(NamedTuple):
    """``tokens_per_s`` of the mean session (more is better); ``dollars_per_mtoken``: server and edge time
    of a million committed tokens, and ``energy_j_per_token`` of drafting (less is better)."""

    tokens_per_s: float
    dollars_per_mtoken: float
    energy_j_per_token: float


def choose(
    figures: Sequence[Figures],
    places: Sequence[int],
    weights: Weights,
    *,
    energy_slack: float = 0.05,
    lone: int | None = None,
    min_gain: float = 1.0,
) -> int:
    """Which of the choices at ``places`` is the best; the first of equals.

    Shares are taken over all ``figures``. ``lone``: the place of not drafting; where it is among the
    choices, another must be better by ``min_gain``. ``energy_slack``: how much slower than the fastest a
    frugal choice may be.
    """
    if set(weights) == {"energy"}:
        fastest = max(places, key=lambda p: figures[p].tokens_per_s)
        least = figures[fastest].tokens_per_s * (1 - energy_slack)
        near = [p for p in places if figures[p].tokens_per_s >= least]
        best = min(near, key=lambda p: figures[p].energy_j_per_token)
        worth = [f.tokens_per_s for f in figures]
    else:
        worth = _worth(figures, weights)
        best = max(places, key=lambda p: worth[p])
    if lone is not None and lone in places and worth[best] < worth[lone] * min_gain:
        return lone
    return best


def _worth(figures: Sequence[Figures], weights: Weights) -> list[float]:
    most = max(f.tokens_per_s for f in figures)
    cheapest = min(f.dollars_per_mtoken for f in figures)
    hungriest = max(f.energy_j_per_token for f in figures)

    def shares(one: Figures) -> dict[str, float]:
        return {
            "goodput": one.tokens_per_s / most if most > 0 else 1.0,
            "cost": cheapest / one.dollars_per_mtoken if one.dollars_per_mtoken > 0 else 1.0,
            "energy": 1.0 - one.energy_j_per_token / hungriest if hungriest > 0 else 1.0,
        }

    return [sum(w * shares(f)[name] for name, w in weights.items()) for f in figures]


def on_front(figures: Sequence[Figures]) -> list[int]:
    """Places of the choices that no other one beats in one figure and equals in the rest (the Pareto
    front), by falling tokens/s; of equal ones only the first."""
    better = [(f.tokens_per_s, -f.dollars_per_mtoken, -f.energy_j_per_token) for f in figures]
    front = [
        place
        for place, one in enumerate(better)
        if not any(
            all(a >= b for a, b in zip(other, one, strict=True)) and (other != one or rival < place)
            for rival, other in enumerate(better)
            if rival != place
        )
    ]
    return sorted(front, key=lambda place: -figures[place].tokens_per_s)
