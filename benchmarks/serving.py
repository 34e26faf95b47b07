"""Every system on one real server under one load, beside the simulator's answer to the same question.

    python benchmarks/serving.py                  # six systems, three loads, simulator beside each
    python benchmarks/serving.py --quick          # less of everything, under 90 s
    python benchmarks/serving.py --ablation       # wispprof with one piece switched at a time
    python benchmarks/serving.py --interference   # a 1,500-token prompt arrives while 12 sessions decode
    python benchmarks/serving.py --engine vllm    # on vLLM, in an environment that has it
    python benchmarks/serving.py --timed          # steps take the fitted time and no processor time

Physics. One engine (the bundled target, real forward passes) serves one system after the other, in turns;
replay edges propose what the draft would have proposed, after the time their device takes, over an emulated
link. The engine computes in a process of its own; the fleet, the server's front and its event loop are in
others, and one core is left to them. Cores share more than they show (caches, power, often one physical
core). A CPU burner of the lowest priority keeps that core busy throughout, profile included: a step costs the
same whatever the fleet does.

Server-only serving gives each of n sessions ``v(n) = new / (new * step(n) + n * prompt)`` tokens/s, by the
fitted estimator: its own steps, and everybody's prompts in between. The fastest of four SLO classes (in the
ratios 2 : 4 : 6 : 8) is 0.85 of what it gives to n = ``--devices``; that fleet is "near" capacity, 0.6 and
1.5 times as many are "below" and "above". Draft steps of three kinds of devices take 0.15, 0.4 and 1.0 of a
step at that load, a round trip 0.3. Where a step's time grows with its rows from the first row on (few
cores), drafts can win little: the table then shows who at least does not lose.

On few cores the engine's thread, the event loop and a fleet of edges share a processor and an interpreter,
which no accelerator does with its host. With ``--timed`` the engine sleeps for a step's fitted time and takes
its tokens from the trace: what is left is the server's own loss.

Each request's text is compared with the target's own: any difference fails the run. Figures under "(sim)"
are the simulator's for the same requests along the same texts, with that server's estimator, its measured
loop overhead and the round trip that the edges measured, the mean of three seeds; "±" is their difference
in percent of the real ones. Capacity is the simulator's: most devices at 95 % attainment.

A shared machine's speed wanders. Before each turn some undrafted steps are timed, one after the other; their
measured over fitted time, "machine", says how slow it has become. SLOs, draft steps and link of that turn are
as much slower, and its figures are given in the time of the profile's machine. A turn in which the machine's
speed changes by more than 15 % is repeated, twice at most. Systems take turns at each load. "pace" is what is
left: measured over fitted time of all steps of a run, over "machine". It is 1 if a step costs in serving what
it costs alone; the simulator is given the estimator at that pace and spread, as the server's own drift
correction does (``--as-fitted``: neither). "even" columns are all simulated at pace 1. The last row of the
last table is a ceiling: the simulated goodput if edges knew which drafts the target will accept.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from _serving.bed import artifacts, make_bed
from _serving.compare import ablation, compare
from _serving.interference import interference

from wispprof.bench import FleetProcess
from wispprof.testing.cpu_burner import CpuBurner


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--ablation", action="store_true")
    parser.add_argument("--interference", action="store_true")
    parser.add_argument("--engine", default="torch", choices=("torch", "vllm"))
    parser.add_argument("--timed", action="store_true", help="the engine sleeps for the fitted times")
    parser.add_argument("--as-fitted", action="store_true", help="simulate at the profile's pace")
    parser.add_argument(
        "--run", type=Path, help="folder with estimator, predictor and trace; made there if missing"
    )
    parser.add_argument("--devices", type=int, default=10, help="the fleet near capacity")
    parser.add_argument("--rounds", type=int, default=0, help="turns of each system at each load")
    parser.add_argument("--requests", type=int, default=0, help="per device and turn")
    parser.add_argument("--repeats", type=int, default=3, help="of the interference")
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    arguments = parser.parse_args()
    arguments.rounds = arguments.rounds or (1 if arguments.quick else 2)
    arguments.requests = arguments.requests or (2 if arguments.quick else 3)

    # The fleet has the last core to itself; threads started from here on keep to the others. vLLM's worker
    # leaves that core by itself.
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cores) > 1 and arguments.engine == "torch":
        os.sched_setaffinity(0, cores[:-1])

    import torch

    torch.set_num_threads(arguments.threads)
    began = time.monotonic()
    apart = cores[1:][-1:]
    with tempfile.TemporaryDirectory() as made, FleetProcess(apart) as fleet, CpuBurner(apart):
        folder = arguments.run or Path(made)
        if not (folder / "estimator.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                pool.submit(artifacts, folder, arguments).result()
        bed = make_bed(folder, arguments, fleet, apart)
        if cores:
            # On a CPU the engine computes in another process and has its cores to itself.
            os.sched_setaffinity(0, cores if torch.cuda.is_available() or not apart else apart)
        mape = bed.estimator.report["held_out"][bed.estimator.kind]["mape"]
        print(
            f"estimator {bed.estimator.kind}, held-out MAPE {mape:.1f} %; SLO classes "
            f"{', '.join(f'{s:g}' for s in bed.mix.speeds)} tokens/s, first token in "
            f"{bed.ttft_ms:.0f} ms; draft steps {', '.join(f'{k.draft_ms:g}' for k in bed.mix.profiles)} ms, "
            f"RTT {bed.rtt_ms:g} ms; {arguments.threads} engine threads; ready after "
            f"{time.monotonic() - began:.0f} s",
            flush=True,
        )
        if arguments.ablation:
            found = ablation(bed)
        elif arguments.interference:
            found = interference(bed, arguments.repeats)
        else:
            found = compare(bed)
    summary = {
        "benchmark": "serving",
        "engine": "timed" if arguments.timed else arguments.engine,
        "estimator_mape_percent": round(mape, 2),
        "slo_tokens_per_s": list(bed.mix.speeds),
        "threads": arguments.threads,
        "seconds": round(time.monotonic() - began, 1),
        **found,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
