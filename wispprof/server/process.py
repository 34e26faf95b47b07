"""Run a verification server: as a process until a signal, as tensor-parallel ranks, or within a test.

``wispprof serve --tensor-parallel N`` runs N copies of its command line under torchrun, unless torchrun
started it already. Rank 0 serves, the others follow it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import uvicorn

from wispprof import protocol
from wispprof.backends import Engine
from wispprof.errors import EngineError, RuntimeFault, WispprofError
from wispprof.openai_api import ChatTokenizer
from wispprof.server.app import make_app
from wispprof.server.coalescing_loop import EagerWebSocket, run_coalescing
from wispprof.server.dashboard import run_dashboard
from wispprof.server.startup import build_server, engine_options, served_model
from wispprof.server.verification_server import VerificationServer
from wispprof.settings.server_settings import ServerSettings
from wispprof.types import ServedModel

log = logging.getLogger("wispprof.server")

# A frame just over the protocol's limit gets a problem frame, not a cut connection.
_MAX_MESSAGE_BYTES = protocol.MAX_FRAME_BYTES + (64 << 10)


# --- logging --------------------------------------------------------------------------------------


class JsonLines(logging.Formatter):
    """``{"at": …, "level": …, "from": …, "message": …}``, and ``trace`` for an exception."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "from": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def configure_logging(level: str, quiet: bool = False) -> None:
    """Log JSON lines to stderr. ``quiet``: warnings only, for a dashboard that owns the screen."""
    levels = {"debug", "info", "warning", "error"}
    if level not in levels:
        raise ValueError(f"log level must be one of {', '.join(sorted(levels))}, got {level!r}")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logger = logging.getLogger("wispprof")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.WARNING if quiet else level.upper())


# --- the web server -------------------------------------------------------------------------------


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises :class:`WispprofError` if host and port cannot be bound."""
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
    """Passes SIGINT and SIGTERM to ``on_signal`` instead of handling them."""

    def __init__(
        self,
        server: VerificationServer,
        settings: ServerSettings,
        on_signal: Callable[[], None] | None = None,
    ) -> None:
        tls: dict[str, Any] = {}
        if settings.tls_cert is not None:
            tls = {"ssl_certfile": str(settings.tls_cert), "ssl_keyfile": str(settings.tls_key)}
        super().__init__(
            uvicorn.Config(
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
        )
        self._on_signal = on_signal
        self._exit = asyncio.Event()

    async def main_loop(self) -> None:
        # uvicorn polls should_exit ten times a second; an in-process server must end at once.
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


# --- within a test --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RunningServer:
    """An in-process server and its address."""

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


@contextlib.asynccontextmanager
async def running_server(
    settings: ServerSettings | None = None,
    *,
    engine: Engine | None = None,
    model: ServedModel | None = None,
    **parts: Any,
) -> AsyncIterator[RunningServer]:
    """A real server on a free port of this process and event loop. It coalesces frames only under
    :func:`~wispprof.server.coalescing_loop.run_coalescing`.

    With ``engine`` and ``model`` no model is loaded; ``parts`` go to :class:`VerificationServer`. On exit
    everything is released, and an exception of the engine loop is raised.
    """
    settings = replace(settings or ServerSettings(), port=0)
    server = build_server(settings, engine, model, **parts)
    listener = bind(settings.host, 0)
    port = listener.getsockname()[1]
    web_server = _Uvicorn(server, settings)
    await server.start()
    task = asyncio.create_task(web_server.serve(sockets=[listener]), name="uvicorn")
    try:
        while not web_server.started:
            if task.done():
                task.result()
                raise RuntimeFault("The web server ended while starting.")
            await asyncio.sleep(0.002)
        yield RunningServer(settings.host, port, server)
    finally:
        web_server.request_exit()
        await task
        await server.stop()
        listener.close()


# --- as a process ---------------------------------------------------------------------------------


def freeze_garbage_collector() -> None:
    """Exclude what is loaded from garbage collection: models and libraries are half a million objects
    that stay to the end, and a full collection that visits them stops the server."""
    gc.collect()
    gc.freeze()


def serve(
    settings: ServerSettings,
    announce: Callable[[VerificationServer, int], None],
    **parts: Any,
) -> None:
    """Serve until SIGTERM or Ctrl-C, then drain; a second signal ends at once. Blocks.

    ``announce`` is called with the server and its port once requests are admitted. ``parts``: see
    :func:`~wispprof.server.startup.build_server`.
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
    draining: asyncio.Task[None] | None = None

    def on_signal() -> None:
        nonlocal draining
        if draining is not None:
            web_server.force_exit = True
            web_server.request_exit()
            draining.cancel()
            return
        log.info("draining: %d sessions", len(server.manager))
        draining = asyncio.create_task(drain(), name="drain")

    async def drain() -> None:
        await server.drain(settings.drain_timeout_ms)
        web_server.request_exit()

    web_server = _Uvicorn(server, settings, on_signal)
    await server.start()
    task = asyncio.create_task(web_server.serve(sockets=[listener]), name="uvicorn")
    dashboard: asyncio.Task[None] | None = None
    try:
        while not web_server.started and not task.done():
            await asyncio.sleep(0.01)
        if not task.done():
            freeze_garbage_collector()
            announce(server, listener.getsockname()[1])
            if settings.live:
                dashboard = asyncio.create_task(run_dashboard(server), name="dashboard")
        await task
    finally:
        if dashboard is not None:
            dashboard.cancel()
            await asyncio.gather(dashboard, return_exceptions=True)
        await server.stop()


