"""Emulated links deliver late, in order, and break when told to."""

from __future__ import annotations

import asyncio

import pytest

from wispprof.edge import Connection, LinkLost
from wispprof.settings.shared_settings import LinkModel, LinkSettings
from wispprof.testing.link_emulator import LinkProxy, emulate_link
from wispprof.testing.virtual_time import run_virtual


class Echo:
    """Answers every frame with itself."""

    def __init__(self) -> None:
        self.frames: asyncio.Queue[bytes] = asyncio.Queue()
        self.closed = False

    async def send(self, data: bytes) -> None:
        self.frames.put_nowait(data)

    async def receive(self) -> bytes:
        return await self.frames.get()

    async def close(self) -> None:
        self.closed = True


async def echo() -> Connection:
    return Echo()


def round_trips(settings: LinkSettings, frames: int = 30, size: int = 10, gap_s: float = 0.0) -> list[float]:
    """Arrival times (ms) of frames sent ``gap_s`` apart, checked for order."""

    async def main() -> list[float]:
        loop = asyncio.get_running_loop()
        connection = await emulate_link(echo, settings)()
        begun = loop.time()

        async def send() -> None:
            for number in range(frames):
                await connection.send(number.to_bytes(2, "big") * (size // 2))
                await asyncio.sleep(gap_s)

        sending = asyncio.create_task(send())
        times = []
        for number in range(frames):
            data = await connection.receive()
            assert int.from_bytes(data[:2], "big") == number
            times.append((loop.time() - begun) * 1000.0)
        await sending
        await connection.close()
        return times

    return run_virtual(main())


def test_the_round_trip_is_what_was_asked() -> None:
    assert round_trips(LinkSettings(LinkModel(40.0)), frames=1) == [pytest.approx(40.0)]


def test_jitter_delays_and_keeps_the_order() -> None:
    times = round_trips(LinkSettings(LinkModel(40.0, jitter_ms=10.0)), gap_s=0.01)
    assert times == sorted(times)
    late = [at - 40.0 - 10.0 * n for n, at in enumerate(times)]
    assert min(late) >= -1e-6
    assert 5.0 < sum(late) / len(late) < 60.0
    assert times == round_trips(LinkSettings(LinkModel(40.0, jitter_ms=10.0)), gap_s=0.01)


def test_bandwidth_costs_time_by_size() -> None:
    narrow = LinkSettings(LinkModel(0.0, up_mbps=0.08))
    assert round_trips(narrow, frames=1, size=100) == [pytest.approx(10.0)]


def test_stalls_hold_everything_up() -> None:
    settings = LinkSettings(LinkModel(0.0), stall_every_ms=5000.0, stall_ms=2000.0)
    assert settings.after_stall_ms(2999.0) == 2999.0
    assert settings.after_stall_ms(3000.0) == 5000.0
    assert settings.after_stall_ms(9500.0) == 10_000.0
    times = round_trips(settings, frames=60, gap_s=0.1)
    assert not [at for at in times if 3000.0 < at % 5000.0 < 4999.0]


def test_a_cut_ends_both_directions() -> None:
    async def main() -> None:
        connection = await emulate_link(echo, LinkSettings(LinkModel(10.0), cut_every_ms=500.0))()

        async def talk() -> None:
            while True:
                await connection.send(b"x")
                await connection.receive()

        with pytest.raises(LinkLost, match="broke"):
            await talk()
        assert asyncio.get_running_loop().time() == pytest.approx(0.51, abs=0.02)
        with pytest.raises(LinkLost):
            await connection.send(b"x")

    run_virtual(main())


@pytest.mark.parametrize(
    "wrong", [{"stall_ms": -1.0}, {"stall_ms": 10.0, "stall_every_ms": 5.0}, {"cut_every_ms": -1.0}]
)
def test_impossible_links_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        LinkSettings(LinkModel(), **wrong)


async def hung_up(reader: asyncio.StreamReader) -> bool:
    try:
        return await reader.read(1) == b""
    except ConnectionError:
        return True


async def test_the_proxy_passes_bytes_both_ways_and_cuts() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data[::-1])
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with (
        server,
        LinkProxy("127.0.0.1", 0, "127.0.0.1", port, LinkSettings(LinkModel(1.0))) as proxy,
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        loop = asyncio.get_running_loop()
        begun = loop.time()
        writer.write(b"abc")
        assert await reader.readexactly(3) == b"cba"
        assert loop.time() - begun >= 0.001
        assert (proxy.bytes_up, proxy.bytes_down) == (3, 3)
        proxy.cut()
        assert await hung_up(reader)
        writer.close()


async def test_a_proxy_without_a_server_hangs_up() -> None:
    async with LinkProxy("127.0.0.1", 0, "127.0.0.1", 9, LinkSettings()) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        assert await hung_up(reader)
        writer.close()
