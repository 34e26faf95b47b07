"""Does the edge profile foretell what drafting takes in `generate`?

    python benchmarks/draft_speed.py             # bundled pair, about four minutes
    python benchmarks/draft_speed.py --quick
    OMP_NUM_THREADS=1 python benchmarks/draft_speed.py --cpu-time      # on a machine that is not quiet

A server in a process of its own, a real edge here: link, session, controller, drafting thread. Short
profiles of the draft (steps and rounds of the quick grid, at the requests' temperature) are taken before,
between and after the edge's requests, a few prompts at a time, so that a slow minute of the machine falls
upon both alike. Per setting one line compares

- predicted: mean over the profiles before and after each stretch of requests of
  `EdgeProfile.drafting_ms` at their mean context, a share of the steps catching up after rounds accepted
  whole and a share resuming after a rest;
- measured: drafting time over tokens drafted, as `generate` prints it (goal: within 10 %).

Rests. In round mode an edge rests before every round, for a round trip and the server's time; a stream edge
only where its lead is full, often so briefly that it pays a part of a rest. So the pauses before the steps
are looked at, and each counts by its length, in both modes alike.

The physics. A step costs the same forward, features and draw in both; after a rest threads must be woken, and
caches and clocks are cold. What is asked here is what drafting takes on the edge's own device, which no
server shares. So the server gets the machine's last core, one thread and OMP_WAIT_POLICY=PASSIVE, and the
edge and its profiles the other cores; memory bandwidth and the host of a virtual machine they share all the
same. Run it on a quiet machine of two cores or more.
Medians are compared with means on purpose: a plan predicts time spent, stragglers included.
The mean without its slowest hundredth of the steps is shown beside it, and does not count.

``--cpu-time`` counts what the drafting thread computes instead of what the clock says, on both sides: it
shows whether a step *does* the same in both, whoever else is on the machine.

The last line is JSON. Exit code 1 if a line is further off than the goal.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from wispprof.artifacts import EdgeProfile, bundled_path
from wispprof.artifacts.profile import rested_share
from wispprof.edge.draft_worker import DraftStep, ThreadWorker
from wispprof.edge.edge_runtime import Prompt, open_edge
from wispprof.profiling.drafter_runner import EDGE_GRIDS
from wispprof.profiling.edge_profiler import EdgeProfilerSettings as ProfileSettings
from wispprof.profiling.edge_profiler import profile_edge
from wispprof.profiling.prompts import held_out_prompts
from wispprof.settings.edge_settings import DraftingSettings, EdgeSettings
from wispprof.types import Sampling

GOAL = 0.10
STRETCH = 4
"""Prompts between two profiles."""


@dataclass(frozen=True)
class Line:
    """One setting: mode, draft length, temperature."""

    mode: str
    k: int
    temperature: float

    @property
    def name(self) -> str:
        return f"{self.mode} k={self.k} T={self.temperature:g}"


LINES = (
    Line("round", 4, 0.0),
    Line("round", 8, 0.0),
    Line("stream", 8, 0.0),
    Line("round", 4, 0.8),
)


def serve(mode: str, tell: Any, cores: set[int]) -> None:
    """The server on its cores, until it is terminated."""
    if cores:
        os.sched_setaffinity(0, cores)
    from wispprof.server import running_server
    from wispprof.settings.server_settings import ServerSettings

    async def main() -> None:
        settings = ServerSettings(
            target=str(bundled_path("models/reference-pair/target")),
            target_id="reference-pair",
            policy="wispprof" if mode == "stream" else "wisp",
            admit="all",
        )
        async with running_server(settings) as running:
            tell.send(running.split_url)
            await asyncio.Event().wait()

    asyncio.run(main())


def share_cores() -> tuple[set[int], set[int]]:
    """The edge's cores and the server's; both empty where the system cannot keep a process to some."""
    if not hasattr(os, "sched_setaffinity"):
        return set(), set()
    cores = sorted(os.sched_getaffinity(0))
    return set(cores[:-1] or cores), set(cores[-1:])


SPARING = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
"""What the server's process is started with."""


