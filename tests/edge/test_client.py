"""The client against the real server over real sockets."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from fake_pair import drafting, edge, plain, truth
from msgspec import structs

from wispprof import protocol
from wispprof.edge import Connection, LinkLost, server_url, websocket_connections
from wispprof.edge.connection import RttMeter
from wispprof.errors import HandshakeRefused, RequestRefused, ServerUnreachable
from wispprof.server.process import running_server
from wispprof.settings.server_settings import ServerSettings
from wispprof.settings.shared_settings import LinkModel, LinkSettings, ServerAccess
from wispprof.testing.fake_engine import FakeEngine
from wispprof.testing.link_emulator import LinkProxy
from wispprof.types import Sampling

PROMPTS = [(n, n + 1, 7) for n in range(16)]
KEY = "a key of at least sixteen"


@asynccontextmanager
async def hash_server(policy: str = "wisp", **settings: object):  # type: ignore[no-untyped-def]
    engine = FakeEngine()
    chosen = ServerSettings(policy=policy, admit="all", **settings)  # type: ignore[arg-type]
    async with running_server(chosen, engine=engine, model=engine.served) as running:
        yield running


@pytest.mark.parametrize("policy", ["wisp", "fcfs", "wispprof"])
async def test_mixed_batches_over_real_sockets_are_lossless(policy: str) -> None:
    async with hash_server(policy) as running:
        async with edge(websocket_connections(running.split_url), tokenizer="hash") as client:
            made = [
                drafting(client, p, max_new=32, k=k, draft_ms=0.1, proactive=4)
                for p, k in zip(PROMPTS, (0, 1, 4, 8) * 3, strict=False)
            ]
            made += [plain(client, p, 32) for p in PROMPTS[12:]]
            await asyncio.gather(*(g.run() for g in made))
            for generation in made:
                assert list(generation.output) == truth(generation.request.tokens, 32)
        assert client.rtt.samples >= 1


async def test_sampled_text_is_the_same_split_or_server_only() -> None:
    sampling = Sampling(0.8, 0, 0.9, seed=5)
    async with hash_server() as running, edge(websocket_connections(running.split_url)) as client:
        split = drafting(client, PROMPTS[0], max_new=24, draft_ms=0.1, sampling=sampling)
        await split.run()
    assert list(split.output) == truth(PROMPTS[0], 24, sampling)


@pytest.mark.parametrize(
    ("settings", "said", "code"),
    [
        ({"tokenizer": "other"}, "okenizer", "hello"),
        ({"tokenizer": "hash", "target": "other"}, "other", "model"),
        ({"tokenizer": "hash", "key": "wrong"}, "key", "key"),
        ({"tokenizer": "hash", "key": ""}, "key", "key"),
    ],
    ids=["tokenizer", "target", "key", "no key"],
)
async def test_a_wrong_edge_is_refused_at_hello_with_the_reason(
    settings: dict[str, Any], said: str, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with hash_server(api_keys=(KEY,)) as running:
        given: dict[str, Any] = {**settings, "access": ServerAccess(settings.get("key", KEY))}
        given.pop("key", None)
        with pytest.raises(HandshakeRefused, match=said) as refused:
            async with edge(websocket_connections(running.split_url), **given):
                pass
        assert refused.value.code == code
        assert refused.value.hint
        (told,) = [r.getMessage() for r in caplog.records if r.name == "wispprof.server"]
        assert told.startswith("refused an edge at hello")
        assert said in told
        assert KEY not in told
        # Everybody else is served on.
        async with edge(
            websocket_connections(running.split_url), tokenizer="hash", access=ServerAccess(KEY)
        ) as client:
            assert client.welcome is not None
            assert client.welcome.target == "hash-256"


async def test_a_wrong_protocol_version_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    class Newer:
        """Says hello in the next version of the protocol."""

        def __init__(self, inner: Connection) -> None:
            self._inner = inner

        async def send(self, data: bytes) -> None:
            frame = protocol.decode_edge(data)
            if isinstance(frame, protocol.Hello):
                frame = structs.replace(frame, protocol=protocol.PROTOCOL_VERSION + 1)
            await self._inner.send(protocol.encode(frame))

        async def receive(self) -> bytes:
            return await self._inner.receive()

        async def close(self) -> None:
            await self._inner.close()

    async with hash_server() as running:

        async def connect() -> Connection:
            return Newer(await websocket_connections(running.split_url)())

        with pytest.raises(HandshakeRefused, match="rotocol"):
            async with edge(connect):
                pass
        assert "protocol" in caplog.text


async def test_a_request_beyond_the_context_is_refused_alone() -> None:
    async with hash_server() as running, edge(websocket_connections(running.split_url)) as client:
        with pytest.raises(RequestRefused, match="refused this request") as refused:
            await drafting(client, [1] * 5000, max_new=8).run()
        assert refused.value.code == "limit"
        fine = drafting(client, PROMPTS[0], max_new=8, draft_ms=0.1)
        await fine.run()
        assert list(fine.output) == truth(PROMPTS[0], 8)


@pytest.mark.parametrize("policy", ["wisp", "wispprof"])
async def test_sessions_resume_on_a_restarted_server(policy: str, caplog: pytest.LogCaptureFixture) -> None:
    """The first server dies in the middle of 20 generations; another one takes its place."""
    where = ""

    async def connect() -> Connection:
        return await websocket_connections(where)()

    prompts = [(n, 9, 9) for n in range(20)]
    async with AsyncExitStack() as stack:
        async with hash_server(policy) as running:
            where = running.split_url
            client = await stack.enter_async_context(edge(connect, backoff_ms=5.0))
            made = [drafting(client, p, max_new=64, draft_ms=0.5, proactive=4) for p in prompts]
            tasks = [asyncio.create_task(g.run()) for g in made]
            while min(g.buffer.committed_len for g in made) < 10:
                await asyncio.sleep(0.001)
        async with hash_server(policy) as running:
            where = running.split_url
            stats = await asyncio.gather(*tasks)
            await stack.aclose()
    assert all(stat.reopened >= 1 for stat in stats)
    for prompt, generation in zip(prompts, made, strict=True):
        assert list(generation.output) == truth(prompt, 64)
    said = [record.getMessage() for record in caplog.records if record.name == "wispprof.edge"]
    assert said[0] == "no link to the server: connecting"
    assert "the link to the server is up, after" in said[1]


async def test_a_first_opening_is_no_reopening() -> None:
    """Not even one that the client sends itself, because the link was not up when it was asked for."""
    async with hash_server() as running, edge(websocket_connections(running.split_url)) as client:
        assert not client.up
        early = await drafting(client, PROMPTS[0], max_new=8, draft_ms=0.1).run()
        assert client.up
        late = await drafting(client, PROMPTS[1], max_new=8, draft_ms=0.1).run()
    assert early.reopened == late.reopened == 0


async def test_links_are_cut_by_a_proxy_in_between() -> None:
    async with (
        hash_server() as running,
        LinkProxy("127.0.0.1", 0, running.host, running.port, LinkSettings(LinkModel(2.0))) as proxy,
    ):
        connect = websocket_connections(f"127.0.0.1:{proxy.port}")
        async with edge(connect, backoff_ms=5.0) as client:
            made = [drafting(client, p, max_new=48, draft_ms=0.5) for p in PROMPTS]
            running_tasks = [asyncio.create_task(g.run()) for g in made]
            while min(g.buffer.committed_len for g in made) < 12:
                await asyncio.sleep(0.001)
            proxy.cut()
            stats = await asyncio.gather(*running_tasks)
            assert all(s.reopened == 1 for s in stats)
            assert proxy.connections == 2
            for generation in made:
                assert list(generation.output) == truth(generation.request.tokens, 48)
            assert client.rtt.least_ms >= 2.0


async def test_nobody_there(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ServerUnreachable, match="No server answers at"):
        async with edge(websocket_connections("127.0.0.1:9"), give_up_ms=50.0, backoff_ms=5.0):
            pass
    (said,) = [record.getMessage() for record in caplog.records if record.name == "wispprof.edge"]
    assert said.startswith("no server yet: trying for 0 s (No server answers at")


async def test_a_server_that_was_connected_is_not_said_to_be_no_websocket_server() -> None:
    """Neither while it closes connections, nor while it answers 503."""
    answers = [b"", b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n"]

    async def leaving(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answers[0])
        writer.close()

    async with hash_server() as running:
        connect, port = websocket_connections(running.split_url), running.port
        await (await connect()).close()
    async with await asyncio.start_server(leaving, running.host, port):
        with pytest.raises(LinkLost, match="closed the connection before it answered") as lost:
            await connect()
        assert "TLS" not in str(lost.value)
        with pytest.raises(LinkLost, match="TLS"):  # here it may be the reason
            await websocket_connections(running.split_url)()
        answers.pop(0)
        with pytest.raises(LinkLost, match=r"takes no connections now \(HTTP 503\)"):
            await connect()


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("127.0.0.1:8200", "ws://127.0.0.1:8200/v1/split"),
        ("http://host:1", "ws://host:1/v1/split"),
        ("https://host", "wss://host/v1/split"),
        ("wss://host/other", "wss://host/other"),
    ],
)
def test_addresses(text: str, url: str) -> None:
    assert server_url(text) == url


@pytest.mark.parametrize("text", ["ftp://host", "ws://", ""])
def test_wrong_addresses(text: str) -> None:
    with pytest.raises(LinkLost, match="not a server address"):
        server_url(text)


def test_the_round_trip_is_smoothed() -> None:
    meter = RttMeter(100.0)
    meter.add(20.0)
    assert (meter.mean_ms, meter.least_ms) == (20.0, 20.0)
    for _ in range(200):
        meter.add(40.0)
    assert meter.mean_ms == pytest.approx(40.0, abs=0.1)
    assert meter.spread_ms < 1.0
    assert meter.least_ms == 20.0
