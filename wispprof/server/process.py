"""Run a verification server: as a process until a signal, as tensor-parallel ranks, or within a test.

``wispprof serve --tensor-parallel N`` runs N copies of its command line under torchrun, unless torchrun
started it already. Rank 0 serves, the others follow it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wispprof.backends import Engine
from wispprof.errors import EngineError
from wispprof.openai_api import ChatTokenizer
from wispprof.server.dashboard import run_dashboard
from wispprof.server.fronts import Front, FrontProcesses, JoiningFronts, LocalFront, TokenizerStays
from wispprof.server.garbage_collector import calm_garbage_collector
from wispprof.server.startup import build_server, engine_options, served_model
from wispprof.server.supervisor import Supervised
from wispprof.server.verification_server import VerificationServer
from wispprof.server.web_server import bind, handling_signals, raise_descriptor_limit, server_tls
from wispprof.settings.server_settings import ServerSettings
from wispprof.types import ServedModel

log = logging.getLogger("wispprof.server")

_FAILED_S = 1.0
_SWITCH_S = 0.0001
"""Longest time that Python work of the event loop keeps the engine's thread from the interpreter lock."""


# --- within a test --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server in this process and its address; ``front`` holds its connections."""

    host: str
    port: int
    server: VerificationServer
    front: Front

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
    front_process: bool = False,
    **parts: Any,
) -> AsyncIterator[RunningServer]:
    """A real server on a free port, its engine loop in this process and event loop. ``front_process``: its
    connections in a process of their own, as :func:`serve` has them.

    With ``engine`` and ``model`` no model is loaded; ``parts`` go to :class:`VerificationServer`. On exit
    everything is released, and an exception of the engine loop is raised.
    """
    settings = replace(settings or ServerSettings(), port=0)
    server = build_server(settings, engine, model, **parts)
    listener = bind(settings.host, 0)
    port = listener.getsockname()[1]
    try:
        front = FrontProcesses(server, listener, 1) if front_process else LocalFront(server, listener)
    except TokenizerStays:
        listener.close()
        raise
    async with _started(server, front, listener):
        yield RunningServer(settings.host, port, server, front)


@contextlib.asynccontextmanager
async def _started(
    server: VerificationServer, front: Front, listener: socket.socket | None
) -> AsyncIterator[None]:
    """The server and its front, started; both are ended on exit."""
    await server.start()
    switch_s = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_S)
    try:
        await front.start()
        yield
    finally:
        sys.setswitchinterval(switch_s)
        await front.stop()
        await server.stop()
        if listener is not None:
            listener.close()


# --- as a process ---------------------------------------------------------------------------------


def serve(
    settings: ServerSettings,
    announce: Callable[[VerificationServer, int], None],
    *,
    supervised: Supervised | None = None,
    **parts: Any,
) -> None:
    """Serve until SIGTERM or Ctrl-C, then drain; a second signal ends at once. Blocks.

    ``announce`` is called with the server and its port once requests are admitted. ``supervised``: this is
    the engine process of a supervisor, which holds the socket and the fronts. ``parts``: see
    :func:`~wispprof.server.startup.build_server`.
    """
    raise_descriptor_limit()
    server_tls(settings.tls_cert, settings.tls_key)  # A model loads for minutes: refuse before.
    listener = bind(settings.host, settings.port) if supervised is None else None
    try:
        asyncio.run(_serve(settings, listener, supervised, announce, parts))
    finally:
        if listener is not None:
            listener.close()


def _make_front(
    server: VerificationServer, listener: socket.socket | None, supervised: Supervised | None
) -> Front:
    count = server.settings.fronts if hasattr(socket, "AF_UNIX") else 0
    if supervised is not None:
        return JoiningFronts(server, supervised.channel, count)
    assert listener is not None
    if count:
        try:
            return FrontProcesses(server, listener, count)
        except TokenizerStays as err:
            log.warning("%s", err)
    return LocalFront(server, listener)


async def _serve(
    settings: ServerSettings,
    listener: socket.socket | None,
    supervised: Supervised | None,
    announce: Callable[[VerificationServer, int], None],
    parts: dict[str, Any],
) -> None:
    server = build_server(settings, **parts)
    front = _make_front(server, listener, supervised)
    ended = asyncio.Event()
    draining: asyncio.Task[None] | None = None

    def on_signal() -> None:
        nonlocal draining
        if draining is not None:
            front.force()
            draining.cancel()
            ended.set()
            return
        log.info("draining: %d sessions", len(server.manager))
        draining = asyncio.create_task(drain(), name="drain")

    async def drain() -> None:
        await server.drain(settings.drain_timeout_ms)
        ended.set()

    async def failure() -> None:
        await server.wait_loop_ended()
        # Long enough for a probe to see it, and for the edges' problem frames to leave.
        await asyncio.sleep(_FAILED_S)
        ended.set()

    with handling_signals(on_signal):
        async with _started(server, front, listener):
            watches = [failure(), *([run_dashboard(server)] if settings.live else [])]
            if supervised is not None:
                supervised.ready(ended.set)
            port = settings.port if supervised is None else supervised.port
            if listener is not None:
                port = listener.getsockname()[1]
            await _until_ended(server, port, announce, ended, *watches)


async def _until_ended(
    server: VerificationServer,
    port: int,
    announce: Callable[[VerificationServer, int], None],
    ended: asyncio.Event,
    *watches: Coroutine[Any, Any, None],
) -> None:
    with calm_garbage_collector():
        announce(server, port)
        tasks = [asyncio.create_task(watch, name="watch") for watch in watches]
        try:
            await ended.wait()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


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
