"""Two replicas on Ray Serve: throughput against one, and twelve texts while one replica is killed.

The engine is a fake one: tokens are a hash of the prefix, and a step *sleeps* for ``2 + 8 · new tokens`` ms,
the shape of a compute-bound server. Real engines would share the few cores of one machine. So the ratio
measures routing, proxy and engine loops, not two GPUs.

Physics: every step of a saturated replica costs 8 ms per session, however many there are, so one replica
gives at most 125 tokens/s and two give twice that, however Serve spreads the connections.

One and two replicas take turns, and the medians of the turns are compared: a machine that is slow for a few
seconds is slow for both.

    python benchmarks/replicas.py            # needs wispprof[ray]; about two minutes
    python benchmarks/replicas.py --turns 1

Exit code 1 if a text is wrong or the ratio is below 1.8. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import socket
import statistics
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

VOCAB, EDGES = 256, 12


def step_ms(shape: Any) -> float:
    return 2.0 + 8.0 * float(shape.new_tokens)


def build(settings: Any) -> Any:
    """A replica's server; runs in the replica's process."""
    from wispprof.server import VerificationServer
    from wispprof.testing.fake_engine import FakeEngine

    engine = FakeEngine(VOCAB, max_context=1 << 16, step_ms=step_ms)
    return VerificationServer(engine, engine.served, settings)


def main() -> int:
    arguments = _arguments()
    import ray
    from ray import serve

    from wispprof.server.ray_replicas import deployment
    from wispprof.settings.server_settings import ServerSettings

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    settings = ServerSettings(target="stand-in", admit="all", port=port, drain_timeout_ms=500.0)
    ray.init(include_dashboard=False, num_cpus=2, log_to_driver=False, logging_level=logging.ERROR)
    turns: dict[int, list[float]] = {1: [], 2: []}
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        for replicas in (1, 2) * arguments.turns:
            serve.delete("wispprof")
            app = deployment(settings, replicas, build=build, cpus=0.5)
            serve.run(app, name="wispprof", route_prefix="/")
            asyncio.run(_all_reachable(port, replicas))
            speed = asyncio.run(_throughput(port, arguments.window))
            turns[replicas].append(speed)
            print(f"{replicas} replica(s): {speed:.1f} tokens/s", flush=True)
        wrong, resumed, seconds = asyncio.run(_lose_one(port, arguments.tokens))
    finally:
        serve.shutdown()
        ray.shutdown()
    speeds = {replicas: statistics.median(found) for replicas, found in turns.items()}
    ratio = speeds[2] / speeds[1]
    print(f"ratio of medians {ratio:.2f}")
    print(
        f"one replica of two killed under {EDGES} edges: {wrong} wrong texts of {EDGES}, "
        f"{resumed} edges resumed, {seconds:.1f} s"
    )
    summary = {
        "benchmark": "replicas",
        "target": "stand-in that sleeps 2 + 8 ms per new token",
        "tokens_per_s": {str(n): round(speed, 1) for n, speed in speeds.items()},
        "turns": {str(n): [round(speed, 1) for speed in found] for n, found in turns.items()},
        "ratio": round(ratio, 3),
        "edges": EDGES,
        "killed": 1,
        "resumed": resumed,
        "wrong": wrong,
    }
    print(json.dumps(summary))
    return 0 if ratio >= 1.8 and not wrong and resumed else 1


class Edge:
    """One connection with one undrafted generation on it."""

    def __init__(self, port: int, number: int, tokens: int) -> None:
        from wispprof.edge import EdgeClient, websocket_connections

        self.prompt = (number, 7, 11)
        self.tokens = tokens
        self.client = EdgeClient(websocket_connections(f"127.0.0.1:{port}"))
        self.generation: Any = None

    async def run(self) -> None:
        from wispprof.edge import Generation, GenerationRequest

        async with self.client:
            self.generation = Generation(self.client, GenerationRequest(self.prompt, self.tokens))
            await self.generation.run()

    @property
    def done(self) -> int:
        return len(self.generation.output) if self.generation else 0

    @property
    def right(self) -> bool:
        from wispprof.testing.fake_engine import FakeTarget

        return list(self.generation.output) == FakeTarget(VOCAB).generate(self.prompt, self.tokens)


async def _all_reachable(port: int, replicas: int) -> None:
    """Wait until the proxy routes to every replica, a moment after Serve reports ready."""
    while True:
        edges = [Edge(port, i, 4) for i in range(EDGES)]
        held = [await edge.client.__aenter__() for edge in edges]
        counts = [_connections(port + 1 + rank) for rank in range(replicas)]
        for client in held:
            await client.__aexit__(None, None, None)
        if min(counts) > 0:
            return
        await asyncio.sleep(1.0)


def _connections(port: int) -> float:
    """Edges connected to the replica whose own metrics are at ``port``."""
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    [value] = [x for x in text.splitlines() if x.startswith("wispprof:connections ")]
    return float(value.split()[1])


async def _throughput(port: int, window_s: float) -> float:
    """Committed tokens/s of twelve edges while all of them generate."""
    edges = [Edge(port, i, 3000) for i in range(EDGES)]
    tasks = [asyncio.create_task(edge.run()) for edge in edges]
    await _until(lambda: all(edge.done > 5 for edge in edges), tasks)
    begun, had = time.perf_counter(), sum(edge.done for edge in edges)
    await asyncio.sleep(window_s)
    speed = (sum(edge.done for edge in edges) - had) / (time.perf_counter() - begun)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return speed


async def _lose_one(port: int, tokens: int) -> tuple[int, int, float]:
    """Wrong texts, edges that resumed, seconds."""
    import ray

    edges = [Edge(port, i, tokens) for i in range(EDGES)]
    begun = time.perf_counter()
    tasks = [asyncio.create_task(edge.run()) for edge in edges]
    await _until(lambda: all(edge.done >= tokens // 3 for edge in edges), tasks)
    ray.kill(ray.get_actor(_replicas()[0], namespace="serve"))
    await asyncio.gather(*tasks)
    wrong = sum(not edge.right for edge in edges)
    resumed = sum(edge.client.reconnects > 0 for edge in edges)
    return wrong, resumed, time.perf_counter() - begun


def _replicas() -> list[str]:
    import ray

    named = ray.util.list_named_actors(all_namespaces=True)
    return sorted(a["name"] for a in named if a["name"].startswith("SERVE_REPLICA"))


async def _until(ready: Any, tasks: list[asyncio.Task[None]]) -> None:
    """Wait for ``ready``; raises the exception of a failed task."""
    while not ready():
        for task in tasks:
            if task.done():
                task.result()
        await asyncio.sleep(0.02)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--window", type=float, default=6.0, help="seconds of a measurement")
    parser.add_argument("--turns", type=int, default=3, help="measurements of either")
    parser.add_argument("--tokens", type=int, default=200, help="tokens of each text")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
