"""An event loop whose timers keep their microseconds, for fleets that stand in for real devices.

asyncio's usual selector, epoll, waits in whole milliseconds and rounds up: a replayed device of 2.5 ms a
draft would draft at 3 and more, every round of four would come 2 to 4 ms late, and the server would be
measured under a slower fleet than the one that was asked for. ``select`` takes microseconds, but no file
number beyond 1,023; larger fleets make do with whole milliseconds.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

__all__ = ["run_high_res"]

T = TypeVar("T")

_MOST = 900
"""Maximum connections; leaves file numbers below 1,024 for the process's other files."""


def run_high_res(main: Coroutine[Any, Any, T], connections: int) -> T:
    """``asyncio.run`` on a loop with timers in microseconds, where so many connections allow it."""

    def loop() -> asyncio.AbstractEventLoop:
        few = connections <= _MOST
        return asyncio.SelectorEventLoop(selectors.SelectSelector() if few else None)

    with asyncio.Runner(loop_factory=loop) as runner:
        return runner.run(main)
