"""Requests drawn from the lengths of a workload file."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from random import Random

from wispprof.artifacts.workload import LengthBin, SeenTraffic
from wispprof.simulation.arrivals import Request


class WorkloadLengths:
    """Draws a bin by its count, and lengths log-uniformly within it."""

    def __init__(self, workload: SeenTraffic) -> None:
        self._bins: tuple[LengthBin, ...] = workload.lengths
        self._totals = list(itertools.accumulate(b.count for b in self._bins))
        self._reused = workload.reused

    def request(self, rng: Random, time_ms: float, client: int = -1) -> Request:
        place, prompt, output = rng.random() * self._totals[-1], rng.random(), rng.random()
        b = self._bins[bisect_right(self._totals, place)]
        tokens = max(1, _between(b.prompt_from, b.prompt_to, prompt))
        return Request(
            time_ms,
            tokens,
            max(2, _between(b.output_from, b.output_to, output)),
            client,
            int(self._reused * tokens),
        )


def _between(low: int, high: int, share: float) -> int:
    return round(low * math.exp(share * math.log(high / low)))
