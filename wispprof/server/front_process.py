"""A front process. Its arguments: the listening socket's descriptor, and the address of the channel."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from pathlib import Path

from wispprof.openai_api import ChatTokenizer
from wispprof.server.app import make_app
from wispprof.server.channel import FrontConfig, SocketWriter, to_front
from wispprof.server.engine_client import EngineClient
from wispprof.server.garbage_collector import calm_garbage_collector
from wispprof.server.http_connection import ConnectionLimits
from wispprof.server.logs import configure_logging
from wispprof.server.web_server import WebServer, raise_descriptor_limit, server_tls


def make_web_server(client: EngineClient, listener: socket.socket) -> WebServer:
    """The web server of a front."""
    settings = client.settings
    return WebServer(
        make_app(client),
        listener,
        ConnectionLimits(
            settings.max_connections, settings.connections_per_address, settings.request_timeout_ms / 1000.0
        ),
        tls=server_tls(settings.tls_cert, settings.tls_key),
        websockets=True,
        on_drop=lambda reason: client.count("dropped_connections", reason),
    )


def main() -> None:
    """Serve connections until the engine process says so, or the process that started this one is gone."""
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, signal.SIG_IGN)  # They reach the whole group; the engine process drains.
    without_torch()
    raise_descriptor_limit()
    asyncio.run(_Front(socket.socket(fileno=int(sys.argv[1])), sys.argv[2]).serve())


def without_torch() -> None:
    """Let tokenizers load without torch: transformers imports it if it can, which takes seconds."""
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
    sys.modules["torch"] = None  # type: ignore[assignment]


class _Front:
    def __init__(self, listener: socket.socket, address: str) -> None:
        self._listener = listener
        self._address = address
        self._ended = asyncio.Event()
        self._orphaned = False

    def _parent_ended(self) -> None:
        asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
        self._orphaned = True
        self._ended.set()

    async def serve(self) -> None:
        # The parent holds the other end of this pipe and writes nothing.
        asyncio.get_running_loop().add_reader(sys.stdin.fileno(), self._parent_ended)
        joined = await self._join()
        if joined is None:
            return
        config, channel = joined
        client = EngineClient(config, channel.writer, _tokenizer(config.tokenizer))
        configure_logging(client.settings.log_level, quiet=client.settings.live)
        client.on_stop = self._ended.set
        web_server = make_web_server(client, self._listener)
        serving = asyncio.create_task(web_server.serve(), name="web server")
        while not web_server.started and not serving.done():
            await asyncio.sleep(0.002)
        with calm_garbage_collector():
            while not serving.done():
                client.ready()
                channel.forward(client)
                await _first(channel.lost, self._ended, serving)
                if self._ended.is_set():
                    break
                client.lost()
                joined = await self._join()
                if joined is None or joined[0] != config:
                    web_server.force_exit = True
                    break  # Another target, say: edges must say hello again.
                channel = joined[1]
                client.back(channel.writer)
        web_server.force_exit |= self._orphaned or channel.lost.is_set()
        web_server.request_exit()
        await serving
        if not self._ended.is_set():
            sys.exit(1)  # Start another front.

    async def _join(self) -> tuple[FrontConfig, _Channel] | None:
        """Connect to the engine process; ``None`` if this front has to end. Waits while it restarts."""
        loop = asyncio.get_running_loop()
        while not self._ended.is_set():
            channel = _Channel()
            try:
                await loop.create_unix_connection(lambda made=channel: made.writer, self._address)  # type: ignore[misc]
            except OSError:
                await asyncio.sleep(0.05)
                continue
            await _first(channel.arrived, channel.lost, self._ended)
            if channel.arrived.is_set():
                [config] = to_front.decode(channel.batches.pop(0))
                assert isinstance(config, FrontConfig)
                return config, channel
            channel.writer.close()
        return None


class _Channel:
    """A connection to the engine process; batches wait until there is a client for them."""

    def __init__(self) -> None:
        self.batches: list[bytes] = []
        self.arrived = asyncio.Event()
        self.lost = asyncio.Event()
        self.writer = SocketWriter(self._hold, self.lost.set)

    def _hold(self, data: bytes) -> None:
        self.batches.append(data)
        self.arrived.set()

    def forward(self, client: EngineClient) -> None:
        for data in self.batches:
            client.receive(data)
        self.writer.on_batch = client.receive


async def _first(*events: asyncio.Event | asyncio.Task[None]) -> None:
    """Wait for the first of them."""
    tasks = [asyncio.ensure_future(one.wait() if isinstance(one, asyncio.Event) else one) for one in events]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task, one in zip(tasks, events, strict=True):
        if task is not one:
            task.cancel()


def _tokenizer(folder: str) -> ChatTokenizer | None:
    if not folder:
        return None
    from wispprof.engines.tokenizers import read_tokenizer

    return ChatTokenizer(read_tokenizer(Path(folder)))
