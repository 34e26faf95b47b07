"""Running batch shapes on an engine, whichever it is."""

from __future__ import annotations

import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from wispprof.artifacts import StepRow
from wispprof.backends import Engine
from wispprof.errors import OutOfKvMemory
from wispprof.profiling.workload import Workload
from wispprof.types import BatchShape, ModelInfo, StepInput

MASTER = "profile master"
"""The session that others are forked from, if there is one."""


class StepRunner(ABC):
    """Runs batch shapes on ``engine``. ``synchronize`` waits for the device."""

    def __init__(
        self,
        engine: Engine,
        vocab_size: int,
        *,
        seed: int = 0,
        clock: Callable[[], float] = time.perf_counter,
        synchronize: Callable[[], None] = lambda: None,
    ) -> None:
        self._target, self._clock, self._synchronize = engine, clock, synchronize
        self._vocab_size = vocab_size
        self._random = random.Random(seed)
        self._inputs: list[StepInput] = []
        self._cached: list[int] = []
        self._padded_tokens = 0

    @abstractmethod
    def open_at(self, name: str, cached: int) -> None:
        """Open a session that caches so many tokens, in memory of its own."""

    def padded_tokens(self) -> int:
        """Graph bucket of the last step, 0 if it ran without a graph or does not tell."""
        return 0

    def close(self) -> None:  # noqa: B027
        """Leave the engine as it was."""

    def prepare(self, workload: Workload[BatchShape]) -> None:
        with _out_of_memory_refuses():
            for number, item in enumerate(workload.subject.items):
                name = f"profile {number}"
                self.open_at(name, item.cached)
                self._cached.append(item.cached)
                drafts = 0 if item.prefill else item.new - 1
                tokens = self._random_tokens(item.new)
                self._inputs.append(StepInput(name, tokens, drafts, not item.prefill))

    def run_once(self) -> float:
        engine = self._target
        with _out_of_memory_refuses():
            self._synchronize()
            begin = self._clock()
            engine.step(self._inputs)
            self._synchronize()
            elapsed = self._clock() - begin
            self._padded_tokens = self.padded_tokens()
            for step_input, cached in zip(self._inputs, self._cached, strict=True):
                engine.rollback(step_input.session, cached)
        return elapsed * 1000

    def finish(self) -> None:
        # Close what is open rather than what was planned: a refused fork leaves some sessions.
        for name in list(self._target.sessions):
            if name != MASTER:
                self._target.close(name)
        self._inputs, self._cached = [], []

    def row(
        self, workload: Workload[BatchShape], samples: tuple[float, ...], flags: tuple[str, ...], order: int
    ) -> StepRow:
        return StepRow(
            workload.key, workload.kind, workload.subject, samples, flags, self._padded_tokens, order
        )

    def _random_tokens(self, count: int) -> list[int]:
        return [self._random.randrange(self._vocab_size) for _ in range(count)]


@dataclass(frozen=True)
class ProfiledEngine:
    """An engine ready to be timed. ``record``: what the manifest says about it."""

    runner: StepRunner
    model: ModelInfo
    workloads: list[Workload[BatchShape]]
    record: dict[str, Any]


@contextmanager
def _out_of_memory_refuses() -> Iterator[None]:
    """A device that runs out of memory refuses this workload; the sweep continues with the others."""
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as err:
        torch.cuda.empty_cache()  # does nothing without a GPU
        reason = (str(err).splitlines() or [""])[0] or "no details"
        raise OutOfKvMemory(f"The device ran out of memory: {reason}") from err
    except RuntimeError as err:
        # On a CPU, torch raises a plain RuntimeError.
        if "not enough memory" not in str(err):
            raise
        raise OutOfKvMemory("The machine ran out of memory.") from err
