"""A server for its page to show: sessions of several kinds and classes, steps that take time, drafts of which
some are wrong."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

from wispprof.edge import EdgeClient, Generation, GenerationRequest, TimedWorker, websocket_connections
from wispprof.policies import make_controller
from wispprof.server.process import RunningServer, running_server
from wispprof.settings.edge_settings import ClientSettings, DraftingSettings
from wispprof.settings.server_settings import ServerSettings
from wispprof.testing.fake_engine import FakeDrafter, FakeEngine, FakeTarget
from wispprof.types import BatchShape, Sampling, Slo

KINDS = {"phone": (40.0, 0.6, 6.0), "laptop": (12.0, 0.8, 12.0), "workstation": (4.0, 0.85, 24.0)}
"""Name of a kind: ms a draft step, share of right drafts, tokens/s of its SLO."""


def step_ms(shape: BatchShape) -> float:
    """Time of a step of the engine."""
    return 14.0 + 0.06 * shape.new_tokens + 0.0004 * shape.cached_tokens


@asynccontextmanager
async def busy_server(sessions: int, keys: tuple[str, ...] = ()) -> AsyncIterator[RunningServer]:
    """A server with so many sessions, each followed by another when it ends."""
    engine = FakeEngine(step_ms=step_ms)
    model = replace(engine.served, id="example-32b")
    settings = ServerSettings(admit="all", api_keys=keys)
    async with AsyncExitStack() as stack:
        running = await stack.enter_async_context(running_server(settings, engine=engine, model=model))
        tasks = []
        for number in range(sessions):
            kind = list(KINDS)[number % len(KINDS)]
            client_settings = ClientSettings(name=kind)
            if keys:
                access = replace(client_settings.access, key=keys[0])
                client_settings = replace(client_settings, access=access)
            connect = websocket_connections(running.split_url)
            client = await stack.enter_async_context(EdgeClient(connect, client_settings))
            tasks.append(asyncio.create_task(_write(client, kind, number)))
        try:
            yield running
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _write(client: EdgeClient, kind: str, number: int) -> None:
    draft_ms, accuracy, speed = KINDS[kind]
    while True:
        prompt = tuple((number * 31 + place * 7) % 256 for place in range(64 + 8 * (number % 9)))
        request = GenerationRequest(prompt, 60 + 10 * (number % 5), Sampling(), Slo(speed, 2_000.0))
        worker = TimedWorker(FakeDrafter(FakeTarget(), accuracy, number), lambda context: draft_ms)
        settings = DraftingSettings(draft_ahead=16)
        await Generation(client, request, worker, make_controller("fixed", k=4), settings).run()
        number += 1000
