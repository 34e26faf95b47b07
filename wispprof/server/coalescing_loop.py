"""The server's event loop, which lets frames gather while the engine computes.

A draft frame is worth nothing before the step under way has ended: only then is the next one decided on. Read
one by one, each costs a wake-up: a call into the kernel, the interpreter's lock taken from the engine's
thread, cold caches for both; and an engine on a CPU computes on that same core. Read together they cost a
fraction of that, so while a step runs this loop looks at its sockets only every few milliseconds, and at
once when the step ends.

The web server's end of a WebSocket, reading as fast as small frames come.

uvicorn stops reading from a connection after every message until the application has taken it. That costs two
calls into the kernel per frame, more than all the rest of a draft frame does. Here reading stops only where
messages are left lying: the bound on memory is the same, the price is paid by slow readers alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import selectors
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextvars import Context
from typing import Any, TypeVar, TypeVarTuple

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

__all__ = [
    "MAX_UNREAD_MESSAGES",
    "CoalescingLoop",
    "CoalescingSelector",
    "EagerWebSocket",
    "coalescing",
    "run_coalescing",
    "socket_wait_ms",
]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class CoalescingSelector(selectors.DefaultSelector):
    """A selector that lets events wait up to :attr:`max_wait_s` (0: none), or until :meth:`wake_selector`.

    :attr:`waited_s`: how long what the last look found has probably lain, the mean of evenly spread arrivals;
    it stands until the loop has dealt with all of it and looks again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.max_wait_s = 0.0
        self.waited_s = 0.0
        self._wake_event = threading.Event()

    def gather(self, max_wait_s: float) -> None:
        """Let events wait so long from now on. Hurries of the past are over: whatever they called for stands
        in the loop's queue already, and a loop with work at hand does not wait."""
        self._wake_event.clear()
        self.max_wait_s = max_wait_s

    def wake_selector(self) -> None:
        """End the wait under way, or the next one. From any thread."""
        self._wake_event.set()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        idle = timeout is None or timeout > 0.0
        if not idle:
            return super().select(timeout)  # the loop is still at work on what it found
        self.waited_s = 0.0
        if self.max_wait_s <= 0.0:
            return super().select(timeout)
        begun = time.monotonic()
        self._wake_event.wait(self.max_wait_s if timeout is None else min(self.max_wait_s, timeout))
        self._wake_event.clear()
        self.waited_s = (time.monotonic() - begun) / 2.0
        return super().select(0)


class CoalescingLoop(asyncio.SelectorEventLoop):
    """asyncio's own loop over a :class:`CoalescingSelector`; other threads' calls do not wait."""

    def __init__(self) -> None:
        self.selector = CoalescingSelector()
        super().__init__(self.selector)

    def call_soon_threadsafe(
        self,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> asyncio.Handle:
        # First the loop's own wake-up: the look that follows a wait must find it.
        handle = super().call_soon_threadsafe(callback, *args, context=context)
        self.selector.wake_selector()
        return handle


@contextlib.contextmanager
def coalescing(max_wait_ms: float) -> Iterator[None]:
    """Within, what comes to the running loop may lie unread for ``max_wait_ms``. Nothing on another loop
    than :class:`CoalescingLoop`."""
    loop = asyncio.get_running_loop()
    if not isinstance(loop, CoalescingLoop):
        yield
        return
    loop.selector.gather(max_wait_ms / 1000.0)
    try:
        yield
    finally:
        loop.selector.gather(0.0)


def socket_wait_ms() -> float:
    """How long a frame that is being read has probably lain, for whoever measures the link by it."""
    loop = asyncio.get_running_loop()
    return loop.selector.waited_s * 1000.0 if isinstance(loop, CoalescingLoop) else 0.0


def run_coalescing(main: Coroutine[Any, Any, T]) -> T:
    """``asyncio.run`` on a :class:`CoalescingLoop`."""
    with asyncio.Runner(loop_factory=CoalescingLoop) as runner:
        return runner.run(main)


MAX_UNREAD_MESSAGES = 16
"""Messages that may wait for the application before reading from their connection stops."""


class EagerWebSocket(WebSocketsSansIOProtocol):
    """Give it to :class:`uvicorn.Config` as ``ws``."""

    def send_receive_event_to_app(self) -> None:
        # The base class pauses unless it believes it has, and resumes once the queue is empty;
        # asyncio lets reading resume that was never paused.
        self.read_paused = True
        super().send_receive_event_to_app()
        if self.queue.qsize() >= MAX_UNREAD_MESSAGES and not self.close_sent:
            self.transport.pause_reading()
