"""What the engine asks of a KV store. Dense slots and pages stand behind it, tested for parity.

A store knows handles, not sessions, and nothing of tokens. The engine keeps the lengths; a store only
guarantees room. ``plan`` arranges a step once; ``attend`` then runs in every layer with what was planned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

__all__ = ["KvGeometry", "KvPlan", "KvStore"]


@dataclass(frozen=True, slots=True)
class KvGeometry:
    """Sizes that the cache of a model has."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_context: int


class KvPlan(Protocol):
    """A step, arranged. ``order``: item numbers in the order in which their tokens must be packed."""

    order: np.ndarray

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write k, v (T, kv_heads, d) behind the cached tokens of each item, then attend causally.

        ``q`` (T, heads, d); returns (T, heads · d).
        """


class KvStore(Protocol):
    """Room for the keys and values of up to ``max_sessions`` sessions and ``kv_tokens`` tokens in all.

    Any set of sessions within both limits fits: fragmentation is the store's business.
    """

    def add(self) -> int:
        """A new, empty handle."""

    def remove(self, handle: int) -> None:
        """Give back all that a handle holds."""

    def ensure(self, handles: np.ndarray, cached: np.ndarray, lengths: np.ndarray) -> None:
        """Make room for ``lengths`` tokens in all per handle; the first ``cached`` are kept.

        Raises :class:`~wispprof.errors.OutOfKvMemory` before anything changed.
        """

    def plan(self, handles: np.ndarray, cached: np.ndarray, new: np.ndarray) -> KvPlan:
        """Arrange a step of items that add ``new`` tokens to ``cached`` ones (``ensure`` came first)."""

    def fork(self, source: int, length: int, private: bool = False) -> int:
        """A new handle that holds the first ``length`` tokens of ``source``, shared or copied at once."""

    def truncate(self, handle: int, length: int) -> None:
        """Only the first ``length`` tokens will be asked for again."""

    def read(self, handle: int, length: int) -> Tensor:
        """Cached keys and values, (layers, 2, kv_heads, length, d), copied."""

    def check(self, lengths: dict[int, int]) -> None:
        """Raise :class:`~wispprof.errors.EngineError` if the bookkeeping contradicts itself."""
