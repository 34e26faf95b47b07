"""``kill -9`` of a real server process in the middle of 20 generations; another one takes its port."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys

from fake_pair import drafting, edge, plain, truth

from wispprof.edge import websocket_connections

SERVER = """
import asyncio, sys
from wispprof.testing.fake_engine import FakeEngine
from wispprof.server.process import running_server
from wispprof.settings.server_settings import ServerSettings
from wispprof.testing.link_emulator import LinkProxy
from wispprof.settings.shared_settings import LinkSettings
from wispprof.settings.shared_settings import LinkModel

async def main():
    engine = FakeEngine(step_ms=lambda shape: 3.0)
    settings = ServerSettings(policy="wisp", admit="all")
    async with running_server(settings, engine=engine, model=engine.served) as running:
        # A known port for a server that takes a free one.
        link = LinkSettings(LinkModel(rtt_ms=0.0))
        async with LinkProxy("127.0.0.1", int(sys.argv[1]), "127.0.0.1", running.port, link):
            print("ready", flush=True)
            await asyncio.Event().wait()

asyncio.run(main())
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def start(port: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", SERVER, str(port)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )


async def ready(process: subprocess.Popen[bytes]) -> None:
    assert process.stdout is not None
    assert await asyncio.to_thread(process.stdout.readline) == b"ready\n"


LONG = 192
"""Tokens of a generation: far more than the fastest has when the slowest has its first eight."""


async def test_twenty_generations_survive_kill_nine() -> None:
    port = free_port()
    first = start(port)
    second: subprocess.Popen[bytes] | None = None
    try:
        await ready(first)
        async with edge(websocket_connections(f"127.0.0.1:{port}"), backoff_ms=20.0) as client:
            prompts = [(n, 5, 5) for n in range(20)]
            made = [
                drafting(client, p, max_new=LONG, draft_ms=1.0, proactive=4)
                if p[0] % 4
                else plain(client, p, max_new=LONG)
                for p in prompts
            ]
            tasks = [asyncio.create_task(g.run()) for g in made]
            while min(g.buffer.committed_len for g in made) < 8:
                await asyncio.sleep(0.002)
            first.send_signal(signal.SIGKILL)
            first.wait()
            assert not any(task.done() for task in tasks)
            second = start(port)
            stats = await asyncio.gather(*tasks)
        for prompt, generation, stat in zip(prompts, made, stats, strict=True):
            assert list(generation.output) == truth(prompt, LONG)
            assert stat.reopened >= 1
    finally:
        for process in (first, second):
            if process is not None:
                process.kill()
                process.wait()
                if process.stdout is not None:
                    process.stdout.close()
