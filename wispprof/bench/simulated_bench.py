"""The load of a benchmark in the simulator: the same devices, SLOs and texts, request for request.

Each simulated request follows the trace path that the real one follows, so acceptance differs only by what the
edges drafted in time. A benchmark ends with its last request, whereas simulated fleets run on. This module
therefore stops each device after its share and summarises the run as :mod:`wispprof.bench.bench_result` does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from wispprof.artifacts.rows import AcceptanceTrace
from wispprof.errors import WispprofError
from wispprof.settings.bench_settings import BenchSettings
from wispprof.simulation.arrivals import ClosedFleet, Request
from wispprof.simulation.devices import DeviceProfile
from wispprof.simulation.event_loop import Simulation
from wispprof.simulation.scenario import DEVICE_STEP, SLO_STEP, Scenario, ServerModel, System, pick
from wispprof.simulation.simulated_edge import SimulatedEdge
from wispprof.simulation.trace_replay import TraceReplay
from wispprof.types import RejectionPredictor, Slo

__all__ = ["Mix", "SimulatedBench", "simulate_bench"]

_LONGEST_S = 3600.0


@dataclass(frozen=True)
class Mix:
    """Kinds of devices and SLO classes (tokens/s) in equal shares, dealt as the simulator deals them."""

    kinds: tuple[DeviceProfile, ...]
    speeds: tuple[float, ...]

    def device(self, devices: int) -> tuple[DeviceProfile, ...]:
        """What each of ``devices`` devices is: for :attr:`BenchSettings.device`."""
        mix = [(kind, 1.0) for kind in self.kinds]
        return tuple(pick(mix, number, DEVICE_STEP) for number in range(devices))

    def tokens_per_s(self, devices: int) -> tuple[float, ...]:
        """The SLO of each of them: for :attr:`BenchSettings.tokens_per_s`."""
        mix = [(speed, 1.0) for speed in self.speeds]
        return tuple(pick(mix, number, SLO_STEP) for number in range(devices))


@dataclass(frozen=True)
class SimulatedBench:
    """The figures that can be held against a bench's, named and defined as there."""

    attainment: float
    goodput_tokens_per_s: float
    tokens_per_s: float
    accepted_per_round: float
    step_mean_ms: float
    steps: int

    @classmethod
    def mean(cls, runs: Sequence[SimulatedBench]) -> SimulatedBench:
        """Over several seeds."""
        count = len(runs)
        return cls(
            sum(r.attainment for r in runs) / count,
            sum(r.goodput_tokens_per_s for r in runs) / count,
            sum(r.tokens_per_s for r in runs) / count,
            sum(r.accepted_per_round for r in runs) / count,
            sum(r.step_mean_ms for r in runs) / count,
            round(sum(r.steps for r in runs) / count),
        )


class _Ending(Simulation):
    """Devices stop after so many requests each; with ``hold`` they go on until all have made theirs."""

    def __init__(self, scenario: Scenario, load: BenchSettings, source: TraceReplay) -> None:
        super().__init__(scenario)
        self._offered = load
        self._source = source
        self._through = 0
        self.over_ms = math.inf

    def _load(self) -> None:
        # As a bench spreads its first requests.
        rng = Random(self._offered.seed)
        for device in range(self._offered.devices):
            self.schedule(rng.random() * self._offered.ramp_ms, self._next, (device, 0))
            rng.random()

    def _next(self, now_ms: float, who: tuple[int, int]) -> None:
        prompt, path = self._source.lengths(*who)
        self._ask(now_ms, (*who, Request(now_ms, prompt, min(self._offered.max_new, path))))

    def ended(self, now_ms: float, edge: SimulatedEdge) -> None:
        load, made = self._offered, edge.record.number + 1
        self._through += made == load.requests
        if self._through == load.devices:
            self.over_ms = min(self.over_ms, now_ms)
        elif load.hold or made < load.requests:
            super().ended(now_ms, edge)


def simulate_bench(
    load: BenchSettings,
    mix: Mix,
    system: System,
    server: ServerModel,
    trace: AcceptanceTrace,
    predictor: RejectionPredictor,
    seeds: Sequence[int] = (0, 1, 2),
) -> SimulatedBench:
    """Simulate the closed fleet that ``load`` offers; the mean over ``seeds``.

    ``load.device`` and ``load.tokens_per_s`` must be dealt by ``mix``. Raises :class:`WispprofError` for
    Poisson loads, whose devices a bench and a simulator choose differently.
    """
    if load.rate_per_s:
        raise WispprofError(
            "Only closed-loop workloads can be simulated beside a benchmark.",
            "Remove the arrival rate.",
        )
    source = TraceReplay(trace, predictor, load.devices)
    runs = [
        _run(
            Scenario(
                system,
                server,
                ClosedFleet(load.devices, think_ms=load.think_ms, ramp_ms=load.ramp_ms),
                source,
                devices=tuple((kind, 1.0) for kind in mix.kinds),
                links=((load.link, 1.0),),
                slos=tuple((Slo(speed, load.ttft_ms), 1.0) for speed in mix.speeds),
                seconds=_LONGEST_S,
                warmup_s=0.0,
                seed=seed,
            ),
            load,
            source,
        )
        for seed in seeds
    ]
    return SimulatedBench.mean(runs)


def _run(scenario: Scenario, load: BenchSettings, source: TraceReplay) -> SimulatedBench:
    simulation = _Ending(scenario, load, source)
    simulation.run()
    records, counters = simulation.records, simulation.counters
    if load.hold:
        records = [r for r in records if r.done and r.last_ms <= simulation.over_ms]
    done = [r for r in records if r.done]
    kept = [r for r in done if r.kept(r.last_ms)]
    began = min(r.asked_ms for r in records)
    seconds = (max(r.last_ms for r in done) - began) / 1000.0 if done else math.nan
    return SimulatedBench(
        len(kept) / len(records),
        sum(r.tokens for r in kept) / seconds,
        sum(r.tokens for r in done) / seconds,
        counters.accepted / counters.rounds if counters.rounds else 0.0,
        counters.step_ms / counters.steps,
        counters.steps,
    )
