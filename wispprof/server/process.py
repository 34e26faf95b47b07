"""Running a verification server: as a process that is told to stop, or inside a test or bench."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import uvicorn

from wispprof import protocol
from wispprof.errors import RuntimeFault, WispprofError
from wispprof.server.app import make_app
from wispprof.server.coalescing_loop import EagerWebSocket, run_coalescing
from wispprof.server.dashboard import run_dashboard
from wispprof.server.startup import build_server
from wispprof.server.verification_server import VerificationServer
from wispprof.settings.server_settings import ServerSettings
from wispprof.types import Engine, ServedModel

__all__ = ["RunningServer", "bind", "freeze_garbage_collector", "running_server", "serve"]

log = logging.getLogger("wispprof.server")

# A frame just over the limit should meet a clear problem, not a cut connection.
_MAX_MESSAGE_BYTES = protocol.MAX_FRAME_BYTES + (64 << 10)


@dataclass(frozen=True, slots=True)
class RunningServer:
    """Where an in-process server listens, and the server itself."""

    host: str
    port: int
    server: VerificationServer

    @property
    def split_url(self) -> str:
        """Where edges connect."""
        return f"ws://{self.host}:{self.port}/v1/split"

    @property
    def http_url(self) -> str:
        return f"http://{self.host}:{self.port}"


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises :class:`WispprofError` with one clear line where there is none."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except socket.gaierror as err:
        raise WispprofError(f"There is no host {host!r}.", "Check --host.") from err
    except OSError as err:
        if err.errno == errno.EADDRINUSE:
            raise WispprofError(
                f"Port {port} on {host} is in use.",
                "Stop what listens there, or give another --port.",
            ) from err
        raise WispprofError(f"Cannot listen on {host}:{port}: {err.strerror}.") from err


class _Uvicorn(uvicorn.Server):
    """Signals go to ``on_signal`` (ours), not to uvicorn's own handler."""

    def __init__(self, config: uvicorn.Config, on_signal: Callable[[], None] | None = None) -> None:
        super().__init__(config)
        self._on_signal = on_signal
        self._exit = asyncio.Event()

    async def main_loop(self) -> None:
        # uvicorn looks at should_exit ten times a second; an in-process server has no time for that.
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._exit.wait(), 0.1)

    def request_exit(self) -> None:
        """Close connections and end."""
        self.should_exit = True
        self._exit.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if self._on_signal is None:
            yield
            return
        loop = asyncio.get_running_loop()
        signals = (signal.SIGINT, signal.SIGTERM)
        for one in signals:
            loop.add_signal_handler(one, self._on_signal)
        try:
            yield
        finally:
            for one in signals:
                loop.remove_signal_handler(one)


def _config(server: VerificationServer, settings: ServerSettings) -> uvicorn.Config:
    tls: dict[str, Any] = {}
    if settings.tls_cert is not None:
        tls = {"ssl_certfile": str(settings.tls_cert), "ssl_keyfile": str(settings.tls_key)}
    return uvicorn.Config(
        make_app(server),
        log_config=None,
        access_log=False,
        lifespan="off",
        ws=EagerWebSocket,
        ws_max_size=_MAX_MESSAGE_BYTES,
        ws_per_message_deflate=False,
        timeout_graceful_shutdown=5,
        server_header=False,
        **tls,
    )


@contextlib.asynccontextmanager
async def running_server(
    settings: ServerSettings | None = None,
    *,
    engine: Engine | None = None,
    model: ServedModel | None = None,
    **parts: Any,
) -> AsyncIterator[RunningServer]:
    """A real server on a free loopback port, in this process and event loop (under
    :func:`~wispprof.server.coalescing_loop.run_coalescing` it reads frames as ``wispprof serve`` does).

    With ``engine`` and ``model`` no model is loaded; ``parts`` go to :class:`VerificationServer`.
    On leaving, everything it held is released, and what its loop died of is raised.
    """
    settings = replace(settings or ServerSettings(), port=0)
    server = build_server(settings, engine, model, **parts)
    listener = bind(settings.host, 0)
    port = listener.getsockname()[1]
    front = _Uvicorn(_config(server, settings))
    await server.start()
    task = asyncio.create_task(front.serve(sockets=[listener]), name="uvicorn")
    try:
        while not front.started:
            if task.done():
                task.result()
                raise RuntimeFault("The web server ended while starting.")
            await asyncio.sleep(0.002)
        yield RunningServer(settings.host, port, server)
    finally:
        front.request_exit()
        await task
        await server.stop()
        listener.close()


def freeze_garbage_collector() -> None:
    """Leave what is loaded out of garbage collection, for a process that is about to serve.

    Models and libraries are half a million objects that stay to the end; each full collection would go
    through them all, and nothing else runs meanwhile.
    """
    gc.collect()
    gc.freeze()


def serve(
    settings: ServerSettings,
    announce: Callable[[VerificationServer, int], None],
    **parts: Any,
) -> None:
    """Serve until SIGTERM or Ctrl-C, then drain; a second signal ends at once. Blocks.

    ``announce`` is called once with the server and its port when requests are taken. ``parts`` are those
    of :func:`~wispprof.server.startup.build_server`.
    """
    listener = bind(settings.host, settings.port)
    try:
        run_coalescing(_serve(settings, listener, announce, parts))
    finally:
        listener.close()


async def _serve(
    settings: ServerSettings,
    listener: socket.socket,
    announce: Callable[[VerificationServer, int], None],
    parts: dict[str, Any],
) -> None:
    server = build_server(settings, **parts)
    stopping: asyncio.Task[None] | None = None

    def on_signal() -> None:
        nonlocal stopping
        if stopping is not None:
            front.force_exit = True
            front.request_exit()
            stopping.cancel()
            return
        log.info("draining: %d sessions", len(server.manager))
        stopping = asyncio.create_task(request_exit(), name="drain")

    async def request_exit() -> None:
        await server.drain(settings.drain_timeout_ms)
        front.request_exit()

    front = _Uvicorn(_config(server, settings), on_signal)
    await server.start()
    task = asyncio.create_task(front.serve(sockets=[listener]), name="uvicorn")
    board: asyncio.Task[None] | None = None
    try:
        while not front.started and not task.done():
            await asyncio.sleep(0.01)
        if not task.done():
            freeze_garbage_collector()
            announce(server, listener.getsockname()[1])
            if settings.live:
                board = asyncio.create_task(run_dashboard(server), name="live board")
        await task
    finally:
        if board is not None:
            board.cancel()
            await asyncio.gather(board, return_exceptions=True)
        await server.stop()
