"""The bed of ``serving.py`` in the simulator alone: many loads and seeds in a minute.

    python benchmarks/serving.py --run out/bed --quick   # makes estimator, predictor and trace
    python benchmarks/serving_twin.py out/bed            # server-only, wisp, fcfs and wispprof at five loads
    python benchmarks/serving_twin.py out/bed --misses   # and every missed request

Physics. Devices, SLO classes, link and requests are those of ``serving.py``. A step takes the estimate times
a residual (10 %) times a wander (``--wander``), which fades over a second: a machine with neighbours.
Policies know the estimate alone. So this shows what an estimator's error at run time costs in SLO attainment.

A row per system: attainment and goodput in tokens/s by number of devices, means over the seeds.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from _serving.bed import CHUNK, CLASSES, DRAFT_SHARES, LOOP_MS, MAX_ITEMS, MAX_TOKENS

from wispprof.artifacts import load_trace
from wispprof.bench.simulated_bench import LoadMix, _BenchSimulation
from wispprof.fitting import load_estimator, load_predictor
from wispprof.settings.fleet_settings import BenchSettings
from wispprof.settings.shared_settings import LinkModel
from wispprof.simulation import ServerModel, system
from wispprof.simulation.arrivals import ClosedFleet
from wispprof.simulation.devices import DeviceProfile
from wispprof.simulation.metrics import SessionRecord
from wispprof.simulation.scenario import Scenario
from wispprof.simulation.trace_replay import TraceReplay
from wispprof.types import BatchShape, Slo, VerifyItem

OVERHEAD_MS, SPREAD, FADES_MS = 1.5, 0.1, 1000.0


@dataclass
class WanderingStepTimes:
    """Takes the place of ``SimulatedStepTimes``. ``wander``: its spread; ``now``: where it is, in spreads."""

    estimator: Any
    rng: Random
    wander: float
    now: float = 0.0

    def sample(self, items: list[tuple[int, int, bool]]) -> tuple[float, float, float]:
        """(median, drawn, 5 % quantile) ms of a step."""
        p50, _ = self.estimator.predict(BatchShape(tuple(map(VerifyItem._make, items))))
        took_ms = p50 * math.exp(SPREAD * self.rng.gauss(0, 1) + self.wander * self.now)
        kept = math.exp(-took_ms / FADES_MS)
        self.now = kept * self.now + math.sqrt(1 - kept * kept) * self.rng.gauss(0, 1)
        return p50, took_ms, p50 * math.exp(-1.645 * math.hypot(SPREAD, self.wander))


def simulated(
    folder: Path, near: int, name: str, devices: int, seed: int, wander: float
) -> tuple[list[SessionRecord], float]:
    """The finished requests of one run, and its seconds."""
    estimator, trace = load_estimator(folder / "estimator.json"), load_trace(folder / "trace.jsonl")
    new = min(len(path.path) for path in trace.paths)
    prompt = round(statistics.fmean(len(path.prompt) for path in trace.paths))
    step_ms = estimator.predict(BatchShape.uniform(near, 1, prompt + new // 2))[0]
    prompt_ms = estimator.predict(BatchShape.of([(prompt, 0, True)]))[0]
    alone = 1000.0 * new / (new * (step_ms + LOOP_MS) + near * prompt_ms)
    kinds = [DeviceProfile(k, draft_ms=max(1.5, round(s * step_ms, 1))) for k, s in DRAFT_SHARES.items()]
    mix = LoadMix(tuple(kinds), tuple(float(f"{share * alone:.3g}") for share in CLASSES))
    ttft_ms, link = max(1000.0, 4.0 * near * prompt_ms), LinkModel(rtt_ms=round(0.3 * step_ms, 1))
    load = BenchSettings(
        system=name, devices=devices, requests=4, hold=True, max_new=new, link=link, seed=seed
    )
    source = TraceReplay(trace, load_predictor(folder / "predictor.json"), devices)
    model = ServerModel(estimator, None, MAX_ITEMS, MAX_TOKENS, CHUNK, overhead_ms=OVERHEAD_MS, spread=SPREAD)
    run = _BenchSimulation(
        Scenario(
            system(name),
            model,
            ClosedFleet(devices, think_ms=0.0, ramp_ms=load.ramp_ms),
            source,
            devices=tuple((kind, 1.0) for kind in mix.profiles),
            links=((link, 1.0),),
            slos=tuple((Slo(speed, ttft_ms), 1.0) for speed in mix.speeds),
            seconds=3600.0,
            warmup_s=0.0,
            seed=seed,
        ),
        replace(load, ttft_ms=ttft_ms),
        source,
    )
    rng = Random(7919 * seed + 11)
    times = WanderingStepTimes(estimator, rng, wander, rng.gauss(0, 1))
    run.server._times = times  # type: ignore[assignment]
    run.run()
    records = [r for r in run.records if r.done and r.last_ms <= run.over_ms]
    begun_ms = min(r.arrival_ms for r in records)
    return records, (max(r.last_ms for r in records) - begun_ms) / 1000.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder with estimator, predictor and trace")
    parser.add_argument("--near", type=int, default=10, help="devices near server-only capacity")
    parser.add_argument("--devices", type=int, nargs="*", default=[6, 10, 15, 18, 22])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--wander", type=float, default=12.0, help="spread of the machine's speed, percent")
    parser.add_argument("--systems", nargs="*", default=["server-only", "wisp", "fcfs", "wispprof"])
    parser.add_argument("--misses", action="store_true", help="list missed requests")
    options = parser.parse_args()
    for name in options.systems:
        cells = []
        for devices in options.devices:
            attainment, goodput = [], []
            for seed in range(options.seeds):
                records, seconds = simulated(
                    options.run, options.near, name, devices, seed, options.wander / 100.0
                )
                met = [r for r in records if r.slo_met(r.last_ms)]
                attainment.append(len(met) / len(records))
                goodput.append(sum(r.tokens for r in met) / seconds)
                for r in (r for r in records if options.misses and not r.slo_met(r.last_ms)):
                    speed = 1000.0 / r.tpot_ms / r.slo.tokens_per_s
                    why = r.missed_by(r.last_ms)
                    print(
                        f"  {name} {devices}: device {r.device}, {r.slo.tokens_per_s:g}/s: {why}, {speed:.2f}"
                    )
            cells.append(f"{devices}: {statistics.fmean(attainment):6.1%} {statistics.fmean(goodput):6.0f}")
        print(f"{name:12s} " + " | ".join(cells), flush=True)


if __name__ == "__main__":
    main()