# --- as tensor-parallel ranks ---------------------------------------------------------------------


def launch_ranks(size: int) -> None:
    """Run ``size`` copies of this command line under torchrun until they end. Raises
    :class:`EngineError` if one failed; torchrun has stopped the others by then."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    # Without it torchrun sets one compute thread per rank, and says so.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // size)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.ERROR)
    # A script in a checkout, the console script of an installation: Python files both.
    program = str(Path(sys.argv[0]).absolute())
    try:
        torchrun(["--standalone", "--nproc-per-node", str(size), program, *sys.argv[1:]])
    except SignalException:
        return  # The ranks got the signal too, and have drained.
    except ChildFailedError as err:
        rank, failure = err.get_first_failure()
        raise EngineError(
            f"Rank {rank} of {size} ended with code {failure.exitcode}; the others were stopped.",
            "Its own message stands above.",
        ) from None


def serve_ranks(settings: ServerSettings, announce: Callable[[VerificationServer, int], None]) -> None:
    """Join the ranks, load this rank's shard, and serve (rank 0) or follow. Blocks. Raises
    :class:`EngineError` if the group broke while serving."""
    from wispprof.engines.tensor_parallel import join
    from wispprof.engines.torch import load_torch_engine
    from wispprof.engines.torch.multi_rank_engine import MultiRankEngine, follow

    ranks = join(settings.tensor_parallel, settings.device)
    try:
        engine, info, tokenizer = load_torch_engine(engine_options(settings), ranks)
        if ranks.rank:
            # Every rank gets the signals; rank 0 drains and ends the group.
            for one in (signal.SIGINT, signal.SIGTERM):
                signal.signal(one, signal.SIG_IGN)
            follow(engine, ranks)
            return
        leader = MultiRankEngine(engine, ranks, on_broken=lambda: os.kill(os.getpid(), signal.SIGTERM))
        try:
            chat = ChatTokenizer(tokenizer) if tokenizer is not None else None
            model = served_model(settings, info)
            serve(settings, announce, engine=leader, model=model, tokenizer=chat)
        finally:
            leader.shutdown()
        if leader.broken:
            raise EngineError(f"The server ended: {leader.broken}.", "See the ranks' logs.")
    finally:
        ranks.leave()
