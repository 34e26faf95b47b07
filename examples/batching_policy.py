"""A batching policy of your own, in the simulator and in a real server.

    python examples/batching_policy.py

The policy serves the shortest sessions first. It is pure: it sees what a step may hold and what each session
could do, and says who advances. Server and simulator call the same object.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import wispprof
from wispprof.policies.batch_builder import RETRY_MS, BatchBuilder, no_batch, ready_sessions
from wispprof.policies.interface import Limits, SessionView, StepPlan
from wispprof.settings.fleet_settings import InputSettings
from wispprof.simulation import System
from wispprof.simulation.arrivals import ClosedFleet, Lengths
from wispprof.simulation.scenario_inputs import read_inputs
from wispprof.types import StepTimeEstimator


@dataclass
class ShortestFirst:
    """Every step takes the sessions with the fewest tokens first, each with all drafts it holds."""

    name: str = "shortest-first"
    stream: bool = False  # synchronous drafting: a session is ready when its round has arrived

    def plan(
        self,
        now_ms: float,
        sessions: list[SessionView],
        estimator: StepTimeEstimator,
        limits: Limits,
    ) -> StepPlan:
        waiting = sorted(ready_sessions(sessions), key=lambda s: s.cached + s.prompt_left)
        batch = BatchBuilder(estimator, limits)
        for session in waiting:
            if batch.full:
                break
            batch.add(session)
        if batch.items:
            return batch.plan(self.name)
        return no_batch(now_ms, now_ms + RETRY_MS if waiting else None, "nothing fits")


NAME = "examples.batching_policy:ShortestFirst"
"""What `serve --policy` and `simulate --policy` would be given."""


def simulated(policy: str, devices: int = 24) -> tuple[float, float]:
    """(goodput in tokens/s, SLO attainment) of a fleet with prompts of very different lengths."""
    parts = read_inputs(InputSettings(server="h200-sxm-qwen3-32b-vllm-bf16-tp1"))
    report = wispprof.simulate(
        wispprof.Scenario(
            system=System(policy, policy, "fixed", controller_options={"k": 4}),
            server=parts.server,
            load=ClosedFleet(devices, Lengths(prompt=400, prompt_sigma=1.2, output=96)),
            acceptance=parts.acceptance,
            devices=((parts.device, 1.0),),
            slos=((wispprof.Slo(4.0, ttft_ms=2_000.0), 1.0),),
            seconds=60.0,
        )
    )
    return report.goodput, report.attainment


async def served(policy: str, prompt: str) -> str:
    """What a real server with this policy answers to a real edge, both in this process."""
    async with wispprof.running_server(wispprof.ServerSettings(policy=policy)) as server:
        settings = wispprof.EdgeSettings(server=f"127.0.0.1:{server.port}", max_tokens=32)
        async with wispprof.open_edge(settings) as edge:
            reply = edge.reply(wispprof.Prompt(edge.tokenizer.encode(prompt), 32, wispprof.Sampling()))
            return "".join([piece async for piece in reply.text()])


def main() -> dict[str, str]:
    for policy in ("fcfs", NAME):
        goodput, attainment = simulated(policy)
        print(f"{policy:40} {goodput:6.0f} tokens/s goodput, {100 * attainment:3.0f} % SLO attainment")
    texts = {policy: asyncio.run(served(policy, "def area(")) for policy in ("fcfs", NAME)}
    print(f"def area({texts[NAME]}")
    print("equal under both policies:", texts["fcfs"] == texts[NAME])
    return texts


if __name__ == "__main__":
    main()
