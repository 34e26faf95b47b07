"""The process behind ``wispprof serve``: it holds the listening socket and keeps the others alive.

The engine process is this command line once more, the fronts are processes of their own. If the engine
process dies, the fronts keep their connections and wait; another engine process takes its place, and edges
reopen their sessions with the tokens they have.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Self

from wispprof.errors import EngineError
from wispprof.server.fronts import FrontProcess, channel_socket
from wispprof.server.web_server import bind, handling_signals, raise_descriptor_limit, server_tls
from wispprof.settings.server_settings import ServerSettings

log = logging.getLogger("wispprof.server")

_VARIABLE = "WISPPROF_ENGINE_PROCESS"
_MAX_FAILURES, _PAUSE_S, _STEADY_S = 3, 0.5, 60.0
"""An engine process that dies so often in a row, each time within ``_STEADY_S`` of serving, is given up."""

_READY = b"r"
_CHECK_S = 1.0


class Supervised(NamedTuple):
    """What an engine process gets from its supervisor. ``channel``: where fronts join. ``life``: ends with
    the supervisor. ``port``: that the fronts listen on."""

    channel: socket.socket
    life: socket.socket
    port: int

    @classmethod
    def take(cls) -> Self | None:
        """``None`` if this process has no supervisor. Processes started from here do not inherit it."""
        given = os.environ.pop(_VARIABLE, "")
        if not given:
            return None
        channel, life, port = map(int, given.split(":"))
        return cls(socket.socket(fileno=channel), socket.socket(fileno=life), port)

    def ready(self, on_end: Callable[[], None]) -> int:
        """Connections are accepted now; returns the port. ``on_end``: called when the supervisor is gone."""
        loop = asyncio.get_running_loop()

        def ended() -> None:
            loop.remove_reader(self.life.fileno())
            on_end()

        self.life.send(_READY)
        loop.add_reader(self.life.fileno(), ended)
        return self.port


def is_engine_process() -> bool:
    """Whether this process has a supervisor."""
    return _VARIABLE in os.environ


def can_supervise(settings: ServerSettings) -> bool:
    """Whether the connections are held by front processes, which outlive an engine process."""
    return settings.fronts > 0 and hasattr(socket, "AF_UNIX")


def supervise(settings: ServerSettings) -> int:
    """Serve until SIGTERM or Ctrl-C has ended the engine process. Returns the exit status of one that never
    served. Raises :class:`EngineError` if it dies again and again."""
    raise_descriptor_limit()
    server_tls(settings.tls_cert, settings.tls_key)
    listener = bind(settings.host, settings.port)
    folder, channel = channel_socket()
    try:
        return asyncio.run(_Supervisor(listener, channel, settings.fronts).run())
    finally:
        listener.close()
        channel.close()
        folder.cleanup()


class _Supervisor:
    def __init__(self, listener: socket.socket, channel: socket.socket, fronts: int) -> None:
        self._port = int(listener.getsockname()[1])
        self._channel = channel
        self._fronts = [FrontProcess(listener, channel.getsockname()) for _ in range(fronts)]
        self._engine: asyncio.subprocess.Process | None = None
        self._ready_s: float | None = None
        self._signals = 0

    async def run(self) -> int:
        told = False
        with handling_signals(self._on_signal):
            for front in self._fronts:
                await front.start()
            try:
                code = await self._keep_engine()
                told = code == 0 and self._signals < 2
                return code
            finally:
                await asyncio.gather(*(front.stop(told) for front in self._fronts))

    def _on_signal(self) -> None:
        self._signals += 1
        if self._engine is not None and self._engine.returncode is None:
            self._engine.send_signal(signal.SIGTERM)

    async def _keep_engine(self) -> int:
        served, failures = False, 0
        while True:
            code = await self._run_engine()
            ready_s = self._ready_s
            served |= ready_s is not None
            if code == 0 or self._signals:
                return code
            if not served:
                if code > 0:
                    return code  # It has said why.
                raise EngineError(f"The engine process was ended by signal {-code} while starting.")
            steady = ready_s is not None and time.monotonic() - ready_s >= _STEADY_S
            failures = 1 if steady else failures + 1
            if failures == _MAX_FAILURES:
                raise EngineError(
                    f"The engine process ended {failures} times in a row, the last time with status {code}.",
                    "See its messages above.",
                )
            log.error("the engine process ended with status %d; starting another", code)
            await asyncio.sleep(_PAUSE_S * failures)
            if self._signals:
                return 0

    async def _run_engine(self) -> int:
        """One engine process, to its end; returns its status."""
        self._ready_s = None
        life, theirs = socket.socketpair()
        life.setblocking(False)
        descriptors = self._channel.fileno(), theirs.fileno()
        # A group of its own: the terminal's Ctrl-C comes from here, once.
        engine = self._engine = await asyncio.create_subprocess_exec(
            *(sys.executable, str(Path(sys.argv[0]).absolute()), *sys.argv[1:]),
            pass_fds=descriptors,
            stdin=asyncio.subprocess.DEVNULL,
            env=os.environ | {_VARIABLE: ":".join(map(str, (*descriptors, self._port)))},
            process_group=0,
        )
        theirs.close()
        ready = asyncio.create_task(self._note_ready(life), name="ready")
        ending = asyncio.create_task(engine.wait(), name="engine process")
        try:
            while not ending.done():
                await asyncio.wait([ending], timeout=_CHECK_S)
                for front in self._fronts:
                    front.check()
            return ending.result()
        finally:
            ready.cancel()
            life.close()
            if not ending.done():
                engine.kill()
                await ending

    async def _note_ready(self, life: socket.socket) -> None:
        if await asyncio.get_running_loop().sock_recv(life, 1) == _READY:
            self._ready_s = time.monotonic()
