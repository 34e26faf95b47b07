"""The load of a benchmark in the simulator: the same devices, SLOs and requests.

Each simulated request follows the trace path of the real one. Acceptance then differs only by what the edges
drafted in time. Each device stops after its share of requests, as in a benchmark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from random import Random

from wispprof.artifacts.rows import AcceptanceTrace
from wispprof.errors import WispprofError
from wispprof.settings.fleet_settings import BenchSettings
from wispprof.simulation.arrivals import ClosedFleet, Request
from wispprof.simulation.devices import DeviceProfile
from wispprof.simulation.event_loop import Simulation
from wispprof.simulation.scenario import DEVICE_STEP, SLO_STEP, Scenario, ServerModel, System, pick
from wispprof.simulation.simulated_edge import SimulatedEdge
from wispprof.simulation.trace_replay import TraceReplay
from wispprof.types import RejectionPredictor, Slo

_MAX_SECONDS = 3600.0


@dataclass(frozen=True)
class LoadMix:
    """Device profiles and SLO classes (tokens/s) in equal shares, assigned as in the simulator."""

    profiles: tuple[DeviceProfile, ...]
    speeds: tuple[float, ...]

    def device(self, devices: int) -> tuple[DeviceProfile, ...]:
        """Profile of each of ``devices`` devices, for :attr:`BenchSettings.device`."""
        mix = [(profile, 1.0) for profile in self.profiles]
        return tuple(pick(mix, number, DEVICE_STEP) for number in range(devices))

    def tokens_per_s(self, devices: int) -> tuple[float, ...]:
        """SLO of each of ``devices`` devices, for :attr:`BenchSettings.tokens_per_s`."""
        mix = [(speed, 1.0) for speed in self.speeds]
        return tuple(pick(mix, number, SLO_STEP) for number in range(devices))


@dataclass(frozen=True)
class SimulatedBench:
    """Figures that are comparable with :class:`BenchResult`'s; same names and definitions."""

    attainment: float
    goodput_tokens_per_s: float
    tokens_per_s: float
    accepted_per_round: float
    step_mean_ms: float
    steps: int

    @classmethod
    def mean(cls, runs: Sequence[SimulatedBench]) -> SimulatedBench:
        """Mean of each figure over several runs."""
        means = {f.name: sum(getattr(run, f.name) for run in runs) / len(runs) for f in fields(cls)}
        return cls(**{**means, "steps": round(means["steps"])})


class _BenchSimulation(Simulation):
    """Each device stops after its requests; with ``hold`` it continues until all devices made theirs."""

    def __init__(self, scenario: Scenario, load: BenchSettings, source: TraceReplay) -> None:
        super().__init__(scenario)
        self._offered = load
        self._source = source
        self._finished_devices = 0
        self.over_ms = math.inf

    def _load(self) -> None:
        rng = Random(self._offered.seed)  # the start times of wispprof.bench.fleet
        for device in range(self._offered.devices):
            self.schedule(rng.random() * self._offered.ramp_ms, self._next, (device, 0))
            rng.random()

    def _next(self, now_ms: float, key: tuple[int, int]) -> None:
        prompt, path = self._source.lengths(*key)
        self._request(now_ms, (*key, Request(now_ms, prompt, min(self._offered.max_new, path))))

    def ended(self, now_ms: float, edge: SimulatedEdge) -> None:
        load, made = self._offered, edge.record.number + 1
        self._finished_devices += made == load.requests
        if self._finished_devices == load.devices:
            self.over_ms = min(self.over_ms, now_ms)
        elif load.hold or made < load.requests:
            super().ended(now_ms, edge)


def simulate_bench(
    load: BenchSettings,
    mix: LoadMix,
    system: System,
    server: ServerModel,
    trace: AcceptanceTrace,
    predictor: RejectionPredictor,
    seeds: Sequence[int] = (0, 1, 2),
) -> SimulatedBench:
    """Simulate the closed fleet that ``load`` offers; the mean over ``seeds``.

    ``load.device`` and ``load.tokens_per_s`` must come from ``mix``. Raises :class:`WispprofError` for
    Poisson loads, because benchmark and simulator assign their requests to devices differently.
    """
    if load.rate_per_s:
        raise WispprofError(
            "Only closed-loop workloads can be simulated beside a benchmark.", "Remove the arrival rate."
        )
    source = TraceReplay(trace, predictor, load.devices)
    runs = [
        _run(
            Scenario(
                system,
                server,
                ClosedFleet(load.devices, think_ms=load.think_ms, ramp_ms=load.ramp_ms),
                source,
                devices=tuple((profile, 1.0) for profile in mix.profiles),
                links=((load.link, 1.0),),
                slos=tuple((Slo(speed, load.ttft_ms), 1.0) for speed in mix.speeds),
                seconds=_MAX_SECONDS,
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
    simulation = _BenchSimulation(scenario, load, source)
    simulation.run()
    records, counters = simulation.records, simulation.counters
    if load.hold:
        records = [r for r in records if r.done and r.last_ms <= simulation.over_ms]
    done = [r for r in records if r.done]
    slo_met = [r for r in done if r.slo_met(r.last_ms)]
    began = min(r.arrival_ms for r in records)
    seconds = (max(r.last_ms for r in done) - began) / 1000.0 if done else math.nan
    return SimulatedBench(
        len(slo_met) / len(records),
        sum(r.tokens for r in slo_met) / seconds,
        sum(r.tokens for r in done) / seconds,
        counters.accepted / counters.rounds if counters.rounds else 0.0,
        counters.step_ms / counters.steps,
        counters.steps,
    )
