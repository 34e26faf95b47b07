"""Systems at one load: served for real in turns, then simulated."""

from __future__ import annotations

import asyncio
import itertools
import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from _serving.bed import LOOP_MS, Bed, load_of, running, server_model, slowdown_now
from wispprof.bench import BenchResult, SimulatedBench, simulate_bench
from wispprof.bench.bench_result import pool_results
from wispprof.fitting import FittedEstimator, load_predictor
from wispprof.settings.shared_settings import LinkModel
from wispprof.simulation import System, system
from wispprof.types import BatchShape

STEADY, TRIES = 1.15, 3
"""Most that the machine's speed may change in a turn; turns until one is taken all the same."""


class Pace(NamedTuple):
    """How the machine ran: measured over fitted time of all steps together, and the spread of that ratio's
    logarithm from step to step."""

    mean: float
    spread: float

    @property
    def median(self) -> float:
        """Of a log-normal ratio with this mean and spread."""
        return self.mean * math.exp(-(self.spread**2) / 2)


EVEN = Pace(1.0, 0.1)
"""Of the "even" columns: the profile's own."""


@dataclass(frozen=True)
class Run:
    """One system at one load, really and simulated, in times of the profile's machine: those of the machine
    as it was over ``slowdown``.

    ``overhead_ms``: of the loop, between busy steps; ``rtt_ms``: of the link as the edges measured it, a busy
    server's and a busy fleet's delays included. ``even``: simulated at the profile's own pace, which is the
    same for all systems."""

    name: str
    devices: int
    real: BenchResult
    simulated: SimulatedBench
    step_mean_ms: float
    pace: float
    overhead_ms: float
    rtt_ms: float
    even: SimulatedBench
    slowdown: float

    @property
    def figures(self) -> dict[str, float]:
        found = self.real.figures
        goodput = found["goodput_tokens_per_s"] * self.slowdown
        return {**found, "goodput_tokens_per_s": goodput, "ttft_p95_ms": found["ttft_p95_ms"] / self.slowdown}


