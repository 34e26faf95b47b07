"""Emulated links: delay, jitter, bandwidth, loss, stalls and cuts, in process or as a TCP proxy.

Both forms take a :class:`LinkSettings` and compute arrival times with the simulator's link model, so an
emulated fleet and a simulated one see the same network. Times are those of the running event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any

from wispprof.edge.connection import Connection, ConnectionFactory, LinkLost
from wispprof.settings.shared_settings import LinkSettings
from wispprof.simulation.devices import Link

_READ_BYTES = 1 << 16


class _EmulatedLink:
    """Arrival times in both directions of one connection, in order of sending."""

    def __init__(self, settings: LinkSettings, seed: int) -> None:
        self._settings = settings
        self._link = Link(settings.link, Random(seed))
        self._start_s = asyncio.get_running_loop().time()

    def server_arrival_s(self, size: int) -> float:
        """Loop time at which ``size`` bytes that leave the edge now reach the server."""
        return self._arrival_s(self._link.up, size)

    def edge_arrival_s(self, size: int) -> float:
        """Loop time at which ``size`` bytes that leave the server now reach the edge."""
        return self._arrival_s(self._link.down, size)

    def _arrival_s(self, direction: Callable[[float, int], float], size: int) -> float:
        now_ms = (asyncio.get_running_loop().time() - self._start_s) * 1000.0
        return self._start_s + self._settings.after_stall_ms(direction(now_ms, size)) / 1000.0

    async def wait_for_cut(self) -> None:
        """Return when the link breaks; never, if the settings have no cuts."""
        if not self._settings.cut_every_ms:
            await asyncio.Event().wait()
        await asyncio.sleep(self._settings.cut_every_ms / 1000.0)


async def _sleep_until(at_s: float) -> None:
    now_s = asyncio.get_running_loop().time()
    if at_s > now_s:
        await asyncio.sleep(at_s - now_s)


# --- in process --------------------------------------------------------------------------------------


def emulate_link(connect: ConnectionFactory, settings: LinkSettings) -> ConnectionFactory:
    """A factory whose connections run over an emulated link. Connecting costs one round trip.

    >>> from wispprof.edge import EdgeClient, websocket_connections
    >>> from wispprof.settings.shared_settings import LinkModel
    >>> slow = LinkSettings(LinkModel(rtt_ms=20.0), cut_every_ms=60_000.0)
    >>> client = EdgeClient(emulate_link(websocket_connections("127.0.0.1:8200"), slow))
    """
    connections = 0

    async def connect_over_link() -> Connection:
        nonlocal connections
        connections += 1
        await asyncio.sleep(settings.link.rtt_ms / 1000.0)
        link = _EmulatedLink(settings, settings.seed + connections)
        return _EmulatedConnection(await connect(), link)

    return connect_over_link


class _EmulatedConnection:
    def __init__(self, inner: Connection, link: _EmulatedLink) -> None:
        self._inner = inner
        self._link = link
        self._up: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        self._down: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        self._lost: asyncio.Future[LinkLost] = asyncio.get_running_loop().create_future()
        self._tasks = [
            asyncio.create_task(self._report_loss(work()), name="emulated link")
            for work in (self._pump_up, self._pump_down, self._break)
        ]

    async def send(self, data: bytes) -> None:
        if self._lost.done():
            raise self._lost.result()
        self._up.put_nowait((self._link.server_arrival_s(len(data)), data))

    async def receive(self) -> bytes:
        frame = asyncio.ensure_future(self._down.get())
        first: set[asyncio.Future[Any]] = {self._lost, frame}
        try:
            await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            if not frame.done():
                raise self._lost.result()
            at_s, data = frame.result()
            wait_s = at_s - asyncio.get_running_loop().time()
            if wait_s > 0 and (await asyncio.wait({self._lost}, timeout=wait_s))[0]:
                raise self._lost.result()
            return data
        finally:
            frame.cancel()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._lose(LinkLost("The connection was closed."))
        await self._inner.close()

    def _lose(self, err: LinkLost) -> None:
        if not self._lost.done():
            self._lost.set_result(err)

    async def _report_loss(self, work: Awaitable[None]) -> None:
        try:
            await work
        except LinkLost as err:
            self._lose(err)

    async def _pump_up(self) -> None:
        while True:
            at_s, data = await self._up.get()
            await _sleep_until(at_s)
            await self._inner.send(data)

    async def _pump_down(self) -> None:
        while True:
            data = await self._inner.receive()
            self._down.put_nowait((self._link.edge_arrival_s(len(data)), data))

    async def _break(self) -> None:
        await self._link.wait_for_cut()
        await self._inner.close()
        raise LinkLost("The emulated link broke.")


# --- as a proxy --------------------------------------------------------------------------------------


class LinkProxy:
    """A TCP proxy that delays what passes; stands between any edge and any server.

    ``async with LinkProxy("127.0.0.1", 0, "127.0.0.1", 8200, settings) as proxy`` listens on :attr:`port`.
    Each TCP read is delayed as one frame, which it is for small frames.
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
        link = _EmulatedLink(self.settings, self.settings.seed + self.connections)
        with contextlib.suppress(asyncio.CancelledError):
            await self._forward(reader, writer, link)

    async def _forward(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, link: _EmulatedLink
    ) -> None:
        try:
            server_reader, server_writer = await asyncio.open_connection(*self.target)
        except OSError:
            writer.transport.abort()
            return
        tasks = [
            asyncio.create_task(self._pump(reader, server_writer, link.server_arrival_s, up=True)),
            asyncio.create_task(self._pump(server_reader, writer, link.edge_arrival_s, up=False)),
            asyncio.create_task(link.wait_for_cut()),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            writer.transport.abort()
            server_writer.transport.abort()

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        arrival_s: Callable[[int], float],
        up: bool,
    ) -> None:
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        delivering = asyncio.create_task(_deliver(queue, writer))
        try:
            with contextlib.suppress(OSError):
                data = b"-"
                while data:
                    data = await reader.read(_READ_BYTES)
                    if up:
                        self.bytes_up += len(data)
                    else:
                        self.bytes_down += len(data)
                    queue.put_nowait((arrival_s(len(data)), data))
            await delivering
        finally:
            delivering.cancel()
            await asyncio.gather(delivering, return_exceptions=True)


async def _deliver(queue: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
    """Write each entry at its time, until the empty one that ends the stream."""
    while True:
        at_s, data = await queue.get()
        await _sleep_until(at_s)
        if not data:
            return
        writer.write(data)
        await writer.drain()
