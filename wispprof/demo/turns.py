"""Systems in turns: each serves the same seeded requests again and again, in short turns.

A machine's speed wanders by more than systems differ. In turns it wanders for all systems alike, and each
round of turns compares them anew. The interval of a ratio follows from how much it differs by round.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from wispprof.bench.bench_result import BenchResult, pool_results
from wispprof.reporting import Bench

CONFIDENCE = 0.95
GOODPUT = "goodput_tokens_per_s"


def turn_order(systems: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """(round, system) of each turn. Every other round runs backwards, so that no system always goes first.

    >>> [name for _, name in turn_order(("a", "b"), 2)]
    ['a', 'b', 'b', 'a']
    """
    for number in range(rounds):
        for name in systems if number % 2 == 0 else systems[::-1]:
            yield number, name


class Ratio(NamedTuple):
    """Mean of one quantity over that of another, with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def decided(self) -> bool:
        """Whether the interval excludes 1."""
        return self.low > 1.0 or self.high < 1.0


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Ratio of the means of paired values, at least two pairs.

    The interval is the linearised one of a ratio estimator, by Student's t over the pairs. It is infinite if
    ``theirs`` are all 0.
    """
    from scipy.special import stdtrit

    base = statistics.fmean(theirs)
    if base <= 0.0:
        return Ratio(math.inf, 0.0, math.inf)
    value = statistics.fmean(ours) / base
    residuals = [(a - value * b) / base for a, b in zip(ours, theirs, strict=True)]
    pairs = len(residuals)
    error = math.sqrt(sum(r * r for r in residuals) / (pairs - 1) / pairs)
    half = float(stdtrit(pairs - 1, (1.0 + CONFIDENCE) / 2.0)) * error
    return Ratio(value, max(0.0, value - half), value + half)


def benches_of(rounds: Mapping[str, Sequence[BenchResult]], baseline: str) -> list[Bench]:
    """One bench per system: its turns pooled, and its goodput over that of ``baseline`` with its interval."""
    goodput = {name: [turn.figures[GOODPUT] for turn in turns] for name, turns in rounds.items()}
    benches = []
    for name, turns in rounds.items():
        pooled = pool_results(turns)
        pooled.figures["turns"] = float(len(turns))
        if name != baseline and baseline in goodput and len(turns) > 1:
            ratio = paired_ratio(goodput[name], goodput[baseline])
            pooled.figures["goodput_ratio"] = ratio.value
            pooled.figures["goodput_ratio_low"] = ratio.low
            pooled.figures["goodput_ratio_high"] = ratio.high
        benches.append(Bench.of_result(pooled))
    return benches


def ranking(rounds: Mapping[str, Sequence[BenchResult]]) -> str:
    """The systems by goodput: ``>`` between neighbours whose difference is decided, else ``≈``."""
    goodput = {name: [turn.figures[GOODPUT] for turn in turns] for name, turns in rounds.items()}
    names = sorted(goodput, key=lambda name: -statistics.fmean(goodput[name]))
    text = names[0] if names else ""
    for better, worse in pairwise(names):
        several = len(goodput[better]) > 1
        decided = several and paired_ratio(goodput[worse], goodput[better]).decided
        text += f" {'>' if decided else '≈'} {worse}"
    return text
