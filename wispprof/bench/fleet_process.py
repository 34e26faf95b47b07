"""A fleet in a process of its own, so that drafting and emulated links cost the server nothing."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
from collections.abc import Callable, Collection
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from wispprof.artifacts import load_trace
from wispprof.bench.bench_result import BenchResult
from wispprof.bench.fleet import Progress, run_bench
from wispprof.settings.bench_settings import BenchSettings
from wispprof.testing.high_res_loop import run_high_res

__all__ = ["FleetProcess"]

T = TypeVar("T")
_Said = tuple[int, int, str]
_words: SimpleQueue[_Said | None] | None = None


class FleetProcess:
    """Use as ``with``. One bench at a time; the process and what it has imported stay for the next.

    ``cores``: those it may run on (none: all), where the system can say so. A server measured beside it
    should keep to the others, or the drafting of the fleet shows in its step times.
    """

    def __init__(self, cores: Collection[int] = ()) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._said: SimpleQueue[_Said | None] = spawn.SimpleQueue()
        self._pool = ProcessPoolExecutor(
            1, spawn, initializer=_begin, initargs=(self._said, tuple(cores))
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        err: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    async def call(self, work: Callable[..., T], *arguments: Any) -> T:
        """Run a module's function there; arguments and result are pickled. Raises what it raises."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *arguments)

    async def bench(
        self, settings: BenchSettings, url: str, trace: Path, progress: Progress | None = None
    ) -> BenchResult:
        """:func:`~wispprof.bench.run_bench` against the server at ``url``, with a trace's file."""
        if progress is None:
            return await self.call(_bench, settings, url, trace, False)
        loop = asyncio.get_running_loop()

        def pass_on() -> None:
            while (said := self._said.get()) is not None:
                loop.call_soon_threadsafe(progress, *said)

        passing = loop.run_in_executor(None, pass_on)
        try:
            return await self.call(_bench, settings, url, trace, True)
        finally:
            self._said.put(None)
            await passing


def _begin(words: SimpleQueue[_Said | None], cores: tuple[int, ...]) -> None:
    global _words
    _words = words
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)


def _bench(settings: BenchSettings, url: str, trace: Path, tell: bool) -> BenchResult:
    words = _words
    assert words is not None

    def say(done: int, total: int, note: str) -> None:
        words.put((done, total, note))

    # Told nobody, words would fill the pipe, and the fleet would stand still on the next one.
    main = run_bench(settings, url, load_trace(trace), say if tell else None)
    return run_high_res(main, settings.devices)
