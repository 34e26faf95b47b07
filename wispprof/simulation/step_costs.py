"""Time of a simulated step: estimate and residual, servers without prefix cache, KV offload to host
memory, kept prefixes."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random
from statistics import NormalDist

from wispprof.simulation.arrivals import BLOCK_TOKENS
from wispprof.types import BatchCost, BatchShape, StepTimeEstimator, VerifyItem

_EARLY_Z = NormalDist().inv_cdf(0.05)


@dataclass(frozen=True, slots=True)
class WithoutPrefixCache(StepTimeEstimator):
    """The same server without KV between rounds: every item is computed from its first token on."""

    inner: StepTimeEstimator

    @property
    def coverage(self) -> float:
        return self.inner.coverage

    def start(self) -> BatchCost:
        return _Uncached(self.inner.start())

    def predict(self, shape: BatchShape) -> tuple[float, float]:
        return self.inner.predict(BatchShape.of((i.new + i.cached, 0, True) for i in shape.items))


class _Uncached(BatchCost):
    __slots__ = ("_batch",)

    def __init__(self, batch: BatchCost) -> None:
        self._batch = batch

    @property
    def p50_ms(self) -> float:
        return self._batch.p50_ms

    @property
    def bound_ms(self) -> float:
        return self._batch.bound_ms

    def add(self, new: int, cached: int, prefill: bool = False) -> BatchCost:
        return _Uncached(self._batch.add(new + cached, 0, True))


@dataclass(eq=False)
class SimulatedStepTimes:
    """The estimator's median times a log-normal residual.

    ``spread``: standard deviation of the residual's logarithm; ``None`` takes the one under which the
    estimator's bound has the coverage it states.
    """

    estimator: StepTimeEstimator
    spread: float | None
    rng: Random

    def __post_init__(self) -> None:
        self._z = NormalDist().inv_cdf(min(max(self.estimator.coverage, 0.5001), 0.9999))

    def sample(self, items: list[tuple[int, int, bool]]) -> tuple[float, float, float]:
        """(median, drawn, 5 % quantile) milliseconds of a step over ``(new, cached, prefill)`` items."""
        p50, bound = self.estimator.predict(BatchShape(tuple(map(VerifyItem._make, items))))
        noise = self.rng.gauss(0.0, 1.0)
        spread = self.spread
        if spread is None:
            spread = math.log(bound / p50) / self._z if p50 > 0 else 0.0
        if spread <= 0:
            return p50, p50, p50
        return p50, p50 * math.exp(spread * noise), p50 * math.exp(spread * _EARLY_Z)


class PrefixBlocks:
    """Blocks of prompts whose KV a server keeps after their sessions, least recently used out first."""

    __slots__ = ("_blocks", "_held")

    def __init__(self, tokens: int) -> None:
        self._blocks = tokens // BLOCK_TOKENS
        self._held: OrderedDict[int, None] = OrderedDict()

    def take(self, blocks: Sequence[int]) -> int:
        """How many leading blocks of a prompt are held."""
        for count, block in enumerate(blocks):
            if block not in self._held:
                return count
            self._held.move_to_end(block)
        return len(blocks)

    def put(self, blocks: Sequence[int]) -> None:
        """A session over these blocks ended."""
        if not self._blocks:
            return
        for block in blocks:
            self._held[block] = None
            self._held.move_to_end(block)
        while len(self._held) > self._blocks:
            self._held.popitem(last=False)


class KvOffload:
    """A GPU with ``capacity`` cache tokens; the least recently used session is evicted first.

    Host memory holds a copy of everything: an eviction costs nothing, a return is one read.
    """

    __slots__ = ("_capacity", "_held", "_used")

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._held: OrderedDict[str, int] = OrderedDict()
        self._used = 0

    def take(self, items: Iterable[tuple[str, int, int]]) -> int:
        """A step over (session, cached, new) begins: cache tokens that must be read back for it."""
        missed = 0
        for session, cached, new in items:
            held = self._held.pop(session, None)
            if held is None:
                missed += cached
            else:
                self._used -= held
            self._held[session] = cached + new
            self._used += cached + new
        # Items of this step are the most recently used: they go only if the step alone exceeds the capacity.
        while self._used > self._capacity:
            self._used -= self._held.popitem(last=False)[1]
        return missed

    def drop(self, session: str) -> None:
        """A session is over."""
        self._used -= self._held.pop(session, 0)

    @property
    def used(self) -> int:
        """Cache tokens on the GPU, at most ``capacity``."""
        return self._used
