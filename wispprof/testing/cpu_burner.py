"""Keeps CPU cores busy at the lowest priority, so that a benchmark's load generator cannot change them.

Cores share caches, memory bandwidth and a power budget; virtual cores may even be two threads of one core.
A fleet that drafts beside a server therefore slows the server's steps. If its cores are busy all the time,
every system under test finds the same machine, however much its fleet drafts.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Collection
from typing import Self


class CpuBurner:
    """One busy process per core of ``cores``; use as ``with``. Does nothing if cores cannot be pinned
    (macOS).

    >>> with CpuBurner(()) as burner:
    ...     burner.pids
    []
    """

    def __init__(self, cores: Collection[int]) -> None:
        can_pin = hasattr(os, "sched_setaffinity") and hasattr(os, "SCHED_IDLE")
        spawn = multiprocessing.get_context("spawn")
        self._processes = [
            spawn.Process(target=_burn, args=(core, os.getpid()), daemon=True)
            for core in (cores if can_pin else ())
        ]

    @property
    def pids(self) -> list[int]:
        return [p.pid for p in self._processes if p.pid is not None]

    def __enter__(self) -> Self:
        for process in self._processes:
            process.start()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _burn(core: int, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    os.sched_setaffinity(0, {core})
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    while os.getppid() == parent:  # ends with its parent, even if that was killed
        for _ in range(1_000_000):
            pass
