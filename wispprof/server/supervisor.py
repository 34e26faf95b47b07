"""The process behind ``wispprof serve``: it holds the listening socket and keeps the others alive.

The engine process and the fronts are processes of their own. If the engine process dies, the fronts keep
their connections and wait; another engine process takes its place, and edges reopen their sessions with the
tokens they have.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import msgspec

from wispprof.engines.engine_process import child_environment
from wispprof.errors import EngineError, WispprofError
from wispprof.server.fronts import FrontProcess, TokenizerStays, channel_socket
from wispprof.server.plain_settings import plain_settings, read_settings
from wispprof.server.web_server import bind, handling_signals, raise_descriptor_limit, server_tls
from wispprof.settings.server_settings import ServerSettings

log = logging.getLogger("wispprof.server")

_MAX_FAILURES, _PAUSE_S, _STEADY_S = 3, 0.5, 60.0
"""An engine process that dies so often in a row, each time within ``_STEADY_S`` of serving, is given up."""

_CHECK_S = 1.0
_LENGTH_BYTES = 4


class _Failure(msgspec.Struct, frozen=True):
    """Why an engine process ends; an empty message: it is ready. ``kind``: name of the exception's class."""

    message: str = ""
    hint: str = ""
    kind: str = ""


class Supervised(NamedTuple):
    """What an engine process gets from its supervisor. ``channel``: where fronts join. ``life``: ends with
    the supervisor. ``port``: that the fronts listen on."""

    channel: socket.socket
    life: socket.socket
    port: int
    settings: ServerSettings

    @classmethod
    def take(cls) -> Self:
        """From the last arguments of the command line."""
        channel, life = (socket.socket(fileno=int(descriptor)) for descriptor in sys.argv[-3:-1])
        with life.makefile("rb") as given:
            length = int.from_bytes(given.read(_LENGTH_BYTES), "big")
            settings = read_settings(msgspec.msgpack.decode(given.read(length)))
        return cls(channel, life, int(sys.argv[-1]), settings)

    def ready(self, on_end: Callable[[], None]) -> None:
        """Connections are accepted now. ``on_end``: called when the supervisor is gone."""
        loop = asyncio.get_running_loop()

        def ended() -> None:
            loop.remove_reader(self.life.fileno())
            on_end()

        self._tell(_Failure())
        loop.add_reader(self.life.fileno(), ended)

    def failed(self, err: WispprofError) -> None:
        """Let the supervisor say why this process ends."""
        self._tell(_Failure(err.args[0], err.hint, type(err).__name__))

    def _tell(self, what: _Failure) -> None:
        with contextlib.suppress(OSError):
            self.life.sendall(msgspec.json.encode(what) + b"\n")


def can_supervise(settings: ServerSettings) -> bool:
    """Whether the connections are held by front processes, which outlive an engine process."""
    return settings.fronts > 0 and hasattr(socket, "AF_UNIX")


def supervise(settings: ServerSettings, command: Sequence[str]) -> None:
    """Serve until SIGTERM or Ctrl-C has ended the engine process. Blocks.

    ``command`` starts an engine process, which calls :meth:`Supervised.take`. Raises :class:`EngineError` if
    it cannot start, or dies again and again, and :class:`TokenizerStays` if it cannot serve that way.
    """
    raise_descriptor_limit()
    server_tls(settings.tls_cert, settings.tls_key)  # A model loads for minutes: refuse before.
    listener = bind(settings.host, settings.port)
    folder, channel = channel_socket()
    try:
        asyncio.run(_Supervisor(settings, command, listener, channel).run())
    finally:
        listener.close()
        channel.close()
        folder.cleanup()


class _Supervisor:
    def __init__(
        self,
        settings: ServerSettings,
        command: Sequence[str],
        listener: socket.socket,
        channel: socket.socket,
    ) -> None:
        self._settings = msgspec.msgpack.encode(plain_settings(settings))
        self._command = command
        self._port = int(listener.getsockname()[1])
        self._channel = channel
        self._fronts = [FrontProcess(listener, channel.getsockname()) for _ in range(settings.fronts)]
        self._engine: asyncio.subprocess.Process | None = None
        self._ready_s: float | None = None
        self._failure = _Failure()
        self._signals = 0

    async def run(self) -> None:
        ended = False
        with handling_signals(self._on_signal):
            for front in self._fronts:
                await front.start()
            try:
                await self._keep_engine()
                ended = self._signals < 2
            finally:
                await asyncio.gather(*(front.stop(told=ended) for front in self._fronts))

    def _on_signal(self) -> None:
        self._signals += 1
        if self._engine is not None and self._engine.returncode is None:
            self._engine.send_signal(signal.SIGTERM)

    async def _keep_engine(self) -> None:
        served, failures = False, 0
        while not self._signals:
            code = await self._run_engine()
            if code == 0 or self._signals:
                return
            ready_s, why = self._ready_s, self._failure
            served |= ready_s is not None
            if not served:
                message = why.message or f"The engine process ended with status {code} while starting."
                if why.kind == TokenizerStays.__name__:
                    raise TokenizerStays
                raise EngineError(message, why.hint)
            steady = ready_s is not None and time.monotonic() - ready_s >= _STEADY_S
            failures = 1 if steady else failures + 1
            if failures == _MAX_FAILURES:
                message = (
                    f"The engine process ended {failures} times in a row, the last time with status {code}."
                )
                raise EngineError(message, why.message or "See its messages above.")
            log.error("the engine process ended with status %d; starting another. %s", code, why.message)
            await asyncio.sleep(_PAUSE_S * failures)

    async def _run_engine(self) -> int:
        """One engine process, to its end; returns its status."""
        self._ready_s, self._failure = None, _Failure()
        life, theirs = socket.socketpair()
        descriptors = self._channel.fileno(), theirs.fileno()
        # A group of its own: the terminal's Ctrl-C comes from here, once.
        engine = self._engine = await asyncio.create_subprocess_exec(
            *(*self._command, *map(str, descriptors), str(self._port)),
            pass_fds=descriptors,
            stdin=asyncio.subprocess.DEVNULL,
            env=child_environment(),
            process_group=0,
        )
        theirs.close()
        reader, writer = await asyncio.open_connection(sock=life)
        writer.write(len(self._settings).to_bytes(_LENGTH_BYTES, "big") + self._settings)
        hearing = asyncio.create_task(self._hear(reader), name="engine process speaks")
        ending = asyncio.create_task(engine.wait(), name="engine process")
        try:
            while not ending.done():
                await asyncio.wait([ending], timeout=_CHECK_S)
                for front in self._fronts:
                    front.check()
            await asyncio.wait([hearing], timeout=_CHECK_S)
            return ending.result()
        finally:
            hearing.cancel()
            writer.close()
            if not ending.done():
                engine.kill()
                await ending

    async def _hear(self, reader: asyncio.StreamReader) -> None:
        """Take in what the engine process says until it ends."""
        while line := await reader.readline():
            self._failure = msgspec.json.decode(line, type=_Failure)
            if not self._failure.message:
                self._ready_s = time.monotonic()
