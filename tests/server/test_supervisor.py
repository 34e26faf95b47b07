"""``wispprof serve`` as processes: an engine process that is killed is replaced, and edges go on."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from fake_pair import Letters, drafting, edge, truth

from wispprof.edge import websocket_connections
from wispprof.engines import EngineOptions, LoadedEngine
from wispprof.errors import ModelError
from wispprof.testing.fake_engine import FakeEngine

pytestmark = pytest.mark.skipif(not Path("/proc/self").exists(), reason="finds processes in /proc")

ROOT = Path(__file__).resolve().parents[2]


def load_fake(options: EngineOptions) -> LoadedEngine:
    """An engine plugin."""
    engine = FakeEngine(step_ms=lambda shape: 3.0)
    return LoadedEngine(engine, engine.served, None)


def load_letters(options: EngineOptions) -> LoadedEngine:
    engine = FakeEngine()
    return LoadedEngine(engine, engine.served, Letters())


def load_nothing(options: EngineOptions) -> LoadedEngine:
    raise ModelError("There is no such engine.")


class Serving:
    """The command, its output so far, and its processes."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[str] = []
        self.news = asyncio.Condition()

    async def read(self) -> None:
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            async with self.news:
                self.lines.append(line.decode())
                self.news.notify_all()

    async def says(self, pattern: str, count: int = 1) -> re.Match[str]:
        """The ``count``-th line with the pattern."""
        found: list[re.Match[str]] = []

        def seen() -> bool:
            found[:] = [match for line in self.lines if (match := re.search(pattern, line))]
            return len(found) >= count

        async with self.news:
            await self.news.wait_for(seen)
        return found[count - 1]

    def children(self, front: bool) -> list[int]:
        pid = self.process.pid
        children = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        return [
            one
            for one in children
            if (b"front_process" in Path(f"/proc/{one}/cmdline").read_bytes()) is front
        ]


@asynccontextmanager
async def serving(plugin: str) -> AsyncIterator[Serving]:
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "support", ROOT / "tests" / "server")))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(ROOT / "cli.py"), "serve", "--port", "0", "--admit", "all"),
        *("--engine", f"test_supervisor:{plugin}"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=os.environ | {"PYTHONPATH": paths, "COLUMNS": "200"},
    )
    one = Serving(process)
    reading = asyncio.create_task(one.read())
    try:
        yield one
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        await reading


async def test_a_killed_engine_process_costs_a_pause_and_no_token() -> None:
    prompts = [[1, 2, n] for n in range(6)]
    async with serving("load_fake") as server:
        port = (await server.says(r"ready: ws://127.0.0.1:(\d+)"))[1]
        [engine], [front] = server.children(front=False), server.children(front=True)
        async with edge(websocket_connections(f"127.0.0.1:{port}")) as client:
            generations = [drafting(client, prompt, max_new=300) for prompt in prompts]
            tasks = [asyncio.create_task(one.run()) for one in generations]
            while any(len(one.output) < 8 for one in generations):
                await asyncio.sleep(0.002)
            os.kill(engine, signal.SIGKILL)
            await asyncio.gather(*tasks)
            assert [list(one.output) for one in generations] == [truth(p, 300) for p in prompts]
            assert all(one.stats.reopened == 1 for one in generations)
        # The connections stayed: the front is the one that was there before.
        assert server.children(front=True) == [front]
        assert server.children(front=False) != [engine]
        server.process.send_signal(signal.SIGTERM)
        assert await server.process.wait() == 0


async def test_an_engine_process_that_dies_again_and_again_is_given_up() -> None:
    async with serving("load_fake") as server:
        for count in (1, 2, 3):
            await server.says("ready: ws://", count)
            [engine] = server.children(front=False)
            os.kill(engine, signal.SIGKILL)
        assert await server.process.wait() == 1
        await server.says("The engine process ended 3 times in a row")


async def test_an_engine_that_cannot_be_loaded_is_not_tried_again() -> None:
    async with serving("load_nothing") as server:
        assert await server.process.wait() == 1
        await server.says("error:.*no such engine")
        assert not any("starting another" in line for line in server.lines)


async def test_a_tokenizer_that_cannot_be_saved_means_no_front_process() -> None:
    async with serving("load_letters") as server:
        await server.says("serving with --fronts 0")
        await server.says("ready: ws://")
        assert server.children(front=True) == server.children(front=False) == []
        server.process.send_signal(signal.SIGTERM)
        assert await server.process.wait() == 0
