"""An event loop whose time is virtual: it never waits, it jumps to the next timer.

Code that takes its time from the running loop (``loop.time``, ``asyncio.sleep``) runs unchanged, and an
hour of it takes seconds and gives the same result every time. Only for what lives in one process
without threads or sockets: those answer in real time.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

__all__ = ["VirtualTimeLoop", "run_virtual"]

T = TypeVar("T")


class _Jumping(selectors.DefaultSelector):
    """A selector that, instead of waiting, moves its loop's clock by what it was to wait."""

    loop: VirtualTimeLoop

    def select(self, timeout: float | None = None) -> list[Any]:
        ready = super().select(0)
        if ready:
            return ready
        if timeout is None:
            raise RuntimeError("virtual time stands still: everything waits for something outside")
        self.loop.now += timeout
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Virtual seconds since it was made, in :attr:`now`."""

    def __init__(self) -> None:
        self.now = 0.0
        selector = _Jumping()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self.now


def run_virtual(main: Coroutine[Any, Any, T]) -> T:
    """``asyncio.run`` in virtual time."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)
