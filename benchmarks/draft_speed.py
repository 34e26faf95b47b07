"""Does the edge profile foretell what drafting takes in `generate`?

    python benchmarks/draft_speed.py             # bundled pair, a minute or two
    python benchmarks/draft_speed.py --quick
    OMP_NUM_THREADS=1 python benchmarks/draft_speed.py --cpu-time      # on a machine that is not quiet

A server in a process of its own, a real edge here: link, session, controller, drafting thread. Profiles of
the draft are taken before and after the edge's requests, and per setting one line compares

- predicted: mean over both profiles of `EdgeProfile.drafting_ms` at the requests' mean context, a share of
  the steps catching up after rounds accepted whole;
- measured: drafting time over tokens drafted, as `generate` prints it (goal: within 10 %).

The physics. A step costs the same forward, features and draw in both. An edge that waits for the server comes
back to colder caches and a lower clock than a profile that drafts without a pause, and a server on
the same machine takes cores and memory bandwidth: run this on a quiet machine with a core to spare. Medians
are compared with means on purpose: what a plan promises is time spent, stragglers included.

``--cpu-time`` counts what the drafting thread computes instead of what the clock says, on both sides: it
shows whether a step *does* the same in both, whoever else is on the machine.

The last line is JSON. Exit code 1 if a line is further off than the goal.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from wispprof.artifacts import EdgeProfile, bundled
from wispprof.core import Sampling
from wispprof.profiling.edge import EdgeSettings as ProfileSettings
from wispprof.profiling.edge import profile_edge
from wispprof.profiling.prompts import held_out_prompts
from wispprof.runtime.edge.house import EdgeSettings, Prompt, open_edge
from wispprof.runtime.edge.worker import DraftStep, ThreadWorker

GOAL = 0.10


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


def serve(mode: str, tell: Any) -> None:
    """The server, until it is terminated."""
    from wispprof.runtime.server.run import running_server
    from wispprof.runtime.server.settings import ServerSettings

    async def main() -> None:
        settings = ServerSettings(
            target=str(bundled.path("models/reference-pair/target")),
            target_id="reference-pair",
            policy="wispprof" if mode == "stream" else "wisp",
            admit="all",
        )
        async with running_server(settings) as running:
            tell.send(running.split_url)
            await asyncio.Event().wait()

    asyncio.run(main())


async def generate(line: Line, url: str, prompts: list[list[int]], tokens: int) -> dict[str, float]:
    """Sums over all prompts: drafting ms, drafted tokens, rounds accepted whole, context-steps."""
    settings = EdgeSettings(
        server=url, controller="fixed", options={"k": line.k}, mode=line.mode, proactive=0
    )
    total = {"draft_ms": 0.0, "drafted": 0.0, "whole": 0.0, "context": 0.0}
    async with open_edge(settings) as house:
        # The first request warms up what a long-lived edge has warm.
        for number, prompt in enumerate([prompts[0], *prompts]):
            reply = house.reply(
                Prompt(tuple(prompt), tokens, Sampling(line.temperature, seed=number))
            )
            async for _ in reply.text():
                pass
            if number == 0:
                continue
            stats = reply.stats
            total["draft_ms"] += stats.draft_ms
            total["drafted"] += stats.drafted
            accepted = stats.accepted_by_position
            total["whole"] += accepted[line.k - 1] if len(accepted) >= line.k else 0
            total["context"] += stats.drafted * (len(prompt) + len(reply.tokens) / 2)
    return total


def profile(cpu_time: bool) -> EdgeProfile:
    """The quick edge profile, without a sustained window."""
    clock = time.thread_time if cpu_time else time.perf_counter
    return profile_edge(ProfileSettings(sustained_s=0.0), clock=clock)


def by_cpu_time() -> None:
    """From here on, an edge's draft steps are timed by their thread's CPU time."""

    def step(self: Any, sequence: list[int]) -> DraftStep | None:
        begun = time.thread_time()
        drafted, _ = self._follower.draft(sequence)
        if drafted is None:
            return None
        return DraftStep(drafted, (time.thread_time() - begun) * 1000.0)

    ThreadWorker._step = step  # type: ignore[method-assign]


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
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(bundled.path("models/reference-pair/draft")))
    prompts = held_out_prompts(tokenizer, count, 128)
    context = multiprocessing.get_context("spawn")
    measured: dict[str, dict[str, float]] = {}
    profiles = [profile(args.cpu_time)]
    for mode in dict.fromkeys(line.mode for line in lines):
        hear, tell = context.Pipe(duplex=False)
        server = context.Process(target=serve, args=(mode, tell), daemon=True)
        server.start()
        url = hear.recv()
        for line in lines:
            if line.mode == mode:
                measured[line.name] = asyncio.run(generate(line, url, prompts, args.tokens))
        server.terminate()
        server.join()
    profiles.append(profile(args.cpu_time))
    apart = abs(profiles[1].draft_ms(256) / profiles[0].draft_ms(256) - 1)
    print(f"{'setting':22}{'predicted ms':>13}{'measured ms':>13}{'off':>8}{'whole rounds':>14}")
    document: dict[str, Any] = {"profiles_apart": apart, "lines": {}}
    for name, total in measured.items():
        ms = total["draft_ms"] / total["drafted"]
        at, share = round(total["context"] / total["drafted"]), total["whole"] / total["drafted"]
        said = statistics.fmean(p.drafting_ms(at, share) for p in profiles)
        print(f"{name:22}{said:>13.3f}{ms:>13.3f}{ms / said - 1:>+8.1%}{total['whole']:>14.0f}")
        document["lines"][name] = {"predicted_ms": said, "measured_ms": ms, "off": ms / said - 1}
    print(f"\nthe two profiles: {apart:.1%} apart; goal: within {GOAL:.0%}")
    print(json.dumps(document))
    sys.exit(any(abs(line["off"]) > GOAL for line in document["lines"].values()))


if __name__ == "__main__":
    main()
