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
        self._coalesce_ms = coalesce_ms
        self.failed_ops = 0
        self._deferred_ops: list[Callable[[Engine], None]] = []
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")

    @property
    def pending(self) -> int:
        """Chores not yet done."""
        return len(self._deferred_ops)

    def deferred_op(self, work: Callable[[Engine], None]) -> None:
        self._deferred_ops.append(work)

    async def flush_deferred(self) -> None:
        """Do all chores now."""
        if self._deferred_ops:
            ops, self._deferred_ops = self._deferred_ops, []
            await self.call(lambda engine: self._work_off(engine, ops))

    async def step(self, inputs: Sequence[StepInput]) -> tuple[list[VerifyResult], float]:
        """One engine step; returns its outcomes and its milliseconds."""
        with coalescing(self._coalesce_ms):
            return await self.call(lambda engine: _timed(engine, inputs))

    async def call(self, work: Callable[[Engine], T]) -> T:
        """Run ``work`` in the engine's thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, work, self.engine)

    def stop(self) -> None:
        """Let the thread end after what it is doing."""
        self._thread.shutdown(wait=True)

    def _work_off(self, engine: Engine, ops: list[Callable[[Engine], None]]) -> None:
        for work in ops:
            try:
                work(engine)
            except Exception:
                # One session's chore must not cost the others their step; the integrity check
                # and this counter show it.
                self.failed_ops += 1
                log.exception("engine chore failed")


def _timed(engine: Engine, inputs: Sequence[StepInput]) -> tuple[list[VerifyResult], float]:
    begin = time.perf_counter()
    results = engine.step(inputs)
    return results, (time.perf_counter() - begin) * 1000.0
