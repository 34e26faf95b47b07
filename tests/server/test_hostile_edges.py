"""Hostile, broken and vanishing edges: no crash, no wrong token, nothing left behind."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import msgspec
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from raw_edge import edge
from websockets.asyncio.client import connect

from wispprof import protocol
from wispprof.server import VerificationServer, running_server
from wispprof.server.engine_client import EngineClient
from wispprof.server.websocket_endpoint import WebSocketEndpoint
from wispprof.sessions.draft_buffer import DraftBuffer
from wispprof.settings.server_settings import ServerSettings
from wispprof.testing.fake_engine import FakeDrafter, FakeEngine
from wispprof.types import Sampling

VOCAB = 32
FRAMES_PER_EXAMPLE, EXAMPLES = 500, 20


# --- 10,000 mutated frames, in memory ---


class MemorySocket:
    """The part of Starlette's WebSocket that the endpoint uses."""

    def __init__(self) -> None:
        self.inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.sent: list[bytes] = []
        self.news = asyncio.Event()
        self.closed: int | None = None
        self.scope: dict[str, Any] = {}

    async def accept(self) -> None: ...

    async def receive(self) -> dict[str, Any]:
        return await self.inbox.get()

    async def send_bytes(self, data: bytes) -> None:
        self.sent.append(data)
        self.news.set()

    async def close(self, code: int = 1000) -> None:
        self.closed = code

    def put(self, data: bytes) -> None:
        self.inbox.put_nowait({"type": "websocket.receive", "bytes": data})

    def hang_up(self) -> None:
        self.inbox.put_nowait({"type": "websocket.disconnect", "code": 1006})


class Visitor:
    """Sends frames over a connection and opens a new one when it is closed."""

    def __init__(self, server: VerificationServer) -> None:
        self._front = EngineClient.within(server)
        self.socket = MemorySocket()
        self.task: asyncio.Task[None] | None = None
        self.thrown_out = 0

    async def send(self, data: bytes) -> None:
        if self.task is None or self.task.done() or self.socket.closed is not None:
            if self.task is not None:
                await self.task
                self.thrown_out += 1
            self.socket = MemorySocket()
            self.task = asyncio.create_task(WebSocketEndpoint(self._front, self.socket).serve())  # type: ignore[arg-type]
            self.socket.put(protocol.encode(protocol.Hello(protocol.PROTOCOL_VERSION, "")))
        self.socket.put(data)
        await asyncio.sleep(0)

    async def leave(self) -> None:
        self.socket.hang_up()
        if self.task is not None:
            await self.task


def plausible(dice: random.Random) -> protocol.EdgeFrame:
    """Frames of an edge, valid or nearly so."""
    number = dice.randrange(4)
    tokens = [dice.randrange(VOCAB) for _ in range(dice.randrange(1, 12))]
    kind = dice.randrange(10)
    if kind < 3:
        return protocol.Open(number, tokens, dice.randrange(1, 30), undrafted=kind == 0)
    if kind < 8:
        acceptance_prob = bytes(dice.randrange(256) for _ in tokens)
        epoch, base = dice.randrange(4), dice.randrange(40)
        return protocol.Draft(number, epoch, base, tokens, acceptance_prob, 1.0, dice.uniform(-9.0, 99.0))
    return protocol.Close(number) if kind == 8 else protocol.Ping(number, b"x", dice.randrange(100))


def wild(dice: random.Random) -> protocol.EdgeFrame:
    """Well-formed frames without meaning."""

    def number() -> int:
        return dice.choice([-1, 0, 1, 2, VOCAB, 1 << 31, 1 << 63, -(1 << 63)])

    def real() -> float:
        return dice.choice([0.0, -1.0, 1e308, float("nan"), float("inf"), -float("inf")])

    tokens = [dice.choice([-1, 0, 1, VOCAB - 1, VOCAB]) for _ in range(dice.randrange(80))]
    if dice.randrange(2):
        opening = protocol.Open(number(), tokens, number(), number(), real(), real(), real())
        return msgspec.structs.replace(opening, seed=number(), top_k=number(), stop=[number()])
    acceptance_prob = bytes(dice.randrange(80))
    return protocol.Draft(number(), number(), number(), tokens, acceptance_prob, real(), real())


