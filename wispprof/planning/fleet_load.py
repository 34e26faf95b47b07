"""The requests of a fleet's device classes, split by SLO, for the closed model and for the simulator."""

from __future__ import annotations

import math
from dataclasses import dataclass

from wispprof.planning.fleet_file import DeviceClass, FleetSpec
from wispprof.planning.replica_model import ClassLoad
from wispprof.planning.session_speed import Runs
from wispprof.simulation.arrivals import Lengths
from wispprof.simulation.routed_fleet import ClientClass, RequestLengths
from wispprof.simulation.scenario import Client
from wispprof.simulation.synthetic_acceptance import SyntheticAcceptance
from wispprof.simulation.workload_lengths import WorkloadLengths
from wispprof.types import Slo

_S_PER_H = 3600.0


@dataclass(frozen=True)
class FleetLoad:
    """``day_share``: mean load of a day over the busiest hour's. ``acceptance``: mean of all devices."""

    model: tuple[ClassLoad, ...]
    simulated: tuple[ClientClass, ...]
    day_share: float
    acceptance: float

    @property
    def per_s(self) -> float:
        return sum(of.per_s for of in self.model)

    @property
    def tokens_per_s(self) -> float:
        return sum(of.per_s * of.output for of in self.model)


def fleet_load(spec: FleetSpec) -> FleetLoad:
    """Every device class split by SLO."""
    model, simulated = [], []
    busiest = mean = 0.0
    for of in spec.devices:
        workload = spec.workload(of)
        device, source = of.profile(), SyntheticAcceptance(of.acceptance)
        lengths: RequestLengths = Lengths(of.prompt, of.output, of.spread, of.spread, reused=of.reused)
        growth = math.exp(of.spread**2 / 2)  # mean over median of a log-normal
        prompt, output, reused = of.prompt * growth, of.output * growth, of.reused
        day_per_h = of.mean_requests_per_h or of.requests_per_h
        if workload is not None:
            lengths = WorkloadLengths(workload)
            prompt, output, reused = workload.mean("prompt"), workload.mean("output"), workload.reused
            if not of.mean_requests_per_h:
                day_per_h = of.requests_per_h * workload.mean_per_s / workload.busiest_per_s
        busiest += of.count * of.requests_per_h * output
        mean += of.count * day_per_h * output
        total = sum(of.slos.values())
        for speed, share in sorted(of.slos.items(), key=lambda pair: float(pair[0])):
            name = of.name if len(of.slos) == 1 else f"{of.name}, {float(speed):g} tok/s"
            slo = Slo(float(speed), of.ttft_ms)
            per_s = of.count * of.requests_per_h / _S_PER_H * share / total
            runs = Runs.geometric(of.acceptance)
            model.append(ClassLoad(name, per_s, prompt, output, reused, device, of.rtt_ms, slo, runs))
            simulated.append(ClientClass(Client(name, device, of.link, slo, source), per_s, lengths))
    acceptance = sum(of.acceptance * of.count for of in spec.devices) / sum(of.count for of in spec.devices)
    return FleetLoad(tuple(model), tuple(simulated), mean / busiest, acceptance)


def in_words(of: DeviceClass) -> str:
    """A device class in a sentence."""
    slos = ", ".join(f"{float(s):g} tokens/s ({share:.0%})" for s, share in of.slos.items())
    lengths = of.workload or f"prompts of {of.prompt:,} and outputs of {of.output:,} tokens (medians)"
    ttft = f", first token in {of.ttft_ms / 1000:g} s" if of.ttft_ms else ""
    return (
        f"{of.count:,} × {of.name}: {of.requests_per_h:g} requests/h each at the busiest hour, "
        f"{of.device or f'{of.draft_tokens_per_s:g} draft tokens/s'}, {of.rtt_ms:g} ms round trip, "
        f"{lengths}; SLO {slos}{ttft}"
    )
