"""Three hosts: a server in a process of its own, two edges behind links of their own, one of which is cut.

The hosts are emulated as far as one machine allows: real sockets, real processes for the server, and between
each edge and the server a TCP proxy with that edge's round trip, jitter, stalls and cuts (``wispprof link``).
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from wispprof.edge import (
    EdgeClient,
    Generation,
    GenerationRequest,
    TimedWorker,
    websocket_connections,
)
from wispprof.policies import make_controller
from wispprof.settings.edge_settings import DraftingSettings
from wispprof.settings.shared_settings import LinkModel, LinkSettings
from wispprof.testing.fake_engine import FakeDrafter, FakeTarget
from wispprof.testing.link_emulator import LinkProxy
from wispprof.types import Sampling

TOKENS = 96
TARGET = FakeTarget()

SERVER = """
import asyncio, sys
from wispprof.server import running_server
from wispprof.settings.server_settings import ServerSettings
from wispprof.testing.fake_engine import FakeEngine

async def main():
    engine = FakeEngine(step_ms=lambda shape: 2.0 + 0.1 * shape.new_tokens)
    settings = ServerSettings(policy=sys.argv[1], admit="all")
    async with running_server(settings, engine=engine, model=engine.served) as running:
        print(running.port, flush=True)
        await asyncio.to_thread(sys.stdin.read)
        while len(running.server.manager):
            await asyncio.sleep(0.001)
        await running.server.check_integrity()
    print("clean" if not engine.sessions else "leaks", flush=True)

asyncio.run(main())
"""


@asynccontextmanager
async def server_host(policy: str) -> AsyncIterator[int]:
    """The port of a server process; on exit, the process must have freed every session."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SERVER, policy, stdin=pipe, stdout=pipe
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        yield int(await process.stdout.readline())
        process.stdin.close()
        assert await process.stdout.readline() == b"clean\n"
        assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def generation(client: EdgeClient, number: int, sampling: Sampling) -> Generation:
    request = GenerationRequest((number, 3, 9), TOKENS, sampling=sampling)
    worker = TimedWorker(FakeDrafter(TARGET, 0.7), lambda context: 0.5)
    controller = make_controller("fixed", k=4)
    return Generation(client, request, worker, controller, DraftingSettings(draft_ahead=8, proactive=4))


async def edge_host(port: int, numbers: range, cut: LinkProxy | None) -> list[Generation]:
    """Four sessions over one connection; ``cut``: the link to cut halfway through."""
    async with EdgeClient(websocket_connections(f"127.0.0.1:{port}")) as client:
        made = [generation(client, n, Sampling(0.7, seed=n)) for n in numbers]
        tasks = [asyncio.create_task(one.run()) for one in made]
        if cut is not None:
            while min(one.buffer.committed_len for one in made) < TOKENS // 2:
                await asyncio.sleep(0.002)
            cut.cut()
        await asyncio.gather(*tasks)
    return made


@pytest.mark.parametrize("policy", ["wisp", "wispprof"])
async def test_two_edges_over_two_links_get_the_right_text(policy: str) -> None:
    near = LinkSettings(LinkModel(rtt_ms=4.0, jitter_ms=1.0), seed=1)
    far = LinkSettings(
        LinkModel(rtt_ms=30.0, jitter_ms=10.0, loss=0.02),
        stall_every_ms=300.0,
        stall_ms=60.0,
        seed=2,
    )
    async with server_host(policy) as port:
        one = LinkProxy("127.0.0.1", 0, "127.0.0.1", port, near)
        other = LinkProxy("127.0.0.1", 0, "127.0.0.1", port, far)
        async with one, other, asyncio.TaskGroup() as group:
            first = group.create_task(edge_host(one.port, range(4), None))
            second = group.create_task(edge_host(other.port, range(4, 8), other))
    for made, was_cut in ((first.result(), False), (second.result(), True)):
        for done in made:
            request = done.request
            wanted = TARGET.generate(request.tokens, TOKENS, request.sampling)
            assert list(done.output) == wanted
            assert (done.stats.reopened > 0) == was_cut
    # Negative control: another seed is another text.
    assert TARGET.generate((0, 3, 9), TOKENS, Sampling(0.7, seed=99)) != list(first.result()[0].output)
