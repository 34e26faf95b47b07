"""A front process. It gets the descriptors of the listening socket and of the channel as arguments."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from pathlib import Path

from wispprof.openai_api import ChatTokenizer
from wispprof.server.app import make_app
from wispprof.server.channel import FrontConfig, SocketWriter, to_front
from wispprof.server.engine_client import EngineClient
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
    """Serve connections until the engine process says so, or is gone."""
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, signal.SIG_IGN)  # They reach the whole group; the engine process drains.
    raise_descriptor_limit()
    listener, channel = (socket.socket(fileno=int(descriptor)) for descriptor in sys.argv[1:])
    asyncio.run(_serve(listener, channel))


async def _serve(listener: socket.socket, channel: socket.socket) -> None:
    batches: asyncio.Queue[bytes] = asyncio.Queue()
    ended = asyncio.Event()
    writer = SocketWriter(batches.put_nowait, ended.set)
    channel.setblocking(False)
    await asyncio.get_running_loop().create_connection(lambda: writer, sock=channel)
    [config] = to_front.decode(await batches.get())
    assert isinstance(config, FrontConfig)
    client = EngineClient(config, writer, _tokenizer(config.tokenizer))
    configure_logging(client.settings.log_level, quiet=client.settings.live)
    client.on_stop = ended.set
    web_server = make_web_server(client, listener)
    task = asyncio.create_task(web_server.serve(), name="web server")
    while not web_server.started and not task.done():
        await asyncio.sleep(0.002)
    client.ready()
    while not batches.empty():
        client.receive(batches.get_nowait())
    writer.on_batch = client.receive
    waiting = asyncio.create_task(ended.wait(), name="end of the engine process")
    await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
    web_server.force_exit = writer.lost
    web_server.request_exit()
    await task
    waiting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await waiting


def _tokenizer(folder: str) -> ChatTokenizer | None:
    if not folder:
        return None
    from wispprof.engines.tokenizers import read_tokenizer

    return ChatTokenizer(read_tokenizer(Path(folder)))
