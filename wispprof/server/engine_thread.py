"""The engine's own thread. Everything that touches the engine goes through here, one at a time."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from wispprof.server.coalescing_loop import coalescing
from wispprof.types import Engine, StepInput, VerifyResult

__all__ = ["EngineWorker"]

log = logging.getLogger("wispprof.server")

T = TypeVar("T")


class EngineWorker:
    """Runs engine calls in one thread, so that the event loop never waits for a forward pass.

    Chores (open, close, rollback) are collected and done together before the next step, in order.
    ``coalesce_ms``: how long frames may lie unread during a step (:mod:`~wispprof.server.coalescing_loop`).
    """

    def __init__(self, engine: Engine, coalesce_ms: float = 0.0) -> None:
        self.engine = engine
        self._gather_ms = coalesce_ms
        self.failed_chores = 0
        self._chores: list[Callable[[Engine], None]] = []
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")

    @property
    def pending(self) -> int:
        """Chores not yet done."""
        return len(self._chores)

    def deferred_op(self, work: Callable[[Engine], None]) -> None:
        self._chores.append(work)

    async def flush_deferred(self) -> None:
        """Do all chores now."""
        if self._chores:
            chores, self._chores = self._chores, []
            await self.call(lambda engine: self._work_off(engine, chores))

    async def step(self, feeds: Sequence[StepInput]) -> tuple[list[VerifyResult], float]:
        """One engine step; returns its outcomes and its milliseconds."""
        with coalescing(self._gather_ms):
            return await self.call(lambda engine: _timed(engine, feeds))

    async def call(self, work: Callable[[Engine], T]) -> T:
        """Run ``work`` in the engine's thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, work, self.engine)

    def stop(self) -> None:
        """Let the thread end after what it is doing."""
        self._thread.shutdown(wait=True)

    def _work_off(self, engine: Engine, chores: list[Callable[[Engine], None]]) -> None:
        for work in chores:
            try:
                work(engine)
            except Exception:
                # One session's chore must not cost the others their step; the integrity check
                # and this counter show it.
                self.failed_chores += 1
                log.exception("engine chore failed")


def _timed(engine: Engine, feeds: Sequence[StepInput]) -> tuple[list[VerifyResult], float]:
    begin = time.perf_counter()
    outcomes = engine.step(feeds)
    return outcomes, (time.perf_counter() - begin) * 1000.0
