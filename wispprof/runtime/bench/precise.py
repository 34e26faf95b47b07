"""An event loop whose timers keep their microseconds, for fleets that stand in for real devices.

asyncio's usual selector, epoll, waits in whole milliseconds and rounds up: a replayed device of 2.5 ms a
draft would draft at 3 and more, every round of four would come 2 to 4 ms late, and the server would be
measured under a slower fleet than the one that was asked for. ``select`` takes microseconds, for up to about
a thousand connections.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

__all__ = ["precise_loop", "run_precise"]

T = TypeVar("T")


def precise_loop() -> asyncio.AbstractEventLoop:
    """A new loop with timers in microseconds; for :class:`asyncio.Runner`."""
    return asyncio.SelectorEventLoop(selectors.SelectSelector())


def run_precise(main: Coroutine[Any, Any, T]) -> T:
    """``asyncio.run`` on a precise loop."""
    with asyncio.Runner(loop_factory=precise_loop) as runner:
        return runner.run(main)
