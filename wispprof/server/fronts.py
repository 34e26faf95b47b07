"""Fronts of a server: within its process, or as a process of their own on the same listening socket.

A front holds connections: WebSocket, HTTP, TLS, keys, checks of frames, text. Reading and writing frames then
takes no time from the engine loop. A front process that dies is started again; its edges reconnect and
resume.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Protocol

import wispprof
from wispprof.errors import RuntimeFault
from wispprof.openai_api import ChatTokenizer
from wispprof.server.channel import SocketWriter, encode_batch
from wispprof.server.engine_client import EngineClient
from wispprof.server.engine_host import EngineHost, front_config
from wispprof.server.front_process import make_web_server
from wispprof.server.verification_server import VerificationServer

log = logging.getLogger("wispprof.server")

_COMMAND = "from wispprof.server.front_process import main; main()"
_START_S, _STOP_S, _PAUSE_S = 60.0, 8.0, 1.0


class Front(Protocol):
    """Accepts connections from :meth:`start` to :meth:`stop`."""

    async def start(self) -> None:
        """Returns once connections are accepted. Raises :class:`RuntimeFault` if they cannot be."""

    async def stop(self) -> None: ...

    def force(self) -> None:
        """Let :meth:`stop` wait for no connection."""


def make_front(server: VerificationServer, listener: socket.socket, own_process: bool) -> Front:
    return FrontProcess(server, listener) if own_process else LocalFront(server, listener)


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

    def force(self) -> None:
        self._web_server.force_exit = True


class FrontProcess:
    """A front in a process of its own."""

    def __init__(self, server: VerificationServer, listener: socket.socket) -> None:
        self._server = server
        self._listener = listener
        self._tokenizer = _saved(server.tokenizer)
        self._host: EngineHost | None = None
        self._writer: SocketWriter | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = False
        self._restart: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int:
        return self._process.pid if self._process is not None else 0

    async def start(self) -> None:
        ours, theirs = socket.socketpair()
        descriptors = self._listener.fileno(), theirs.fileno()
        package = str(Path(wispprof.__file__).parent.parent)
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _COMMAND, *map(str, descriptors)],
            pass_fds=descriptors,
            stdin=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        )
        theirs.close()
        ours.setblocking(False)
        host = self._host = EngineHost(self._server)
        writer = self._writer = SocketWriter(host.receive, self._lost)
        await asyncio.get_running_loop().create_connection(lambda: writer, sock=ours)
        writer.write(encode_batch([front_config(self._server, self._tokenizer)]))
        host.connect(writer)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_START_S):
                await host.answered.wait()
        if not host.accepts:
            raise RuntimeFault("The front process ended while starting.", "See its messages above.")

    async def stop(self) -> None:
        self._stopping = True
        if self._restart is not None:
            self._restart.cancel()
        if self._process is None or self._host is None or self._writer is None:
            return
        self._host.stop()
        try:
            await asyncio.to_thread(self._process.wait, _STOP_S)
        except subprocess.TimeoutExpired:
            self.force()
            await asyncio.to_thread(self._process.wait)
        self._writer.close()

    def force(self) -> None:
        if self._process is not None:
            self._process.kill()

    def _lost(self) -> None:
        if self._host is not None:
            self._host.lost()
        if not self._stopping and self._restart is None:
            log.error("the front process ended; starting another")
            self._restart = asyncio.create_task(self._start_again(), name="restart front")

    async def _start_again(self) -> None:
        try:
            while True:
                if self._process is not None:
                    await asyncio.to_thread(self._process.wait)
                try:
                    await self.start()
                    return
                except RuntimeFault as err:
                    log.critical("%s Trying again.", err)
                    await asyncio.sleep(_PAUSE_S)
        finally:
            self._restart = None


def _saved(tokenizer: ChatTokenizer | None) -> str:
    """A folder from which another process can load the tokenizer, for as long as this process lives."""
    if tokenizer is None:
        return ""
    folder = tempfile.TemporaryDirectory(prefix="wispprof-tokenizer-")
    _folders.append(folder)
    tokenizer.tokenizer.save_pretrained(folder.name)
    return folder.name


_folders: list[tempfile.TemporaryDirectory[str]] = []
