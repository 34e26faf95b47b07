"""Work of the lowest priority that keeps a core busy: a comparison must not measure who left it idle.

Two cores of a machine are seldom strangers: virtual ones may be two threads of one, and real ones share
caches, memory and a power budget. A fleet that drafts beside a server then slows the server's steps, by a
quarter on one such machine, and whoever drafts most looks worst. With ballast on the fleet's cores a server
finds the same machine whatever its fleet does: its steps cost the same for all, and what a system spends is
what it is charged.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Collection
from types import TracebackType
from typing import Self

__all__ = ["CpuBurner"]

_TURNS = 1_000_000


class CpuBurner:
    """Use as ``with``; one process per core in ``cores``. Does nothing where the system cannot name cores."""

    def __init__(self, cores: Collection[int]) -> None:
        able = hasattr(os, "sched_setaffinity") and hasattr(os, "SCHED_IDLE")
        spawn = multiprocessing.get_context("spawn")
        self._processes = [
            spawn.Process(target=_spin, args=(core, os.getpid()), daemon=True)
            for core in (cores if able else ())
        ]

    @property
    def pids(self) -> list[int]:
        return [p.pid for p in self._processes if p.pid is not None]

    def __enter__(self) -> Self:
        for process in self._processes:
            process.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        err: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _spin(core: int, parent: int) -> None:
    os.sched_setaffinity(0, {core})
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    while os.getppid() == parent:  # a parent that was killed takes it along
        for _ in range(_TURNS):
            pass
