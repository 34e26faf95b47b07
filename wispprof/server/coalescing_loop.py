"""An event loop and a WebSocket protocol that read many small frames cheaply.

A draft frame is of no use before the step under way has ended. Reading frames one by one costs a wake-up
each, on the core that a CPU engine computes on. So during a step :class:`CoalescingLoop` reads its sockets
only every few milliseconds, and at once when the step ends.

uvicorn pauses a connection after every message until the application has taken it, two system calls per
frame. :class:`EagerWebSocket` pauses only if messages pile up.
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

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

MAX_UNREAD_MESSAGES = 16
"""Messages that may wait for the application before their connection is paused."""

MAX_UNREAD_BYTES = 1 << 16
"""A message of more bytes pauses its connection at once."""


class CoalescingSelector(selectors.DefaultSelector):
    """A selector that leaves events waiting for up to ``max_wait_s`` (0: none) or until woken.

    ``waited_s``: how long the events found last have probably waited, the mean of evenly spread
    arrivals. It holds until the next idle :meth:`select`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.max_wait_s = 0.0
        self.waited_s = 0.0
        self._wake_event = threading.Event()

    def coalesce(self, max_wait_s: float) -> None:
        """Leave events waiting from now on. Earlier wake-ups are void: what they announced is in the
        loop's queue, and a loop with work does not wait."""
        self._wake_event.clear()
        self.max_wait_s = max_wait_s

    def wake_selector(self) -> None:
        """End the wait under way, or the next one. From any thread."""
        self._wake_event.set()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        idle = timeout is None or timeout > 0.0
        if not idle:
            return super().select(timeout)  # The loop still works on what it found.
        self.waited_s = 0.0
        if self.max_wait_s <= 0.0:
            return super().select(timeout)
        begin = time.monotonic()
        self._wake_event.wait(self.max_wait_s if timeout is None else min(self.max_wait_s, timeout))
        self._wake_event.clear()
        self.waited_s = (time.monotonic() - begin) / 2.0
        return super().select(0)


class CoalescingLoop(asyncio.SelectorEventLoop):
    """asyncio's loop over a :class:`CoalescingSelector`; calls from other threads do not wait."""

    def __init__(self) -> None:
        self.selector = CoalescingSelector()
        super().__init__(self.selector)

    def call_soon_threadsafe(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        # The loop's own wake-up must come first, for the select that follows the wait to find it.
        handle = super().call_soon_threadsafe(callback, *args, context=context)
        self.selector.wake_selector()
        return handle


@contextlib.contextmanager
def coalescing(max_wait_ms: float) -> Iterator[None]:
    """Within, frames may wait unread for ``max_wait_ms``. No effect on other event loops."""
    loop = asyncio.get_running_loop()
    if not isinstance(loop, CoalescingLoop):
        yield
        return
    loop.selector.coalesce(max_wait_ms / 1000.0)
    try:
        yield
    finally:
        loop.selector.coalesce(0.0)


def socket_wait_ms() -> float:
    """How long the frame being read has probably waited unread."""
    loop = asyncio.get_running_loop()
    return loop.selector.waited_s * 1000.0 if isinstance(loop, CoalescingLoop) else 0.0


def run_coalescing(main: Coroutine[Any, Any, T]) -> T:
    """``asyncio.run`` on a :class:`CoalescingLoop`."""
    with asyncio.Runner(loop_factory=CoalescingLoop) as runner:
        return runner.run(main)


class EagerWebSocket(WebSocketsSansIOProtocol):
    """Give it to :class:`uvicorn.Config` as ``ws``."""

    on_lost: Callable[[], None] = staticmethod(lambda: None)
    """Called when the connection is closed."""

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.on_lost()

    def send_receive_event_to_app(self) -> None:
        # The base class pauses unless ``read_paused``, and resumes once the queue is empty; asyncio
        # accepts resuming what was never paused.
        self.read_paused = True
        large = sum(map(len, self.frames)) > MAX_UNREAD_BYTES
        super().send_receive_event_to_app()
        if (large or self.queue.qsize() >= MAX_UNREAD_MESSAGES) and not self.close_sent:
            self.transport.pause_reading()
