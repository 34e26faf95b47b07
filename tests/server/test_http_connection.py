"""Half-open, silent and endless HTTP requests, without a network: transport and clock are the test's."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from wispprof.errors import WispprofError
from wispprof.server.http_connection import (
    MAX_UNWANTED_BYTES,
    ConnectionLimits,
    Connections,
    HttpConnection,
)
from wispprof.server.logs import BURST, WINDOW_S, RateLimit
from wispprof.server.web_server import server_tls, within_descriptors
from wispprof.testing.virtual_time import run_virtual


class MemoryTransport(asyncio.Transport):
    """Remembers what was written and done to it."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closed_s: float | None = None
        self.reading = True
        self.protocol: Any = None

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def write(self, data: Any) -> None:
        self.written += bytes(data)

    def close(self) -> None:
        if self.closed_s is None:
            self.closed_s = asyncio.get_running_loop().time()
            asyncio.get_running_loop().call_soon(self.protocol.connection_lost, None)

    abort = close

    def is_closing(self) -> bool:
        return self.closed_s is not None

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True


async def refuses(scope: Any, receive: Any, send: Any) -> None:
    """Answers at once, whatever body follows."""
    await send({"type": "http.response.start", "status": 401, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body"})


async def reads(scope: Any, receive: Any, send: Any) -> None:
    """Answers when the body is complete."""
    while (message := await receive()).get("more_body"):
        pass
    if message["type"] == "http.request":
        await refuses(scope, receive, send)


class Client:
    def __init__(self, app: Any, connections: Connections) -> None:
        config = uvicorn.Config(app, log_config=None, lifespan="off")
        config.load()
        slot = connections.admit("192.0.2.1")
        assert slot is not None
        self.transport = MemoryTransport()
        self.protocol = HttpConnection(
            slot, connections, config=config, server_state=ServerState(), app_state={}
        )
        self.transport.protocol = self.protocol
        self.protocol.connection_made(self.transport)

    async def send(self, data: bytes) -> None:
        if not self.transport.is_closing():
            self.protocol.data_received(data)
        await asyncio.sleep(0)

    async def closed_after(self, limit_s: float = 300.0) -> float:
        """Seconds of virtual time until the server closed the connection."""
        loop = asyncio.get_running_loop()
        begin = loop.time()
        while self.transport.closed_s is None:
            assert loop.time() - begin < limit_s, "never closed"
            await asyncio.sleep(0.25)
        return self.transport.closed_s - begin


LIMITS = ConnectionLimits(max_connections=4, per_address=100, request_s=10.0)
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 1000000\r\n\r\n"


def test_silent_and_half_open_requests_end() -> None:
    async def main() -> None:
        dropped: list[str] = []
        connections = Connections(LIMITS, dropped.append)
        silent, head = Client(reads, connections), Client(reads, connections)
        await head.send(b"POST / HTT")
        assert await silent.closed_after() == pytest.approx(10.0, abs=0.5)
        assert silent.transport.written == b""
        assert head.transport.written.startswith(b"HTTP/1.1 408 ")
        assert dropped == ["timeout", "timeout"]
        await asyncio.sleep(2.0)
        assert len(connections) == 0

    run_virtual(main())


def test_a_dripping_body_ends_and_a_slow_honest_one_does_not() -> None:
    async def main() -> None:
        connections = Connections(LIMITS)
        drip, honest = Client(reads, connections), Client(reads, connections)
        await drip.send(HEAD)
        await honest.send(HEAD)
        for _ in range(20):
            await drip.send(b"x")
            await honest.send(b"x" * 50_000)  # 25 kB/s
            await asyncio.sleep(2.0)
        assert drip.transport.written.startswith(b"HTTP/1.1 408 ")
        assert honest.transport.written.startswith(b"HTTP/1.1 401 ")
        # After that it waits for its next request, no longer than keep-alive allows.
        await honest.closed_after(10.0)

    run_virtual(main())


def test_a_body_that_nobody_wants_is_cut() -> None:
    async def main() -> None:
        connections = Connections(LIMITS)
        flood = Client(refuses, connections)
        await flood.send(HEAD.replace(b"1000000", b"100000000"))
        await asyncio.sleep(0)
        assert flood.transport.written.startswith(b"HTTP/1.1 401 ")
        for _ in range(MAX_UNWANTED_BYTES // (1 << 20) + 1):
            assert flood.transport.reading
            await flood.send(bytes(1 << 20))
        assert not flood.transport.reading
        assert await flood.closed_after() <= 1.5

    run_virtual(main())


def test_a_client_that_reads_nothing_ends() -> None:
    async def main() -> None:
        connections = Connections(LIMITS)
        deaf, slow = Client(reads, connections), Client(reads, connections)
        for one in (deaf, slow):
            await one.send(HEAD)
            one.protocol._phase = "answer"
            one.protocol.pause_writing()
        await asyncio.sleep(30.0)
        slow.protocol.resume_writing()
        assert await deaf.closed_after() == pytest.approx(30.0, abs=0.5)
        assert slow.transport.closed_s is None

    run_virtual(main())


def test_the_oldest_waiting_connection_makes_room() -> None:
    async def main() -> None:
        dropped: list[str] = []
        connections = Connections(LIMITS, dropped.append)
        half_open = [Client(reads, connections) for _ in range(4)]
        await half_open[0].send(HEAD)  # a request under way is not closed for a new one
        new = Client(reads, connections)
        assert [one.transport.is_closing() for one in half_open] == [False, True, False, False]
        await new.send(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
        await asyncio.sleep(0)
        assert new.transport.written.startswith(b"HTTP/1.1 401 ")
        assert (len(connections), dropped) == (4, ["evicted"])
        for one in (*half_open[2:], new):
            await one.send(HEAD)
        assert connections.admit("192.0.2.1") is None
        assert dropped == ["evicted", "full"]

    run_virtual(main())


def test_one_address_is_bounded_and_this_machine_is_not() -> None:
    connections = Connections(ConnectionLimits(max_connections=50, per_address=3))
    slots = [connections.admit("203.0.113.9") for _ in range(4)]
    assert slots[3] is None
    assert all(connections.admit("127.0.0.1") for _ in range(9))
    assert all(connections.admit("::1") for _ in range(9))
    assert slots[0] is not None
    connections.release(slots[0])
    connections.release(slots[0])
    assert connections.admit("203.0.113.9") is not None
    assert len(connections) == 3 + 18


def test_connections_fit_the_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 256))
    assert within_descriptors(ConnectionLimits()).max_connections == 192
    assert within_descriptors(ConnectionLimits(max_connections=10)).max_connections == 10


def test_swapped_tls_files_are_one_clear_line(tmp_path: Any) -> None:
    (tmp_path / "cert.pem").write_text("-----BEGIN PRIVATE KEY-----\n")
    with pytest.raises(WispprofError, match="certificate chain and its private key") as err:
        server_tls(tmp_path / "cert.pem", tmp_path / "key.pem")
    assert "--tls-key" in err.value.hint
    assert server_tls(None, None) is None


def test_log_lines_of_a_kind_are_few() -> None:
    now = [0.0]
    limit = RateLimit(lambda: now[0])

    def line(number: int) -> logging.LogRecord:
        return logging.LogRecord(
            "wispprof.server", logging.WARNING, "here.py", number, "bad %s", ("x",), None
        )

    assert sum(limit.filter(line(1)) for _ in range(10_000)) == BURST
    assert limit.filter(line(2))
    now[0] = WINDOW_S
    record = line(1)
    assert limit.filter(record)
    assert record.getMessage() == f"bad x ({10_000 - BURST} more such lines were left out)"