def start_server(mode: str, cores: set[int]) -> tuple[Any, str]:
    """The server's process and its address."""
    context = multiprocessing.get_context("spawn")
    hear, tell = context.Pipe(duplex=False)
    server = context.Process(target=serve, args=(mode, tell, cores), daemon=True)
    before = dict(os.environ)
    os.environ.update(SPARING)  # for spawned processes; this one has read them already
    try:
        server.start()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return server, hear.recv()


@dataclass
class Steps:
    """The drafting thread's steps: how long each took, and what share of a rest came before it."""

    step_ms: list[float] = field(default_factory=list)
    rested: list[float] = field(default_factory=list)
    ended_s: float = 0.0

    def watch(self) -> None:
        """From here on, every worker's steps are noted."""
        step = ThreadWorker._step

        def noted(worker: Any, sequence: list[int]) -> DraftStep | None:
            began_s = time.perf_counter()
            done = step(worker, sequence)
            if done is not None:
                self.step_ms.append(done.draft_ms)
                self.rested.append(rested_share((began_s - self.ended_s) * 1000.0))
            self.ended_s = time.perf_counter()
            return done

        ThreadWorker._step = noted  # type: ignore[method-assign]

    def clear(self) -> None:
        self.step_ms.clear()
        self.rested.clear()

    @property
    def trimmed_ms(self) -> float:
        """Mean without the slowest hundredth."""
        return statistics.fmean(sorted(self.step_ms)[: max(1, len(self.step_ms) * 99 // 100)])


async def generate(
    line: Line, url: str, prompts: list[list[int]], tokens: int, steps: Steps
) -> dict[str, float]:
    """Sums over all prompts: drafting ms, drafted tokens, rounds accepted whole, context-steps; of the
    steps those that resumed after a rest, and their trimmed mean."""
    settings = EdgeSettings(
        server=url,
        controller="fixed",
        k=line.k,
        mode=line.mode,
        drafting=DraftingSettings(proactive=0),
    )
    total = {"draft_ms": 0.0, "drafted": 0.0, "whole": 0.0, "context": 0.0}
    async with open_edge(settings) as runtime:
        # The first request warms up what a long-lived edge has warm.
        for number, prompt in enumerate([prompts[0], *prompts]):
            reply = runtime.reply(Prompt(tuple(prompt), tokens, Sampling(line.temperature, seed=number)))
            async for _ in reply.text():
                pass
            if number == 0:
                steps.clear()
                continue
            stats = reply.stats
            total["draft_ms"] += stats.draft_ms
            total["drafted"] += stats.drafted
            accepted = stats.accepted_by_position
            total["whole"] += accepted[line.k - 1] if len(accepted) >= line.k else 0
            total["context"] += stats.drafted * (len(prompt) + len(reply.tokens) / 2)
    total["resumed"] = sum(steps.rested)
    total["trimmed_ms"] = steps.trimmed_ms
    return total


def profile(cpu_time: bool, temperature: float) -> EdgeProfile:
    """The quick edge profile's steps and rounds, around the requests' contexts and drawn as they draw."""
    clock = time.thread_time if cpu_time else time.perf_counter
    axes = replace(EDGE_GRIDS["quick"], contexts=(64, 256), chunks=(), burst_s=0.0, sustained_s=0.0)
    return profile_edge(ProfileSettings(axes=axes, sampling=Sampling(temperature)), clock=clock)


def by_cpu_time() -> None:
    """From here on, an edge's draft steps are timed by their thread's CPU time."""

    def step(self: Any, sequence: list[int]) -> DraftStep | None:
        begun = time.thread_time()
        drafted, _ = self._follower.draft(sequence)
        if drafted is None:
            return None
        return DraftStep(drafted, (time.thread_time() - begun) * 1000.0)

    ThreadWorker._step = step  # type: ignore[method-assign]


SUMMED = ("draft_ms", "drafted", "whole", "resumed", "predicted_ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=96, help="tokens per request")
    parser.add_argument("--quick", action="store_true", help="one setting, few prompts")
    parser.add_argument("--cpu-time", action="store_true", help="CPU time of the drafting thread")
    args = parser.parse_args()
    if args.cpu_time:
        by_cpu_time()
    lines = LINES[:1] if args.quick else LINES
    count = 3 if args.quick else args.prompts
    edges, servers = share_cores()
    if edges:
        os.sched_setaffinity(0, edges)
    import torch
    from transformers import AutoTokenizer

    torch.set_num_threads(len(edges) or max(1, (os.cpu_count() or 1) - 1))
    tokenizer = AutoTokenizer.from_pretrained(str(bundled_path("models/reference-pair/draft")))
    prompts = held_out_prompts(tokenizer, count, 128)
    steps = Steps()
    steps.watch()
    print(
        f"{'setting':22}{'predicted ms':>13}{'measured ms':>13}{'off':>8}{'cut_drafts ms':>12}"
        f"{'whole rounds':>14}{'resumed':>9}{'resume ms':>11}"
    )
    document: dict[str, Any] = {"threads": torch.get_num_threads(), "lines": {}}
    speeds: list[float] = []
    for mode in dict.fromkeys(line.mode for line in lines):
        server, url = start_server(mode, servers)
        for line in (line for line in lines if line.mode == mode):
            sums: dict[str, float] = dict.fromkeys(SUMMED, 0.0)
            trimmed_ms, rests_ms = [], []
            before = profile(args.cpu_time, line.temperature)
            speeds.append(before.draft_ms(256))
            for first in range(0, count, STRETCH):
                some = prompts[first : first + STRETCH]
                total = asyncio.run(generate(line, url, some, args.tokens, steps))
                after = profile(args.cpu_time, line.temperature)
                both, before = (before, after), after
                speeds.append(after.draft_ms(256))
                drafted = total["drafted"]
                at, whole = round(total["context"] / drafted), total["whole"] / drafted
                resumed = total["resumed"] / drafted
                predicted = statistics.fmean(p.drafting_ms(at, whole, resumed) for p in both)
                total["predicted_ms"] = predicted * drafted
                sums = {name: sums[name] + total[name] for name in SUMMED}
                trimmed_ms.append(total["trimmed_ms"])
                rests_ms += [p.resume_ms(at) for p in both]
            drafted = sums["drafted"]
            predicted, ms = sums["predicted_ms"] / drafted, sums["draft_ms"] / drafted
            resumed, rest_ms = sums["resumed"] / drafted, statistics.fmean(rests_ms)
            cut_drafts = statistics.fmean(trimmed_ms)
            print(
                f"{line.name:22}{predicted:>13.3f}{ms:>13.3f}{ms / predicted - 1:>+8.1%}"
                f"{cut_drafts:>12.3f}{sums['whole']:>14.0f}{resumed:>9.1%}{rest_ms:>11.2f}",
                flush=True,
            )
            document["lines"][line.name] = {
                "predicted_ms": predicted,
                "measured_ms": ms,
                "off": ms / predicted - 1,
                "trimmed_ms": cut_drafts,
                "resumed": resumed,
                "resume_ms": rest_ms,
            }
        server.terminate()
        server.join()
    apart = document["profiles_apart"] = max(speeds) / min(speeds) - 1
    print(f"\nthe {len(speeds)} profiles: {apart:.1%} apart; goal: within {GOAL:.0%}")
    print(json.dumps(document))
    sys.exit(any(abs(line["off"]) > GOAL for line in document["lines"].values()))


if __name__ == "__main__":
    main()
