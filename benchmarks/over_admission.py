"""Offers twice the capacity: admitted sessions meet their SLO, the others are refused at once.

Physics: a step of the engine sleeps 5 ms + 2 ms per token row; sessions have 40 tokens at 20 tokens/s. Steps
must then start every 50 ms, so about (50 · load − 5) / 2 sessions fit. Requests arrive at random, twice as
fast as that many sessions can end. The same load is offered with admission by SLO and without.

    python benchmarks/over_admission.py [--seconds 8]

The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from wispprof.policies import make_batch_policy
from wispprof.server import (
    Refused,
    ServerSession,
    VerificationServer,
)
from wispprof.server.verification_server import monotonic_ms
from wispprof.settings.server_settings import ServerSettings
from wispprof.testing.fake_engine import FakeEngine
from wispprof.types import BatchShape, GenerationRequest, Slo

SPEED, TOKENS = 20.0, 40
FIXED_MS, ROW_MS = 5.0, 2.0


def step_ms(shape: BatchShape) -> float:
    return FIXED_MS + ROW_MS * shape.new_tokens


class Client:
    """Waits for one answer and checks its speed."""

    key = ""

    def __init__(self, ended: asyncio.Event) -> None:
        self.first_ms = self.last_ms = 0.0
        self.tokens = 0
        self._ended = ended

    def committed(self, session: ServerSession, commit, verify_ms: float, load_level: int) -> None:
        self.last_ms = monotonic_ms()
        self.first_ms = self.first_ms or self.last_ms
        self.tokens += len(commit.tokens)
        if commit.finished:
            self._ended.set()

    def failed(self, session: ServerSession, code: str, message: str, retry_ms: float = 0.0) -> None:
        self._ended.set()

    @property
    def met_slo(self) -> bool:
        if self.tokens < TOKENS:
            return False
        return (self.tokens - 1) * 1000.0 / (self.last_ms - self.first_ms) >= SPEED


async def offer(admit: str, policy: str, seconds: float, rate: float) -> tuple[int, int, int]:
    """(offered, admitted, met their SLO)."""
    engine = FakeEngine(64, step_ms=step_ms)
    settings = ServerSettings(admit=admit)
    server = VerificationServer(engine, engine.served, settings, policy=make_batch_policy(policy))
    await server.start()
    dice = random.Random(1)
    clients: list[tuple[Client, asyncio.Event]] = []
    offered = 0
    until = monotonic_ms() + seconds * 1000.0
    while monotonic_ms() < until:
        offered += 1
        ended = asyncio.Event()
        client = Client(ended)
        prompt = tuple(dice.randrange(64) for _ in range(4))
        try:
            server.open(GenerationRequest(prompt, TOKENS, slo=Slo(SPEED), undrafted=True), client)
            clients.append((client, ended))
        except Refused:
            pass
        await asyncio.sleep(dice.expovariate(rate))
    await asyncio.gather(*(ended.wait() for _, ended in clients))
    await server.stop()
    return offered, len(clients), sum(client.met_slo for client, _ in clients)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=8.0)
    seconds = parser.parse_args().seconds
    capacity = (1000.0 / SPEED - FIXED_MS) / ROW_MS
    rate = 2.0 * capacity / (TOKENS / SPEED)
    print(f"capacity about {capacity:.0f} sessions; {rate:.0f} requests/s offered, twice what can end")
    print(f"{'policy':>9} {'admission':>9} {'offered':>8} {'admitted':>8} {'met':>5} {'attainment':>10}")
    rows = []
    for policy in ("fcfs", "wispprof"):
        for admit in ("slo", "all"):
            offered, admitted, met = asyncio.run(offer(admit, policy, seconds, rate))
            share = met / max(1, admitted)
            rows.append({"policy": policy, "admit": admit, "attainment": round(share, 3)})
            print(f"{policy:>9} {admit:>9} {offered:>8} {admitted:>8} {met:>5} {share:>10.1%}")
    print(json.dumps({"benchmark": "over_admission", "rows": rows}))


if __name__ == "__main__":
    main()