def mutated(dice: random.Random) -> bytes:
    """A frame's bytes, sometimes with flipped bits, cut or extended."""
    data = bytearray(protocol.encode(wild(dice) if dice.randrange(4) == 0 else plausible(dice)))
    how, place = dice.randrange(10), dice.randrange(len(data))
    if how == 0:
        data[place] ^= 1 << dice.randrange(8)
    elif how == 1:
        del data[place:]
    elif how == 2:
        data[place:place] = dice.randbytes(dice.randrange(1, 7))
    return bytes(data)


async def bystander(server: VerificationServer) -> None:
    """A correct session on its own connection, meanwhile."""
    socket = MemorySocket()
    link = asyncio.create_task(WebSocketEndpoint(EngineClient.within(server), socket).serve())  # type: ignore[arg-type]
    socket.put(protocol.encode(protocol.Hello(protocol.PROTOCOL_VERSION, "")))
    socket.put(protocol.encode(protocol.Open(0, [1, 2, 3], 25, undrafted=True)))
    commits: list[int] = []
    read = 0
    while len(commits) < 25:
        await socket.news.wait()
        socket.news.clear()
        for data in socket.sent[read:]:
            frame = protocol.decode_server(data)
            assert not isinstance(frame, protocol.Problem), frame
            if isinstance(frame, protocol.Commit):
                commits += frame.tokens
        read = len(socket.sent)
    assert commits == FakeEngine(VOCAB).target.generate([1, 2, 3], 25)
    socket.hang_up()
    await link


async def storm(batch: list[bytes], policy: str) -> None:
    engine = FakeEngine(VOCAB, max_context=64, kv_tokens=600)
    server = VerificationServer(
        engine,
        engine.served,
        ServerSettings(policy=policy, prefix_cache_sessions=3, max_drafts=8, hello_timeout_ms=1e6),
    )
    await server.start()
    visitor = Visitor(server)
    honest = asyncio.create_task(bystander(server))
    for data in batch:
        await visitor.send(data)
    await honest
    await visitor.leave()
    while len(server.manager):
        await asyncio.sleep(0)
    assert server.loop.failed_steps == server.loop.rejected_plans == 0
    await server.check_integrity()
    await server.stop()
    assert engine.sessions == ()
    assert engine.kv_free == 600


