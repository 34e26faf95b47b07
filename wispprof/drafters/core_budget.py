"""How many threads llama.cpp may use now: as many as there are cores that nobody else keeps busy.

Its threads meet at a barrier after every operation and spin there. One thread too many waits for a core
that another program holds, and all others spin meanwhile: three tokens took 19 ms on two idle cores, and
830 ms beside one busy process (57 ms with one thread).
"""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil

_REFRESH_S = 1.0


def default_threads() -> int:
    """Physical cores, as llama.cpp chooses; half of the logical ones where the machine does not tell."""
    return max(1, psutil.cpu_count(logical=False) or (psutil.cpu_count() or 2) // 2)


class CoreBudget:
    """``threads`` fixed by the user, or adapted to the machine's load about once a second.

    ``busy``: core-seconds that all programs used so far, of ``cores``. :meth:`ran` is told what our own
    threads used, so that they do not count as somebody else's. ``load``: busy cores before anything
    was measured. ``limit``: most threads to use.
    """

    def __init__(
        self,
        threads: int | None = None,
        *,
        cores: int | None = None,
        limit: int | None = None,
        busy: Callable[[], float] | None = None,
        load: Callable[[], float] = lambda: psutil.getloadavg()[0],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fixed = threads
        self._cores = cores or psutil.cpu_count() or 1
        self._limit = limit or default_threads()
        self._busy = busy or _busy_core_seconds
        self._clock = clock
        self._threads = threads or self._allowed(load())
        self._own = 0.0
        self._since = clock()
        self._busy_then = 0.0 if threads else self._busy()

    @property
    def threads(self) -> int:
        """Threads for the next call."""
        now = self._clock()
        if self._fixed is None and now - self._since >= _REFRESH_S:
            span, busy = now - self._since, self._busy()
            others = max(0.0, busy - self._busy_then - self._own) / span
            self._threads = self._allowed(others)
            self._since, self._busy_then, self._own = now, busy, 0.0
        return self._threads

    def _allowed(self, others: float) -> int:
        # A core that others use for a quarter of the time is still ours.
        return max(1, min(self._limit, int(self._cores - others + 0.25)))

    def ran(self, seconds: float, threads: int) -> None:
        """Our threads computed (or spun) for so long."""
        self._own += seconds * threads


def _busy_core_seconds() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.system + getattr(times, "nice", 0.0))
