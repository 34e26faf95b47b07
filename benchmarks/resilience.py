"""Does a killed server, a cut or stalled link or a long outage change a token? With real processes.

    python benchmarks/resilience.py
    python benchmarks/resilience.py --generations 6 --tokens 64 --only kill
    python benchmarks/resilience.py --generations 4 --only outage --cycles 3

A real ``wispprof serve`` on the bundled target serves a number of edges. Each edge has its own connection
through a link proxy, the bundled draft model and one generation: half of them greedy, half sampled with their
own seeds, one in four server-only. First they run undisturbed; then the same requests run again while

* ``kill``: the server dies by ``kill -9`` once every generation is under way, and another process takes its
  port three seconds later;
* ``front``: the process that holds the connections dies by ``kill -9``; the server starts another;
* ``engine``: the process with the model and the sessions dies by ``kill -9``; the server starts another, and
  the connections stay;
* ``channel``: the process that holds the connections is stopped for two seconds, so the channel to the engine
  process stalls;
* ``cut``: every link is cut at once, twice;
* ``stall``: links deliver nothing for the second half of every two seconds.

``outage`` is another trial, in cycles. A server dies with a generation under way and stays away for three
times the edge's give-up time. The generation and a request made meanwhile must end with a clear error. Once
the server is back under its address, the next request must be served within two seconds. In odd cycles that
request comes at once, in even ones after the edge has found the server by itself. Every fourth cycle another
model of the same tokenizer takes the address in the middle of an answer, which must end with a refusal.

Physics: a killed server loses every session's KV; only the edges know the committed tokens. They reconnect
and reopen their sessions with those tokens and the same seed. The noise of every position is the same, so the
text must continue unchanged to its last token. A user sees a pause: the outage, the server's start and the
prefill.

Prints a table and one JSON line. Ends with an error if a generation does not finish with exactly the
undisturbed text, or if the disturbance did not happen.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any

from _serving.outages import UNDER_WAY, Outages, outages, report_outages
from _serving.server_process import Server

from wispprof.artifacts import bundled_path
from wispprof.edge import EdgeClient, Generation, GenerationRequest, websocket_connections
from wispprof.edge.draft_device import DraftDevice
from wispprof.errors import WispprofError
from wispprof.settings.edge_settings import ClientSettings
from wispprof.settings.shared_settings import LinkModel, LinkSettings
from wispprof.testing.link_emulator import LinkProxy
from wispprof.types import Sampling

OUTAGE_S, CHANNEL_STALL_S = 3.0, 2.0


@dataclass(frozen=True)
class Run:
    """One scenario. ``exact``: texts equal to the undisturbed run's; ``reopened``: sessions opened again;
    ``disturbed``: kills, cuts or stalls; ``pause_s``: the longest wait for a token, of any generation."""

    scenario: str
    finished: int
    exact: int
    reopened: int
    disturbed: int
    pause_s: float
    seconds: float


@dataclass
class Edge:
    """One generation on a connection of its own."""

    generation: Generation
    heard: list[float]
    err: str = ""

    async def run(self) -> None:
        try:
            async for _ in self.generation.stream():
                self.heard.append(time.monotonic())
        except WispprofError as err:
            self.err = str(err)

    @property
    def under_way(self) -> bool:
        return len(self.generation.output) >= UNDER_WAY

    @property
    def pause_s(self) -> float:
        return max((b - a for a, b in zip(self.heard, self.heard[1:], strict=False)), default=0.0)


Disturb = Callable[[Server, LinkProxy, list[Edge]], Awaitable[int]]
"""Disturbs generations under way; returns how often."""


async def nothing(server: Server, proxy: LinkProxy, edges: list[Edge]) -> int:
    return 0


async def kill(server: Server, proxy: LinkProxy, edges: list[Edge]) -> int:
    server.kill()
    await asyncio.sleep(OUTAGE_S)
    server.start()
    return 1


async def front(server: Server, proxy: LinkProxy, edges: list[Edge]) -> int:
    return server.signal_fronts(signal.SIGKILL)


async def engine(server: Server, proxy: LinkProxy, edges: list[Edge]) -> int:
    return server.signal_engine(signal.SIGKILL)


async def channel(server: Server, proxy: LinkProxy, edges: list[Edge]) -> int:
    stopped = server.signal_fronts(signal.SIGSTOP)
    await asyncio.sleep(CHANNEL_STALL_S)
    server.signal_fronts(signal.SIGCONT)
    return stopped


async def cut(server: Server, proxy: LinkProxy, edges: list[Edge]) -> int:
    proxy.cut()
    while not all(e.generation.stats.reopened or e.generation.stats.finished for e in edges):
        await asyncio.sleep(0.01)
    proxy.cut()
    return 2 * len(edges)


STALLS = LinkSettings(LinkModel(10.0), stall_every_ms=2000.0, stall_ms=1000.0)
SCENARIOS: dict[str, tuple[Disturb, LinkSettings]] = {
    "kill": (kill, LinkSettings(LinkModel(10.0))),
    "front": (front, LinkSettings(LinkModel(10.0))),
    "engine": (engine, LinkSettings(LinkModel(10.0))),
    "channel": (channel, LinkSettings(LinkModel(10.0))),
    "cut": (cut, LinkSettings(LinkModel(10.0))),
    "stall": (nothing, STALLS),
}


async def scenario(
    name: str, server: Server, device: DraftDevice, prompts: list[list[int]], args: Any
) -> tuple[Run, list[tuple[int, ...]]]:
    """Run every generation once; the result, and the texts."""
    disturb, settings = SCENARIOS.get(name, (nothing, LinkSettings(LinkModel(10.0))))
    begun = time.monotonic()
    async with contextlib.AsyncExitStack() as stack:
        proxy = LinkProxy("127.0.0.1", 0, "127.0.0.1", server.port, settings)
        await stack.enter_async_context(proxy)
        edges = [
            await stack.enter_async_context(edge(proxy.port, device, prompt, number, args))
            for number, prompt in enumerate(prompts)
        ]
        tasks = [asyncio.create_task(one.run()) for one in edges]
        while not all(one.under_way for one in edges) and not any(t.done() for t in tasks):
            await asyncio.sleep(0.005)
        disturbed = await disturb(server, proxy, edges)
        await asyncio.gather(*tasks)
    seconds = time.monotonic() - begun
    if settings.stall_ms:
        disturbed = int(seconds * 1000.0 // settings.stall_every_ms)
    for one in edges:
        if one.err:
            print(f"  {name}: {one.err}", file=sys.stderr)
    texts = [one.generation.output for one in edges]
    done = sum(bool(one.generation.stats.finished) for one in edges)
    reopened = sum(one.generation.stats.reopened for one in edges)
    pause = max(one.pause_s for one in edges)
    return Run(name, done, 0, reopened, disturbed, pause, seconds), texts


@contextlib.asynccontextmanager
async def edge(
    port: int, device: DraftDevice, prompt: list[int], number: int, args: Any
) -> AsyncIterator[Edge]:
    """An edge that is connected and ready to generate."""
    sampling = Sampling(0.8, 0, 0.95, seed=number) if number % 2 else Sampling()
    request = GenerationRequest(tuple(prompt), args.tokens, sampling)
    settings = ClientSettings(give_up_ms=120_000.0)
    async with EdgeClient(websocket_connections(f"127.0.0.1:{port}"), settings) as client:
        if number % 4 == 3:
            yield Edge(Generation(client, request), [])
            return
        with device.lend(prompt) as (worker, controller):
            yield Edge(Generation(client, request, worker, controller), [])


async def run(args: Any) -> tuple[list[Run], Outages | None]:
    from wispprof.engines.loading import load_model
    from wispprof.profiling.prompts import held_out_prompts

    loaded = load_model(str(bundled_path("models/reference-pair/draft")))
    prompts = held_out_prompts(loaded.tokenizer, args.generations, 64)
    device = DraftDevice("model", "wispprof", loaded=loaded)
    server = Server()
    runs: list[Run] = []
    scenarios = [name for name in args.only if name in SCENARIOS]
    try:
        found = await outages(device, prompts, args) if "outage" in args.only else None
        if not scenarios:
            return runs, found
        server.start()
        await server.ready()
        plain, wanted = await scenario("undisturbed", server, device, prompts, args)
        for name in ["undisturbed", *scenarios]:
            one, texts = plain, wanted
            if name != "undisturbed":
                print(f"{name} …", file=sys.stderr)
                one, texts = await scenario(name, server, device, prompts, args)
            exact = sum(a == b for a, b in zip(texts, wanted, strict=True))
            runs.append(Run(**{**asdict(one), "exact": exact}))
    finally:
        server.kill()
        device.close()
    return runs, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--generations", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=160, help="per generation")
    parser.add_argument("--cycles", type=int, default=20, help="outages")
    names = [*SCENARIOS, "outage"]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    args = parser.parse_args()
    runs, found = asyncio.run(run(args))
    if found is not None:
        report_outages(found)
    if not runs:
        return
    print(f"{args.generations} generations of {args.tokens} tokens at most\n")
    print(
        f"{'':14}{'finished':>10}{'exact':>8}{'disturbed':>11}{'reopened':>10}{'longest pause s':>17}"
        f"{'seconds':>9}"
    )
    for one in runs:
        print(
            f"{one.scenario:14}{one.finished:>10}{one.exact:>8}{one.disturbed:>11}{one.reopened:>10}"
            f"{one.pause_s:>17.2f}{one.seconds:>9.1f}"
        )
    print(json.dumps({"benchmark": "resilience", "runs": [asdict(one) for one in runs]}))
    for one in runs:
        if min(one.finished, one.exact) < args.generations:
            raise WispprofError(f"{one.scenario}: a text was lost or changed.")
        missed = one.scenario in ("kill", "front", "engine", "cut") and one.reopened < args.generations
        if missed or (one.scenario in ("channel", "stall") and not one.disturbed):
            raise WispprofError(f"{one.scenario} came too late.", "Raise --tokens.")


if __name__ == "__main__":
    try:
        main()
    except WispprofError as err:
        sys.exit(f"error: {err}")
