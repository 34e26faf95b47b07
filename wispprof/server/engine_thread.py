"""The engine's own thread: all engine calls run in it, one at a time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from wispprof.backends import Engine
from wispprof.types import StepInput, VerifyResult

log = logging.getLogger("wispprof.server")

T = TypeVar("T")


class EngineThread:
    """Runs engine calls, so that the event loop never waits for a forward pass.

    Deferred operations (open, close, rollback) run together, in order, before the next step.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.failed_ops = 0
        self._deferred_ops: list[tuple[Callable[[Engine], None], Callable[[], None] | None]] = []
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")

    @property
    def pending_ops(self) -> int:
        """Deferred operations that have not run."""
        return len(self._deferred_ops)

    def defer(self, operation: Callable[[Engine], None], done: Callable[[], None] | None = None) -> None:
        """Queue an operation for :meth:`flush_deferred`; ``done`` is called on the event loop after it."""
        self._deferred_ops.append((operation, done))

    def flush_deferred(self) -> asyncio.Future[None]:
        """Begin the deferred operations."""
        ops, self._deferred_ops = self._deferred_ops, []
        if not ops:
            nothing: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            nothing.set_result(None)
            return nothing
        running = self.call(lambda engine: self._run(engine, [operation for operation, _ in ops]))
        for done in [done for _, done in ops if done is not None]:
            running.add_done_callback(lambda _, done=done: done())
        return running

    def step(self, inputs: Sequence[StepInput]) -> asyncio.Future[tuple[list[VerifyResult], float]]:
        """Begin the deferred operations, then one engine step: its results and its time in ms."""
        if self._deferred_ops:
            self.flush_deferred()
        return self.call(lambda engine: _timed_step(engine, inputs))

    def call(self, work: Callable[[Engine], T]) -> asyncio.Future[T]:
        """Begin ``work`` in the engine's thread."""
        return asyncio.get_running_loop().run_in_executor(self._executor, work, self.engine)

    async def replace(self, load: Callable[[], Engine]) -> None:
        """Shut a lost engine down and load another; what was deferred for it is dropped."""

        def work(lost: Engine) -> Engine:
            with contextlib.suppress(Exception):
                lost.shutdown()
            return load()

        self.engine = await self.call(work)
        self._deferred_ops = []

    def stop(self) -> None:
        """End the thread after the call under way."""
        self._executor.shutdown(wait=True)

    def _run(self, engine: Engine, ops: list[Callable[[Engine], None]]) -> None:
        for operation in ops:
            try:
                operation(engine)
            except Exception:
                # One session's failure must not cost the others their step; the audit reports it.
                self.failed_ops += 1
                log.exception("deferred engine operation failed")


def _timed_step(engine: Engine, inputs: Sequence[StepInput]) -> tuple[list[VerifyResult], float]:
    begin = time.perf_counter()
    results = engine.step(inputs)
    return results, (time.perf_counter() - begin) * 1000.0
