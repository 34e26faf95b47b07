"""Emulated links: delay, jitter, bandwidth, loss, stalls and cuts, in process or as a TCP proxy.

Both forms take their figures from one :class:`LinkSettings` and their arrival times from the link model
that the simulator uses, so an emulated fleet and a simulated one see the same network. Times are those
of the running event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from random import Random

from wispprof.edge.connection import Connection, ConnectionFactory, LinkLost
from wispprof.settings.shared_settings import LinkSettings
from wispprof.simulation.devices import Link

__all__ = ["LinkProxy", "emulate"]

_CHUNK = 1 << 16


class _Line:
    """Both directions of one emulated connection: what was put in comes out late, and in order."""

    def __init__(self, settings: LinkSettings, seed: int) -> None:
        self._settings = settings
        self._link = Link(settings.link, Random(seed))
        self._born = asyncio.get_running_loop().time()

    def up_at(self, size: int) -> float:
        """Loop time at which ``size`` bytes that leave the edge now reach the server."""
        return self._at(self._link.up, size)

    def down_at(self, size: int) -> float:
        return self._at(self._link.down, size)

    def _at(self, direction: Callable[[float, int], float], size: int) -> float:
        now_ms = (asyncio.get_running_loop().time() - self._born) * 1000.0
        return self._born + self._settings.after_stall_ms(direction(now_ms, size)) / 1000.0

    async def broken(self) -> None:
        """Returns when the link breaks; never, where it does not."""
        if not self._settings.cut_every_ms:
            await asyncio.Event().wait()
        await asyncio.sleep(self._settings.cut_every_ms / 1000.0)


# --- in process --------------------------------------------------------------------------------------


def emulate(connect: ConnectionFactory, settings: LinkSettings) -> ConnectionFactory:
    """A dial whose connections run over an emulated link. Connecting costs one round trip."""
    made = 0

    async def slow_dial() -> Connection:
        nonlocal made
        made += 1
        await asyncio.sleep(settings.link.rtt_ms / 1000.0)
        return _Emulated(await connect(), _Line(settings, settings.seed + made))

    return slow_dial


class _Emulated:
    def __init__(self, inner: Connection, line: _Line) -> None:
        self._inner = inner
        self._line = line
        self._up: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        self._down: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        self._fault: LinkLost | None = None
        self._lost = asyncio.Event()
        self._pumps = [
            asyncio.create_task(self._guard(work()), name="emulated link")
            for work in (self._pump_up, self._pump_down, self._break)
        ]

    async def send(self, data: bytes) -> None:
        if self._fault is not None:
            raise self._fault
        self._up.put_nowait((self._line.up_at(len(data)), data))

    async def receive(self) -> bytes:
        loop = asyncio.get_running_loop()
        lost = asyncio.ensure_future(self._lost.wait())
        got = asyncio.ensure_future(self._down.get())
        try:
            await asyncio.wait({lost, got}, return_when=asyncio.FIRST_COMPLETED)
            if not got.done():
                assert self._fault is not None
                raise self._fault
            at, data = got.result()
            if at > loop.time():
                await asyncio.wait({lost}, timeout=at - loop.time())
                if lost.done() and self._fault is not None:
                    raise self._fault
            return data
        finally:
            lost.cancel()
            got.cancel()

    async def close(self) -> None:
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)
        self._lose(LinkLost("The connection was closed."))
        await self._inner.close()

    def _lose(self, err: LinkLost) -> None:
        if self._fault is None:
            self._fault = err
        self._lost.set()

    async def _guard(self, work: Awaitable[None]) -> None:
        try:
            await work
        except LinkLost as err:
            self._lose(err)

    async def _pump_up(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            at, data = await self._up.get()
            if at > loop.time():
                await asyncio.sleep(at - loop.time())
            await self._inner.send(data)

    async def _pump_down(self) -> None:
        while True:
            data = await self._inner.receive()
            self._down.put_nowait((self._line.down_at(len(data)), data))

    async def _break(self) -> None:
        await self._line.broken()
        await self._inner.close()
        raise LinkLost("The emulated link broke.")


# --- as a proxy --------------------------------------------------------------------------------------


class LinkProxy:
    """A TCP proxy that delays what passes: put it between any edge and any server.

    ``async with LinkProxy("127.0.0.1", 0, "127.0.0.1", 8200, settings) as proxy`` listens on
    :attr:`port`. TCP segments stand in for frames, which is what they are for small frames.
    """

    def __init__(
        self, host: str, port: int, target_host: str, target_port: int, settings: LinkSettings
    ) -> None:
        self.host = host
        self.port = port
        self.target = (target_host, target_port)
        self.settings = settings
        self.connections = 0
        self.bytes_up = 0
        self.bytes_down = 0
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> LinkProxy:
        self._server = await asyncio.start_server(self._accept, self.host, self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    def cut(self) -> None:
        """Break every connection now; new ones are still accepted."""
        for task in self._tasks:
            task.cancel()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.connections += 1
        with contextlib.suppress(asyncio.CancelledError):
            await self._carry(
                reader, writer, _Line(self.settings, self.settings.seed + self.connections)
            )

    async def _carry(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, line: _Line
    ) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(*self.target)
        except OSError:
            writer.transport.abort()
            return
        ends = [
            asyncio.create_task(self._pump(reader, far_writer, line.up_at, up=True)),
            asyncio.create_task(self._pump(far_reader, writer, line.down_at, up=False)),
            asyncio.create_task(line.broken()),
        ]
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for end in ends:
                end.cancel()
            await asyncio.gather(*ends, return_exceptions=True)
            for side in (writer, far_writer):
                side.transport.abort()

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        arrival: Callable[[int], float],
        up: bool,
    ) -> None:
        loop = asyncio.get_running_loop()
        moving: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def deliver() -> None:
            while True:
                at, data = await moving.get()
                if at > loop.time():
                    await asyncio.sleep(at - loop.time())
                if not data:
                    return
                writer.write(data)
                await writer.drain()

        delivering = asyncio.create_task(deliver())
        try:
            with contextlib.suppress(OSError):
                while True:
                    data = await reader.read(_CHUNK)
                    if up:
                        self.bytes_up += len(data)
                    else:
                        self.bytes_down += len(data)
                    moving.put_nowait((arrival(len(data)), data))
                    if not data:
                        break
            await delivering
        finally:
            delivering.cancel()
            await asyncio.gather(delivering, return_exceptions=True)
