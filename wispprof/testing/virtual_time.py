"""An event loop in virtual time: it never waits, it advances its clock to the next timer.

Code that reads the running loop's clock (``loop.time``, ``asyncio.sleep``) runs unchanged. An hour of it
takes seconds and gives the same result every time. Threads and sockets keep real time and are not supported.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _AdvancingSelector(selectors.DefaultSelector):
    """A selector that advances its loop's clock by the timeout instead of waiting."""

    loop: VirtualTimeLoop

    def select(self, timeout: float | None = None) -> list[Any]:
        ready = super().select(0)
        if ready:
            return ready
        if timeout is None:
            raise RuntimeError(
                "virtual time cannot advance: no timer is set and every task waits for an outside event"
            )
        self.loop.now += timeout
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock, :attr:`now`, counts virtual seconds from 0."""

    def __init__(self) -> None:
        self.now = 0.0
        selector = _AdvancingSelector()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self.now


def run_virtual(main: Coroutine[Any, Any, T]) -> T:
    """``asyncio.run`` in virtual time.

    >>> run_virtual(asyncio.sleep(3600.0, "an hour later"))
    'an hour later'
    """
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)
