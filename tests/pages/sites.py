"""An edge and its server in a thread of their own, so that a test may wait for a browser."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from scripted_text import END, ScriptedDevice, ScriptedEngine, ScriptedTokenizer

from wispprof.edge import EdgeClient, websocket_connections
from wispprof.edge.edge_runtime import EdgeRuntime
from wispprof.edge.local_api import make_edge_app
from wispprof.openai_api import ChatTokenizer
from wispprof.server.process import RunningServer, running_server
from wispprof.server.web_server import WebServer, bind
from wispprof.settings.edge_settings import ClientSettings, EdgeSettings
from wispprof.settings.server_settings import ServerSettings
from wispprof.settings.shared_settings import LinkModel, LinkSettings
from wispprof.testing.link_emulator import LinkProxy

T = TypeVar("T")
KEY = "a-secret-key"


@dataclass(frozen=True)
class Site:
    """What is served at ``url``; ``call`` runs a function in the site's event loop."""

    url: str
    server: RunningServer
    proxy: LinkProxy
    loop: asyncio.AbstractEventLoop

    def call(self, work: Callable[[], T]) -> T:
        done: Future[T] = Future()
        self.loop.call_soon_threadsafe(lambda: done.set_result(work()))
        return done.result(10)

    def lose_server(self) -> None:
        """Cut the link; no new one is made until :meth:`find_server`."""

        def lose() -> None:
            self.proxy.target = ("127.0.0.1", 1)
            self.proxy.cut()

        self.call(lose)

    def find_server(self) -> None:
        def find() -> None:
            self.proxy.target = ("127.0.0.1", self.server.port)

        self.call(find)


@contextmanager
def threaded(
    make: Callable[[], AbstractAsyncContextManager[T]],
) -> Iterator[tuple[T, asyncio.AbstractEventLoop]]:
    """What ``make()`` yields, entered in the event loop of a thread; and that loop."""
    started: Future[tuple[T, asyncio.AbstractEventLoop]] = Future()
    ended = threading.Event()

    async def main() -> None:
        async with make() as made:
            started.set_result((made, asyncio.get_running_loop()))
            await asyncio.to_thread(ended.wait)

    def run() -> None:
        try:
            asyncio.run(main())
        except BaseException as err:
            if started.done():
                raise
            started.set_exception(err)

    thread = threading.Thread(target=run, name="site")
    thread.start()
    try:
        yield started.result(30)
    finally:
        ended.set()
        thread.join(30)


@contextmanager
def site(
    step_ms: float = 4.0, keys: tuple[str, ...] = (), give_up_ms: float = 30_000.0, drafter: str = "model"
) -> Iterator[Site]:
    """A server of :class:`ScriptedEngine` and, behind a link, an edge whose local API is at ``url``."""
    with threaded(lambda: _running(step_ms, keys, give_up_ms, drafter)) as (made, loop):
        yield replace(made, loop=loop)


@asynccontextmanager
async def _running(
    step_ms: float, keys: tuple[str, ...], give_up_ms: float, drafter: str
) -> AsyncIterator[Site]:
    tokenizer = ScriptedTokenizer()
    engine = ScriptedEngine(step_ms)
    model = replace(engine.served, id="scripted-target", stop_tokens=(END,))
    settings = ServerSettings(admit="all", api_keys=keys)
    async with AsyncExitStack() as stack:
        parts: dict[str, Any] = {"engine": engine, "model": model, "tokenizer": ChatTokenizer(tokenizer)}
        server = await stack.enter_async_context(running_server(settings, **parts))
        link = LinkProxy("127.0.0.1", 0, "127.0.0.1", server.port, LinkSettings(LinkModel(4.0)))
        proxy = await stack.enter_async_context(link)
        device = ScriptedDevice(drafter, "fixed", {"k": 4}, loaded=object())
        stack.callback(device.close)
        client_settings = ClientSettings(backoff_ms=20.0, backoff_max_ms=100.0, give_up_ms=give_up_ms)
        if keys:
            client_settings = replace(client_settings, access=replace(client_settings.access, key=keys[0]))
        connect = websocket_connections(f"127.0.0.1:{proxy.port}")
        client = await stack.enter_async_context(EdgeClient(connect, client_settings))
        edge_settings = EdgeSettings(
            drafter=drafter, server=f"127.0.0.1:{proxy.port}", client=client_settings
        )
        runtime = EdgeRuntime(edge_settings, tokenizer, device, client)
        listener = bind("127.0.0.1", 0)
        web_server = WebServer(make_edge_app(runtime), listener)
        serving = asyncio.create_task(web_server.serve())
        stack.push_async_callback(_end, web_server, serving)
        yield Site(_url(listener), server, proxy, asyncio.get_running_loop())


def _url(listener: socket.socket) -> str:
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


async def _end(web_server: WebServer, serving: Awaitable[None]) -> None:
    web_server.request_exit()
    await serving
