"""The engine's own thread: all engine calls run in it, one at a time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from wispprof.backends import Engine
from wispprof.types import StepInput, VerifyResult

log = logging.getLogger("wispprof.server")

T = TypeVar("T")
DeferredOps = list[tuple[Callable[[Engine], None], Callable[[], None] | None]]


class Step(Protocol):
    """A step of the engine's thread. ``results``: its results and its time in ms."""

    inputs: list[StepInput]
    results: asyncio.Future[tuple[list[VerifyResult], float]]

    def follow(self, results: list[VerifyResult]) -> Step | None:
        """The step that follows at once, if any. Called in the engine's thread; must not raise."""


class EngineThread:
    """Runs engine calls, so that the event loop never waits for a forward pass.

    Deferred operations (open, close, rollback) run together, in order, before the next step.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.failed_ops = 0
        self._deferred_ops: DeferredOps = []
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")

    @property
    def pending_ops(self) -> int:
        """Deferred operations that have not run."""
        return len(self._deferred_ops)

    def defer(self, operation: Callable[[Engine], None], done: Callable[[], None] | None = None) -> None:
        """Queue an operation for the time before the next step; ``done`` is called on the event loop after
        it."""
        self._deferred_ops.append((operation, done))

    def take_deferred(self) -> DeferredOps:
        """The deferred operations, for a step that runs them itself."""
        ops, self._deferred_ops = self._deferred_ops, []
        return ops

    def defer_again(self, ops: DeferredOps) -> None:
        """Operations that were taken, but not run."""
        self._deferred_ops = ops + self._deferred_ops

    def flush_deferred(self) -> asyncio.Future[None]:
        """Begin the deferred operations."""
        ops = self.take_deferred()
        if not ops:
            nothing: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            nothing.set_result(None)
            return nothing
        running = self.call(lambda engine: self.run_operations(ops))
        running.add_done_callback(lambda _: finish_operations(ops))
        return running

    def begin(self, step: Step) -> None:
        """Begin the deferred operations, then a step and those that follow it."""
        self.flush_deferred()
        self._executor.submit(self._run_steps, asyncio.get_running_loop(), step)

    def step(self, inputs: Sequence[StepInput]) -> asyncio.Future[tuple[list[VerifyResult], float]]:
        """Begin one engine step that none follows: its results and its time in ms."""
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

    def _run_steps(self, loop: asyncio.AbstractEventLoop, step: Step | None) -> None:
        while step is not None:
            try:
                results, took_ms = _timed_step(self.engine, step.inputs)
            except BaseException as err:
                loop.call_soon_threadsafe(_fail, step.results, err)
                return
            following = step.follow(results)
            loop.call_soon_threadsafe(_set, step.results, (results, took_ms))
            step = following

    def run_operations(self, ops: DeferredOps) -> None:
        """Run deferred operations, in the engine's thread."""
        for operation, _ in ops:
            try:
                operation(self.engine)
            except Exception:
                # One session's failure must not cost the others their step; the audit reports it.
                self.failed_ops += 1
                log.exception("deferred engine operation failed")


def _timed_step(engine: Engine, inputs: Sequence[StepInput]) -> tuple[list[VerifyResult], float]:
    begin = time.perf_counter()
    results = engine.step(inputs)
    return results, (time.perf_counter() - begin) * 1000.0


def finish_operations(ops: DeferredOps) -> None:
    """Tell those who wait for deferred operations that they have run."""
    for _, done in ops:
        if done is not None:
            done()


def _set(future: asyncio.Future[Any], result: object) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[Any], err: BaseException) -> None:
    if not future.done():
        future.set_exception(err)
