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
from wispprof.profiling.workload import Workload
from wispprof.types import BatchShape, Sampling, StepInput

if TYPE_CHECKING:
    from wispprof.engines.torch.engine import TorchEngine

__all__ = ["EngineRunner"]

_MASTER = "profile master"
_PREFILL_CHUNK = 512


class EngineRunner:
    """Fires batch shapes at an engine. ``synchronize`` waits for the device."""

    def __init__(
        self,
        engine: TorchEngine,
        longest: int,
        *,
        seed: int = 0,
        clock: Callable[[], float] = time.perf_counter,
        synchronize: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine, self._clock, self._synchronize = engine, clock, synchronize
        self._random = random.Random(seed)
        self._feeds: list[StepInput] = []
        self._cached: list[int] = []
        self._padded = 0
        engine.open(_MASTER, Sampling())
        for start in range(0, longest, _PREFILL_CHUNK):
            chunk = self._tokens(min(_PREFILL_CHUNK, longest - start))
            engine.step([StepInput(_MASTER, chunk, needs_logits=False)])

    def prepare(self, workload: Workload[BatchShape]) -> None:
        with _memory_told():
            self._prepare(workload)

    def _prepare(self, workload: Workload[BatchShape]) -> None:
        for number, item in enumerate(workload.subject.items):
            name = f"profile {number}"
            self._engine.fork(_MASTER, name, item.cached, private=True)
            self._cached.append(item.cached)
            drafts = 0 if item.prefill else item.new - 1
            self._feeds.append(StepInput(name, self._tokens(item.new), drafts, not item.prefill))

    def run_once(self) -> float:
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
        workload: Workload[BatchShape],
        samples: tuple[float, ...],
        flags: tuple[str, ...],
        order: int,
    ) -> StepRow:
        return StepRow(
            workload.key, workload.kind, workload.subject, samples, flags, self._padded, order
        )

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
    except (torch.OutOfMemoryError, MemoryError) as err:
        torch.cuda.empty_cache()  # nothing where there is no GPU
        first = (str(err).splitlines() or [""])[0]
        raise OutOfKvMemory(f"The device ran out of memory: {first or 'no more is known'}") from err
    except RuntimeError as err:
        # On a CPU, torch's allocator has no class of its own for it.
        if "not enough memory" not in str(err):
            raise
        raise OutOfKvMemory("The machine ran out of memory.") from err
