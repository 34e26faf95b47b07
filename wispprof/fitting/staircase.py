"""vLLM's start-up model: time by padded tokens, measured at one context length."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any, Self

import numpy as np

from wispprof.fitting.base import Boxed
from wispprof.fitting.features import FloatArray, Totals
from wispprof.fitting.rows import Observations

__all__ = ["Staircase"]


class Staircase(Boxed):
    """``steps_``: token counts; ``times_``: ms of a step padded to each, never falling.

    The context is the one most shapes were measured at. Beyond the last step time grows in proportion.
    """

    kind = "staircase"
    monotone = True

    def __init__(self) -> None:
        self.steps_: list[float] = []
        self.times_: list[float] = []
        self.context_ = 0.0

    def fit(self, data: Observations) -> Self:
        plain = data.totals[:, 7] == 0
        used = data.take(plain) if plain.sum() >= 4 else data
        mean = used.totals[:, 2] / used.totals[:, 0]
        tokens = np.where(used.padded > 0, used.padded, used.totals[:, 1])
        wanted = np.unique(tokens)
        values, counts = np.unique(np.round(np.log2(1 + mean), 1), return_counts=True)
        modal = values[np.argmax(counts)]
        distance = np.abs(np.log2(1 + mean) - modal)
        self.context_ = float(2**modal - 1)
        times = []
        for count in wanted:
            same = np.flatnonzero(tokens == count)
            nearest = same[distance[same] <= distance[same].min() + 1e-9]
            times.append(float(np.median(used.median_ms[nearest])))
        self.steps_ = [float(c) for c in wanted]
        self.times_ = [float(t) for t in np.maximum.accumulate(times)]
        return self

    def again(self) -> Self:
        return type(self)()

    def p50(self, totals: Totals) -> float:
        place = bisect_left(self.steps_, totals.new)
        if place < len(self.steps_):
            return self.times_[place]
        return self.times_[-1] * totals.new / self.steps_[-1]

    def p50_many(self, totals: FloatArray) -> FloatArray:
        steps, times = np.array(self.steps_), np.array(self.times_)
        place = np.searchsorted(steps, totals[:, 1], side="left")
        inside = times[np.minimum(place, len(times) - 1)]
        beyond = place == len(steps)
        result: FloatArray = np.where(beyond, inside * totals[:, 1] / steps[-1], inside)
        return result

    def payload(self) -> dict[str, Any]:
        return {"steps": self.steps_, "times_ms": self.times_, "context": self.context_}

    @classmethod
    def from_payload(cls, payload: dict[str, Any]) -> Self:
        surface = cls()
        surface.steps_ = [float(v) for v in payload["steps"]]
        surface.times_ = [float(v) for v in payload["times_ms"]]
        surface.context_ = float(payload["context"])
        if not surface.steps_ or len(surface.steps_) != len(surface.times_):
            raise ValueError("a staircase needs as many times as steps")
        if sorted(surface.steps_) != surface.steps_ or sorted(surface.times_) != surface.times_:
            raise ValueError("a staircase never falls")
        return surface
