"""What profile-server fires at: a verifier engine that is asked to step over a batch shape.

One master session is prefilled once to the longest context; the sessions of a shot are forks of it, and
every repeat is rolled back by length. So a visit costs its own steps and a copy of keys and values, and
each repeat meets the very state the first one met.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from wispprof.artifacts import StepRow
from wispprof.errors import OutOfKvMemory
from wispprof.profiling.workload import Shot
from wispprof.types import BatchShape, Feed, Sampling

if TYPE_CHECKING:
    from wispprof.engines.torch.engine import VerifierEngine

__all__ = ["EngineShooter"]

_MASTER = "profile master"
_PREFILL_CHUNK = 512


class EngineShooter:
    """Fires batch shapes at an engine. ``synchronize`` waits for the device."""

    def __init__(
        self,
        engine: VerifierEngine,
        longest: int,
        *,
        seed: int = 0,
        clock: Callable[[], float] = time.perf_counter,
        synchronize: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine, self._clock, self._synchronize = engine, clock, synchronize
        self._random = random.Random(seed)
        self._feeds: list[Feed] = []
        self._cached: list[int] = []
        self._padded = 0
        engine.open(_MASTER, Sampling())
        for start in range(0, longest, _PREFILL_CHUNK):
            chunk = self._tokens(min(_PREFILL_CHUNK, longest - start))
            engine.step([Feed(_MASTER, chunk, emit=False)])

    def prepare(self, shot: Shot[BatchShape]) -> None:
        with _memory_told():
            self._prepare(shot)

    def _prepare(self, shot: Shot[BatchShape]) -> None:
        for number, item in enumerate(shot.subject.items):
            name = f"profile {number}"
            self._engine.fork(_MASTER, name, item.cached, private=True)
            self._cached.append(item.cached)
            drafts = 0 if item.prefill else item.new - 1
            self._feeds.append(Feed(name, self._tokens(item.new), drafts, not item.prefill))

    def fire(self) -> float:
        with _memory_told():
            return self._fire()

    def _fire(self) -> float:
        engine = self._engine
        self._synchronize()
        begin = self._clock()
        engine.step(self._feeds)
        self._synchronize()
        elapsed = self._clock() - begin
        self._padded = engine.last_padded_tokens
        for feed, cached in zip(self._feeds, self._cached, strict=True):
            engine.rollback(feed.session, cached)
        return elapsed * 1000

    def finish(self) -> None:
        # By what is open rather than by what was planned: a refused fork leaves a part of its shot.
        for name in self._engine.sessions:
            if name != _MASTER:
                self._engine.close(name)
        self._feeds, self._cached = [], []

    def row(
        self,
        shot: Shot[BatchShape],
        samples: tuple[float, ...],
        flags: tuple[str, ...],
        order: int,
    ) -> StepRow:
        return StepRow(shot.key, shot.kind, shot.subject, samples, flags, self._padded, order)

    def close(self) -> None:
        """Give the engine back as it was."""
        self._engine.close(_MASTER)

    def _tokens(self, count: int) -> list[int]:
        return [self._random.randrange(self._engine.info.vocab_size) for _ in range(count)]


@contextmanager
def _memory_told() -> Iterator[None]:
    """A device that is out of memory in one shot has refused that shot, and can do the others."""
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as fault:
        torch.cuda.empty_cache()  # nothing where there is no GPU
        first = (str(fault).splitlines() or [""])[0]
        raise OutOfKvMemory(
            f"The device ran out of memory: {first or 'no more is known'}"
        ) from fault
    except RuntimeError as fault:
        # On a CPU, torch's allocator has no class of its own for it.
        if "not enough memory" not in str(fault):
            raise
        raise OutOfKvMemory("The machine ran out of memory.") from fault