@settings(max_examples=EXAMPLES, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(st.integers(0, 1 << 32), st.sampled_from(["fcfs", "wisp", "wispprof"]))
def test_ten_thousand_mutated_frames(seed: int, policy: str) -> None:
    dice = random.Random(seed)
    asyncio.run(storm([mutated(dice) for _ in range(FRAMES_PER_EXAMPLE)], policy))


# --- over real sockets ---


async def test_two_hundred_connections_vanish_mid_round() -> None:
    engine = FakeEngine(VOCAB)
    options = ServerSettings(policy="wisp", admit="all", prefix_cache_sessions=4)
    async with running_server(options, engine=engine, model=engine.served) as running:
        manager = running.server.manager

        async def vanish(number: int) -> None:
            async with connect(running.split_url, compression=None) as socket:
                await socket.send(protocol.encode(protocol.Hello(protocol.PROTOCOL_VERSION, "")))
                await socket.recv()
                await socket.send(protocol.encode(protocol.Open(0, [number % VOCAB, 1, 2], 500)))
                if number % 2:
                    first = protocol.decode_server(await socket.recv(decode=False))
                    assert isinstance(first, protocol.Commit)
                    round_ = protocol.Draft(0, 0, first.committed_len, [1, 2], bytes(2), 1.0, 50.0)
                    await socket.send(protocol.encode(round_))
                socket.transport.abort()

        async with edge(running.split_url) as one:
            innocent = asyncio.create_task(one.generate(0, [5, 6], 120, drafter=FakeDrafter(engine.target)))
            for start in range(0, 200, 25):
                await asyncio.gather(*(vanish(start + n) for n in range(25)))
            assert await innocent == engine.target.generate([5, 6], 120)
        while len(manager):
            await asyncio.sleep(0.001)
        await running.server.check_integrity()
        while running.server.metrics.connections._value.get():
            await asyncio.sleep(0.001)
        assert len(engine.sessions) <= 4
    assert engine.kv_free == 1 << 20


async def test_a_slow_reader_is_disconnected_and_delays_nobody() -> None:
    engine = FakeEngine(VOCAB)
    options = ServerSettings(policy="fcfs")  # 16 pongs fill a megabyte
    async with running_server(options, engine=engine, model=engine.served) as running:
        async with connect(running.split_url, compression=None, max_queue=1) as slow:
            await slow.send(protocol.encode(protocol.Hello(protocol.PROTOCOL_VERSION, "")))
            slow.transport.pause_reading()
            await slow.send(protocol.encode(protocol.Open(0, [1], 4000, undrafted=True)))
            ping = protocol.encode(protocol.Ping(1, b"", 1 << 16))
            for _ in range(200):
                await slow.send(ping)
            async with edge(running.split_url) as one:
                found = await one.generate(0, [9], 40, drafter=FakeDrafter(engine.target))
            assert found == engine.target.generate([9], 40)
            while len(running.server.manager):
                await asyncio.sleep(0.001)
            slow.transport.abort()
        await running.server.check_integrity()


async def test_drafts_out_of_order_twice_late_and_of_old_epochs() -> None:
    """Every frame is repeated, shuffled among the last few, and old ones come back much later."""
    dice = random.Random(3)
    engine = FakeEngine(VOCAB)
    sampling = Sampling(0.9, seed=4)
    prompt, length = [3, 1, 4], 80
    for policy in ("wisp", "wispprof"):
        options = ServerSettings(policy=policy, max_drafts=16)
        async with (
            running_server(options, engine=engine, model=engine.served) as running,
            connect(running.split_url, compression=None) as socket,
        ):
            await socket.send(protocol.encode(protocol.Hello(protocol.PROTOCOL_VERSION, "")))
            welcome = protocol.decode_server(await socket.recv(decode=False))
            assert isinstance(welcome, protocol.Welcome)
            await socket.send(protocol.encode(protocol.Open(0, prompt, length, temperature=0.9, seed=4)))
            path = DraftBuffer(prompt, stream=welcome.stream, draft_ahead_limit=6, end=3 + length)
            drafter = FakeDrafter(engine.target, 0.5)
            drafter.open(prompt, sampling)
            sent: list[bytes] = []
            finished = ""
            while not finished:
                commit = protocol.decode_server(await socket.recv(decode=False))
                assert isinstance(commit, protocol.Commit), commit
                effect = path.on_commit(commit.committed_len, commit.tokens, commit.accepted)
                finished = commit.finished
                if effect.rollback_to is not None:
                    drafter.rollback(effect.rollback_to)
                drafter.extend(effect.extend)
                while path.capacity_left:
                    path.propose(drafter.draft().token, 0.6, 1.0)
                out = path.take()
                if out is None:
                    continue
                batch = [
                    protocol.encode(
                        protocol.Draft(0, out.epoch, base, list(part), bytes(len(part)), 1.0, 9.0)
                    )
                    for base, part in halves(out.base, out.tokens)
                ]
                sent += batch
                noise = [*batch, *batch, *dice.sample(sent, min(4, len(sent)))]
                dice.shuffle(noise)
                # Round mode waits for its round: the honest order comes last.
                for data in [*noise, *batch]:
                    await socket.send(data)
            assert list(path.committed[3:]) == engine.target.generate(prompt, length, sampling)
        assert engine.sessions == ()


def halves(base: int, tokens: tuple[int, ...]) -> list[tuple[int, tuple[int, ...]]]:
    middle = len(tokens) // 2
    return [(base, tokens[:middle]), (base + middle, tokens[middle:])]
