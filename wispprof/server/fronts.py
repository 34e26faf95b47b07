"""Fronts of a server: within its process, or as processes of their own on the same listening socket.

A front holds connections: WebSocket, HTTP, TLS, keys, checks of frames, text. Reading and writing frames then
takes no time from the engine loop. Front processes join the engine process over a Unix socket. One that ends
is started again; its edges reconnect and resume.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Protocol

from wispprof.engines.engine_process import child_environment
from wispprof.errors import RuntimeFault, WispprofError
from wispprof.openai_api import ChatTokenizer
from wispprof.server.channel import SocketWriter, encode_batch
from wispprof.server.engine_client import EngineClient
from wispprof.server.engine_host import EngineHost, front_config
from wispprof.server.front_process import make_web_server
from wispprof.server.verification_server import VerificationServer

log = logging.getLogger("wispprof.server")

_COMMAND = "from wispprof.server.front_process import main; main()"
_START_S, _STOP_S = 60.0, 8.0
_MAX_FAILURES, _PAUSE_S, _STEADY_S = 3, 0.5, 60.0
"""A front process that fails so often in a row, each time within ``_STEADY_S``, is not started again."""


class TokenizerStays(WispprofError):
    """The tokenizer cannot be saved, so no other process can load it."""

    def __init__(self) -> None:
        super().__init__("The tokenizer cannot be saved for front processes: serving with --fronts 0.")


class Front(Protocol):
    """Accepts connections from :meth:`start` to :meth:`stop`."""

    async def start(self) -> None:
        """Returns once connections are accepted. Raises :class:`RuntimeFault` if they cannot be."""

    async def stop(self) -> None: ...

    def force(self) -> None:
        """Let :meth:`stop` wait for no connection."""


class LocalFront:
    """A front within the engine process."""

    def __init__(self, server: VerificationServer, listener: socket.socket) -> None:
        self.client = EngineClient.within(server)
        self._web_server = make_web_server(self.client, listener)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(self._web_server.serve(), name="web server")
        while not self._web_server.started and not self._task.done():
            await asyncio.sleep(0.002)
        if self._task.done():
            self._task.result()
            raise RuntimeFault("The web server ended while starting.")

    async def stop(self) -> None:
        self._web_server.request_exit()
        if self._task is not None:
            await self._task
        self.client.end()

    def force(self) -> None:
        self._web_server.force_exit = True


class JoiningFronts:
    """Front processes that join the engine process, and join the next one if this one is lost.

    ``channel``: the Unix socket that they connect to. ``count``: how many must have joined to start.
    """

    def __init__(self, server: VerificationServer, channel: socket.socket, count: int) -> None:
        self._server = server
        self._channel = channel
        self._count = count
        self._tokenizer = _saved(server.tokenizer, Path(channel.getsockname()).with_name("tokenizer"))
        self._joining: asyncio.Server | None = None

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._joining = await loop.create_unix_server(self._join, sock=self._channel)
        try:
            async with asyncio.timeout(_START_S):
                while sum(host.accepts for host in self._server.hosts) < self._count:
                    self._check()
                    await asyncio.sleep(0.005)
        except TimeoutError:
            raise RuntimeFault(f"No connection is accepted after {_START_S:g} s.") from None

    def _check(self) -> None:
        """Raise :class:`RuntimeFault` if there is no use in waiting."""

    def _join(self) -> SocketWriter:
        host = EngineHost(self._server)
        config = encode_batch([front_config(self._server, self._tokenizer)])

        def joined() -> None:
            writer.write(config)
            host.connect(writer)

        writer = SocketWriter(host.receive, host.lost, joined)
        return writer

    async def stop(self) -> None:
        """The front processes close their connections and end by themselves."""
        for host in self._server.hosts:
            host.stop()
        await asyncio.sleep(0)
        if self._joining is not None:
            self._joining.close()
        self._channel.close()

    def force(self) -> None: ...


class FrontProcesses(JoiningFronts):
    """Front processes that this engine process starts and ends."""

    def __init__(self, server: VerificationServer, listener: socket.socket, count: int) -> None:
        self._folder, channel = channel_socket()
        try:
            super().__init__(server, channel, count)
        except TokenizerStays:
            channel.close()
            self._folder.cleanup()
            raise
        address = channel.getsockname()
        self.processes = [FrontProcess(listener, address) for _ in range(count)]

    async def start(self) -> None:
        for process in self.processes:
            await process.start()
        await super().start()

    def _check(self) -> None:
        for process in self.processes:
            process.check()

    async def stop(self) -> None:
        await super().stop()
        await asyncio.gather(*(process.stop() for process in self.processes))
        self._folder.cleanup()

    def force(self) -> None:
        for process in self.processes:
            process.force()


class FrontProcess:
    """A front process, kept alive. It ends with the process that started it."""

    def __init__(self, listener: socket.socket, address: str) -> None:
        self._listener = listener
        self._address = address
        self._process: asyncio.subprocess.Process | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._stopping = False

    @property
    def pid(self) -> int:
        return self._process.pid if self._process is not None else 0

    async def start(self) -> None:
        self._process = await self._spawn()
        self._keeping = asyncio.create_task(self._keep(self._process), name="front process")

    async def _spawn(self) -> asyncio.subprocess.Process:
        descriptor = self._listener.fileno()
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _COMMAND, str(descriptor), self._address),
            pass_fds=(descriptor,),
            stdin=asyncio.subprocess.PIPE,  # At its end the front knows that this process is gone.
            env=child_environment(),
        )

    async def _keep(self, process: asyncio.subprocess.Process) -> None:
        failures = 0
        while True:
            begun_s = time.monotonic()
            code = await process.wait()
            if self._stopping or code == 0:
                return
            failures = failures + 1 if code > 0 and time.monotonic() - begun_s < _STEADY_S else 0
            if failures == _MAX_FAILURES:
                raise RuntimeFault(
                    f"The front process ended {failures} times in a row, the last time with code {code}.",
                    "See its messages above.",
                )
            log.error("the front process ended with code %d; starting another", code)
            await asyncio.sleep(_PAUSE_S * failures)
            self._process = process = await self._spawn()

    def check(self) -> None:
        """Raise :class:`RuntimeFault` if it is not started again any more."""
        if self._keeping is not None and self._keeping.done():
            self._keeping.result()

    async def stop(self, told: bool = True) -> None:
        """Let it end. ``told``: the engine process has told it to; otherwise it drops its connections."""
        self._stopping = True
        process, keeping = self._process, self._keeping
        if process is None or keeping is None:
            return
        if not told:
            self.force()
        if process.returncode is None:
            try:
                await asyncio.wait_for(process.wait(), _STOP_S)
            except TimeoutError:
                self.force()
                await process.wait()
        keeping.cancel()
        with contextlib.suppress(asyncio.CancelledError, RuntimeFault):
            await keeping

    def force(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()


def channel_socket() -> tuple[tempfile.TemporaryDirectory[str], socket.socket]:
    """A listening Unix socket for front processes, and its folder, which only this user may enter. The
    tokenizer is saved there, too."""
    folder = tempfile.TemporaryDirectory(prefix="wispprof-")
    channel = socket.socket(socket.AF_UNIX)
    channel.bind(str(Path(folder.name, "channel")))
    channel.listen(64)
    return folder, channel


def _saved(tokenizer: ChatTokenizer | None, folder: Path) -> str:
    """Save the tokenizer for other processes; returns its folder, empty without a tokenizer. Raises
    :class:`TokenizerStays`."""
    if tokenizer is None:
        return ""
    if not hasattr(tokenizer.tokenizer, "save_pretrained"):
        raise TokenizerStays
    tokenizer.tokenizer.save_pretrained(folder)
    return str(folder)
