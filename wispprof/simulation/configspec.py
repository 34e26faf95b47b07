"""Choosing a draft model and a draft length by objective: goodput, cost, energy, or a mix of them.

The formulas are ConfigSpec's (arXiv 2604.09722, TDIS 2026). With K drafts, α(K) of which are accepted on
average, drafting speed v (tokens/s), verification time T (s), drafting power P (W), price p ($ per
drafted token that the target verifies):

    goodput  G(K) = (K·α + 1) / (K / v + T)      tokens/s
    cost     η(K) = (K·α + 1) / (K · p)          tokens/$
    energy   E(K) = P · (K / v) / (K·α + 1)      J/token, drafting on the edge only

Two things that the paper leaves out can be put in: ``bill_bonus`` bills K + 1 tokens a round (the target's
own token is computed too; without it K = 0 would be free), and K = 0 and 1 may be among the lengths.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from wispprof.errors import PlanError
from wispprof.settings.planner_settings import OBJECTIVES


@dataclass(frozen=True)
class DraftOption:
    """A draft model at some quantisation on some device.

    ``acceptance``: α(K) at the K that were measured; between them K·α(K), the accepted tokens, is
    interpolated, which is what must not fall; beyond the last it stays as it is (nothing more is
    accepted). ``draft_w`` 0: power unknown, its energy counts as zero.
    """

    name: str
    tokens_per_s: float
    acceptance: Mapping[int, float] = field(default_factory=dict)
    draft_w: float = 0.0

    def __post_init__(self) -> None:
        if not self.tokens_per_s > 0:
            raise PlanError(f"{self.name} drafts at no speed.", "Profile it.")
        if not self.acceptance or any(k < 1 or not 0 <= a <= 1 for k, a in self.acceptance.items()):
            raise PlanError(f"The acceptance of {self.name} needs values within 0 … 1 at K ≥ 1.", "Trace it.")

    def accepted(self, k: int) -> float:
        """Expected accepted drafts of a round of ``k``."""
        points = [(0, 0.0), *sorted((n, n * a) for n, a in self.acceptance.items())]
        for (low, before), (high, after) in itertools.pairwise(points):
            if k <= high:
                return before + (after - before) * (k - low) / (high - low)
        return points[-1][1]


class Scores(NamedTuple):
    """``goodput`` tokens/s, ``cost`` tokens/$ (more is better), ``energy`` J/token (less is better)."""

    goodput: float
    cost: float
    energy: float


class ConfigChoice(NamedTuple):
    """A draft option, a draft length, and what they score."""

    option: DraftOption
    k: int
    scores: Scores


@dataclass(frozen=True)
class Verifier:
    """The server: its time T for a round (or T by K), and its price p per drafted token that it verifies."""

    verify_s: float | Mapping[int, float]
    dollars_per_token: float
    bill_bonus: bool = False

    def score(self, option: DraftOption, k: int) -> Scores:
        """The three figures of one option at one draft length. Cost is infinite if nothing is billed."""
        tokens = option.accepted(k) + 1.0
        draft_s = k / option.tokens_per_s
        verify_s = self.verify_s[k] if isinstance(self.verify_s, Mapping) else self.verify_s
        billed = (k + self.bill_bonus) * self.dollars_per_token
        return Scores(
            tokens / (draft_s + verify_s),
            tokens / billed if billed > 0 else math.inf,
            option.draft_w * draft_s / tokens,
        )

    def best(
        self, options: Iterable[DraftOption], objective: str | Mapping[str, float], lengths: Sequence[int]
    ) -> ConfigChoice:
        """The best choice by one objective, or by a mix: ``{"goodput": 0.7, "energy": 0.3}``.

        In a mix each figure is divided by the best of all choices, so that weights are shares of what is
        attainable. Ties go to the shorter draft. Raises :class:`PlanError` on an unknown objective.
        """
        choices = [ConfigChoice(o, k, self.score(o, k)) for o in options for k in lengths]
        if not choices:
            raise PlanError("There is nothing to choose from.", "Give draft options and lengths.")
        weights = {objective: 1.0} if isinstance(objective, str) else dict(objective)
        unknown = sorted(set(weights) - set(OBJECTIVES))
        if unknown or not weights or min(weights.values()) < 0:
            raise PlanError(
                f"No such objective: {', '.join(unknown) or 'an empty or negative mix'}.",
                f"Choose of {', '.join(OBJECTIVES)}.",
            )
        most_goodput = max(c.scores.goodput for c in choices)
        most_cost = max(c.scores.cost for c in choices)
        least_energy = min(c.scores.energy for c in choices)

        def value(choice: ConfigChoice) -> float:
            goodput, cost, energy = choice.scores
            shares = {
                "goodput": goodput / most_goodput,
                "cost": cost / most_cost if most_cost != math.inf else float(cost == most_cost),
                "energy": least_energy / energy if energy > 0 else 1.0,
            }
            return sum(weight * shares[name] for name, weight in weights.items())

        return max(choices, key=lambda c: (value(c), -c.k))