class Watched:
    """A policy that notes when it let the engine rest."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.name, self.stream = inner.name, inner.stream
        self.rested_ms: list[float] = []

    def plan(self, now_ms: float, sessions: Any, estimator: Any, limits: Any) -> Any:
        plan = self._inner.plan(now_ms, sessions, estimator, limits)
        if not plan.items:
            self.rested_ms.append(now_ms)
        return plan


class Steps:
    """Shapes and times of all steps, taken where a step log would be."""

    def __init__(self) -> None:
        self.rows: list[tuple[BatchShape, float]] = []

    def append(self, shape: BatchShape, actual_ms: float, *predicted: Any) -> None:
        self.rows.append((shape, actual_ms))

    def close(self) -> None: ...

    def pace(self, estimator: FittedEstimator) -> Pace:
        """Against what the profile says of the same steps."""
        predicted = [estimator.predict(shape)[0] for shape, _ in self.rows]
        off = [math.log(ms / p50) for p50, (_, ms) in zip(predicted, self.rows, strict=True)]
        mean = sum(ms for _, ms in self.rows) / sum(predicted)
        return Pace(mean, statistics.stdev(off))


@dataclass(frozen=True)
class Turn:
    """A load served once: what its users saw, the steps of the server, and the gaps between busy ones.
    ``slowdown``: of the machine at its beginning, and of the load therefore."""

    real: BenchResult
    steps: list[Any]
    seen: Steps
    gaps: list[float]
    slowdown: float


async def serve(bed: Bed, name: str, what: System, devices: int, number: int = 0) -> Turn:
    """Serve the load for real. ``number``: of the round; its devices start at other times."""
    slowdown = 1.0 if bed.as_fitted else slowdown_now(bed)
    load = replace(load_of(bed, what.label, devices, slowdown), seed=number)
    policy = Watched(what.make_batching())
    async with running(bed, policy) as served:
        records = served.server.metrics.steps = deque(maxlen=1 << 17)
        seen = served.server.loop.step_log = Steps()
        real = await bed.fleet.bench(load, served.split_url, bed.trace_file)
        steps = list(records)
    if not real.lossless or bed.loaded.engine.sessions:
        raise SystemExit(f"{name}: texts differ from the target's own, or sessions were left")
    return Turn(real, steps, seen, busy_gaps(steps, policy.rested_ms), slowdown)


def steady_turn(bed: Bed, name: str, what: System, devices: int, number: int) -> Turn:
    """A turn in which the machine kept its speed, or the last of :data:`TRIES`."""
    for _ in range(1 if bed.as_fitted else TRIES):
        turn = asyncio.run(serve(bed, name, what, devices, number))
        if bed.as_fitted or 1.0 / STEADY < slowdown_now(bed) / turn.slowdown < STEADY:
            break
    return turn


def run(bed: Bed, systems: Mapping[str, System], devices: int) -> list[Run]:
    """Every system under one load: for real in turns, every other round backwards, then simulated."""
    turns: dict[str, list[Turn]] = {name: [] for name in systems}
    for number in range(bed.rounds):
        for name in list(systems)[:: -1 if number % 2 else 1]:
            turns[name].append(steady_turn(bed, name, systems[name], devices, number))
    return [simulated_beside(bed, name, systems[name], devices, served) for name, served in turns.items()]


def simulated_beside(bed: Bed, name: str, what: System, devices: int, turns: list[Turn]) -> Run:
    """The turns of a system as one run, and the simulator's answer."""
    real = pool_results([turn.real for turn in turns])
    slowdown = statistics.fmean(turn.slowdown for turn in turns)
    seen = Steps()
    seen.rows = [(shape, ms / turn.slowdown) for turn in turns for shape, ms in turn.seen.rows]
    gaps = [gap / turn.slowdown for turn in turns for gap in turn.gaps]
    overhead_ms = statistics.median(gaps) if gaps else LOOP_MS
    pace = Pace(1.0, 0.0) if bed.as_fitted else seen.pace(bed.estimator)
    rtt_ms = statistics.median(result.stats.rtt_ms for result in real.results) / slowdown
    return Run(
        name,
        devices,
        real,
        simulated(bed, what, devices, overhead_ms, rtt_ms, pace),
        statistics.fmean(ms for _, ms in seen.rows),
        pace.mean,
        overhead_ms,
        rtt_ms,
        simulated(bed, what, devices, overhead_ms, rtt_ms),
        slowdown,
    )


def simulated(
    bed: Bed,
    what: System,
    devices: int,
    overhead_ms: float,
    rtt_ms: float,
    pace: Pace = EVEN,
) -> SimulatedBench:
    """The load of ``devices`` in the simulator, by default at the profile's own pace."""
    server = server_model(bed, overhead_ms, pace.median, pace.spread)
    load = replace(load_of(bed, what.label, devices), link=LinkModel(rtt_ms))
    return simulate_bench(load, bed.mix, what, server, bed.trace, load_predictor(bed.predictor))


def ceiling(bed: Bed, beside: Run) -> float:
    """Goodput "even" of the better clairvoyant: its edges draft exactly what the target will accept. The
    server's overhead and the link are those of ``beside``."""
    return max(
        simulated(bed, system(label), beside.devices, beside.overhead_ms, beside.rtt_ms).goodput_tokens_per_s
        for label in ("clairvoyant", "clairvoyant-rounds")
    )


def busy_gaps(steps: list[Any], rested_ms: list[float]) -> list[float]:
    """Milliseconds from a step's end to the next one's beginning, where the engine was not let rest."""
    gaps = []
    rests = deque(sorted(rested_ms))
    for before, after in itertools.pairwise(steps):
        while rests and rests[0] < before.at_ms:
            rests.popleft()
        if not rests or rests[0] > after.at_ms:
            gaps.append(max(0.0, after.at_ms - after.actual_ms - before.at_ms))
    return gaps
