"""The wire in both directions: hostile edges against a server, a hostile server against an edge."""

from __future__ import annotations

import asyncio
import random

from fake_pair import drafting, edge, in_process, plain, truth
from fuzzing import HANG_S, ServedPair, counts, fuzz, watched_logs
from hostile_frames import EDGE_FRAMES, SERVER_FRAMES, hostile_frame, hostile_frames
from hypothesis import given
from hypothesis import strategies as st
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from wispprof import protocol
from wispprof.edge.connection import Connection, LinkLost
from wispprof.errors import WispprofError

HELLO = protocol.encode(protocol.Hello(protocol.PROTOCOL_VERSION, ""))


# --- hostile edges ---


async def hostile_edge(url: str, first: bytes, frames: list[bytes]) -> int:
    """Send the frames; returns the close code (1000 if the server kept the connection to the end)."""
    async with connect(url, compression=None, ping_interval=None) as socket:
        try:
            for data in (first, *frames):
                await socket.send(data)
            # The server answers every ping behind valid frames, or has closed the connection.
            await socket.send(protocol.encode(protocol.Ping(77)))
            while True:
                answer = protocol.decode_server(await socket.recv(decode=False))
                if isinstance(answer, protocol.Pong) and answer.number == 77:
                    return 1000
        except ConnectionClosed as err:
            return err.rcvd.code if err.rcvd is not None else 1006


@fuzz(20)
@given(st.integers(0, 1 << 40))
def test_a_hostile_edge_costs_only_its_own_connection(pair: ServedPair, number: int) -> None:
    dice = random.Random(number)
    first = HELLO if dice.randrange(10) else hostile_frame(dice, dice.choice(EDGE_FRAMES))
    frames = hostile_frames(dice, EDGE_FRAMES, 60)
    counts["frames"] += len(frames) + 1
    code = pair.thread.run(hostile_edge(pair.split_url, first, frames))
    assert code in (1000, 1002, 1008, 1013)
    pair.logs.check()


def test_both_endpoints_still_answer_exactly(pair: ServedPair) -> None:
    pair.check()


# --- a hostile server ---


class ScriptedConnection:
    """A server that sends ``frames``, whatever the edge sends, and then hangs up."""

    def __init__(self, frames: list[bytes]) -> None:
        self._frames = iter(frames)

    async def send(self, data: bytes) -> None: ...

    async def receive(self) -> bytes:
        await asyncio.sleep(0)
        frame = next(self._frames, None)
        if frame is None:
            raise LinkLost("The hostile server hung up.")
        return frame

    async def close(self) -> None: ...


WELCOME = protocol.encode(protocol.Welcome(protocol.PROTOCOL_VERSION, "", "", 4096, 32, True))


async def after_a_hostile_server(frames: list[bytes], drafts: bool) -> None:
    """An edge meets a hostile server first, then an ordinary one under the same address."""
    prompt = (1, 2, 3)
    async with in_process("wispprof") as server:
        scripts = [frames]

        async def dial() -> Connection:
            return ScriptedConnection(scripts.pop()) if scripts else await server.connect()

        try:
            async with edge(dial, backoff_ms=0.1, backoff_max_ms=0.1, hello_ms=1000.0) as client:
                first = drafting(client, prompt, max_new=8, k=2) if drafts else plain(client, prompt, 8)
                try:
                    await first.run()
                except WispprofError:
                    counts["refused"] += 1
                second = plain(client, (7, 8), 8)
                await second.run()
                assert list(second.output) == truth((7, 8), 8)
        except WispprofError:  # the hostile server's hello was refused for good
            counts["refused"] += 1


@fuzz(30)
@given(st.integers(0, 1 << 40))
def test_an_edge_survives_a_hostile_server(number: int) -> None:
    dice = random.Random(number)
    first = WELCOME if dice.randrange(5) else hostile_frame(dice, dice.choice(SERVER_FRAMES))
    frames = [first, *hostile_frames(dice, SERVER_FRAMES, 30)]
    counts["frames"] += len(frames)

    async def bounded() -> None:
        try:
            await asyncio.wait_for(after_a_hostile_server(frames, dice.random() < 0.5), HANG_S)
        except TimeoutError:
            counts["hangs"] += 1
            raise

    with watched_logs() as logs:
        asyncio.run(bounded())
    logs.check()
