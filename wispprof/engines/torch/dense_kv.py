"""Dense KV: each session's keys and values are contiguous, in a row that grows by doubling.

Rows of equal capacity share a pool, ``(layers, 2, rows, kv_heads, capacity, d)``, packed to the front:
closing a session moves the last row into the gap. So the sessions of a pool form a batch that a step reads
in place; they are at least half full, so padding to the longest wastes at most half of the reading.

Small inputs (verify inputs, short prompt chunks) are attended by
:mod:`~wispprof.engines.torch.ragged_attention`, each at its own length. The others, and all if that kernel
is missing, split into groups of one pool and one size of input
(:mod:`~wispprof.engines.torch.padded_groups`). A group whose rows are scattered is copied first.
Pools begin as zeros and masked scores are −∞, so values beyond a session's length are never seen.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from wispprof.engines.torch.draft_tree import NO_TREES, Trees
from wispprof.engines.torch.kv_pool import KvPool
from wispprof.engines.torch.kv_store import KvGeometry, KvPlan, KvStore
from wispprof.engines.torch.padded_groups import SMALL_INPUT, PaddedGroup, PaddedGroups
from wispprof.engines.torch.ragged_attention import RaggedInputs, supports
from wispprof.errors import EngineError, OutOfKvMemory


class DenseKvPlan(KvPlan):
    """A step over a dense store: ``ragged`` inputs are packed first, then the ``groups``."""

    def __init__(self, order: np.ndarray, groups: list[PaddedGroup], ragged: RaggedInputs | None = None):
        self.order = order
        self._groups = groups
        self._ragged = ragged

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts: list[RaggedInputs | PaddedGroup] = [*self._groups]
        if self._ragged is not None:
            parts.insert(0, self._ragged)
        if len(parts) == 1:
            return parts[0].attend(layer, q, k, v)
        bounds = pairwise([0, *(part.stop for part in parts)])
        return torch.cat(
            [part.attend(layer, q[a:b], k[a:b], v[a:b]) for part, (a, b) in zip(parts, bounds, strict=True)]
        )


class DenseKvStore(KvStore):
    """Contiguous KV per session (see the module's docstring)."""

    def __init__(
        self,
        geometry: KvGeometry,
        scale: float,
        dtype: torch.dtype,
        device: torch.device,
        base_capacity: int = 256,
        keep_memory: bool = False,
        native: bool = True,
    ) -> None:
        """``keep_memory``: do not free empty rows, so that later sessions need not zero memory again.
        ``native``: attend with the C kernel if it supports this store."""
        self._keep_memory = keep_memory
        ragged = native and supports(dtype, device, geometry.head_dim)
        self.attention = "ragged" if ragged else "dense"
        self._geometry = geometry
        self._scale = scale
        self._dtype = dtype
        self._device = device
        self._pools: list[KvPool] = []
        capacity = min(base_capacity, geometry.max_context)
        while True:
            self._pools.append(KvPool(geometry, capacity, dtype, device))
            if capacity >= geometry.max_context:
                break
            capacity = min(2 * capacity, geometry.max_context)
        self._capacities = np.array([p.capacity for p in self._pools])
        self._padded = PaddedGroups(self._pools, geometry, scale, dtype, device)
        self._pool_of = np.full(16, -1, dtype=np.int64)
        self._row_of = np.zeros(16, dtype=np.int64)
        self._handles: set[int] = set()
        self._free_handles: list[int] = []

    # --- bookkeeping ---------------------------------------------------------------------------

    def add(self) -> int:
        handle = self._free_handles.pop() if self._free_handles else len(self._handles)
        if handle >= len(self._pool_of):
            self._pool_of = np.concatenate([self._pool_of, np.full_like(self._pool_of, -1)])
            self._row_of = np.concatenate([self._row_of, np.zeros_like(self._row_of)])
        self._handles.add(handle)
        self._pool_of[handle] = -1
        return handle

    def remove(self, handle: int) -> None:
        if (number := int(self._pool_of[handle])) >= 0:
            self._vacate(handle)
            if not self._keep_memory:
                self._pools[number].shrink()
        self._handles.discard(handle)
        self._free_handles.append(handle)

    def allocate(self, handles: np.ndarray, cached: np.ndarray, lengths: np.ndarray) -> None:
        pools = np.searchsorted(self._capacities, lengths)
        move = np.flatnonzero(pools > self._pool_of[handles])
        if not len(move):
            return
        try:
            for pool, count in zip(*np.unique(pools[move], return_counts=True), strict=True):
                self._pools[pool].grow(len(self._pools[pool].owners) + int(count))
        except (RuntimeError, MemoryError) as err:  # torch raises either
            raise OutOfKvMemory(
                f"The KV cache cannot grow: {str(err).splitlines()[0]}",
                "Start with fewer --kv-tokens, or use a machine with more memory.",
            ) from err
        for i in move:
            self._move(int(handles[i]), int(pools[i]), int(cached[i]))
        if not self._keep_memory:
            for pool_left in self._pools:
                pool_left.shrink()

    def _move(self, handle: int, number: int, length: int) -> None:
        """Into a free row of a larger pool, with the first ``length`` tokens."""
        row = self._copy(handle, number, length)
        self._vacate(handle)
        self._pools[number].owners.append(handle)
        self._pool_of[handle], self._row_of[handle] = number, row

    def _copy(self, source: int, number: int, length: int) -> int:
        """Copy the first ``length`` tokens into the first free row of a pool; returns the row."""
        pool = self._pools[number]
        row = len(pool.owners)
        if length:
            old, old_row = self._pools[self._pool_of[source]], int(self._row_of[source])
            pool.data[:, :, row, :, :length] = old.data[:, :, old_row, :, :length]
        return row

    def _vacate(self, handle: int) -> None:
        """Free the handle's row; the last row of the pool moves into the gap."""
        if self._pool_of[handle] < 0:
            return
        pool, row = self._pools[self._pool_of[handle]], int(self._row_of[handle])
        last = len(pool.owners) - 1
        if row != last:
            pool.data[:, :, row] = pool.data[:, :, last]
            mover = pool.owners[last]
            pool.owners[row] = mover
            self._row_of[mover] = row
        pool.owners.pop()
        self._pool_of[handle] = -1

    def fork(self, source: int, length: int, private: bool = False) -> int:
        """Always a copy: dense rows are not shared."""
        handle = self.add()
        number = int(np.searchsorted(self._capacities, length))
        pool = self._pools[number]
        pool.grow(len(pool.owners) + 1)
        row = self._copy(source, number, length)
        pool.owners.append(handle)
        self._pool_of[handle], self._row_of[handle] = number, row
        return handle

    def truncate(self, handle: int, length: int) -> None:
        """Nothing to do: values beyond a length are masked and later overwritten."""

    def move(self, handles: np.ndarray, sources: np.ndarray, targets: np.ndarray) -> None:
        for handle in np.unique(handles).tolist():
            row = self._pools[self._pool_of[handle]].data[:, :, int(self._row_of[handle])]
            mine = handles == handle
            row[:, :, :, targets[mine]] = row[:, :, :, sources[mine]]

    def clear(self, handle: int, start: int, stop: int) -> None:
        pool = self._pools[self._pool_of[handle]]
        pool.data[:, :, int(self._row_of[handle]), :, start:stop] = 0

    def read(self, handle: int, length: int) -> Tensor:
        g = self._geometry
        if self._pool_of[handle] < 0 or not length:
            shape = (g.layers, 2, g.kv_heads, 0, g.head_dim)
            return torch.zeros(shape, dtype=self._dtype, device=self._device)
        pool = self._pools[self._pool_of[handle]]
        stored: Tensor = pool.data[:, :, int(self._row_of[handle]), :, :length]
        return stored.clone()

    def check(self, lengths: dict[int, int]) -> None:
        seen: set[int] = set()
        for number, pool in enumerate(self._pools):
            for row, handle in enumerate(pool.owners):
                if self._pool_of[handle] != number or self._row_of[handle] != row:
                    raise EngineError(f"Row {row} of pool {number} and handle {handle} disagree.")
                if handle in seen or handle not in self._handles:
                    raise EngineError(f"Handle {handle} is stored twice, or was removed.")
                if lengths.get(handle, 0) > pool.capacity:
                    raise EngineError(f"Handle {handle} is longer than its row.")
                seen.add(handle)
        missing = [h for h, n in lengths.items() if n and h not in seen]
        if missing or set(lengths) != self._handles:
            raise EngineError(f"Handles without a row, or rows without a session: {missing}.")

    # --- a step --------------------------------------------------------------------------------

    def plan(
        self, handles: np.ndarray, cached: np.ndarray, new: np.ndarray, trees: Trees = NO_TREES
    ) -> DenseKvPlan:
        pools, rows = self._pool_of[handles], self._row_of[handles]
        small = new <= SMALL_INPUT
        if self.attention == "ragged" and small.any():
            order = np.argsort(~small, kind="stable")
            count = int(np.count_nonzero(small))
            return self._ragged_plan(order, count, handles[order], cached[order], new[order], trees)
        order, groups = self._padded.group(pools, rows, cached, new, trees)
        return DenseKvPlan(order, groups)

    def _ragged_plan(
        self,
        order: np.ndarray,
        count: int,
        handles: np.ndarray,
        cached: np.ndarray,
        new: np.ndarray,
        trees: Trees,
    ) -> DenseKvPlan:
        """The first ``count`` inputs of ``order`` by the kernel, the others in groups behind them.

        ``handles``, ``cached`` and ``new`` are in that order already.
        """
        place = {number: at for at, number in enumerate(order.tolist())}
        placed = {place[number]: tree for number, tree in trees.items()}
        pools, rows = self._pool_of[handles], self._row_of[handles]
        capacity = np.where(pools < 0, 0, self._capacities[pools])
        ragged = RaggedInputs.of(
            new[:count],
            cached[:count],
            capacity[:count],
            self._addresses(pools[:count], rows[:count]),
            [pool.data for pool in self._pools],
            {at: tree for at, tree in placed.items() if at < count},
            self._scale,
        )
        if count == len(order):
            return DenseKvPlan(order, [], ragged)
        behind, groups = self._padded.group(
            pools[count:],
            rows[count:],
            cached[count:],
            new[count:],
            {at - count: tree for at, tree in placed.items() if at >= count},
            ragged.stop,
        )
        order = np.concatenate((order[:count], order[count:][behind]))
        return DenseKvPlan(order, groups, ragged)

    def _addresses(self, pools: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Addresses (2 · layers, n) of keys, then values, of each layer, of the sessions in these rows."""
        g = self._geometry
        planes = np.arange(2 * g.layers)[:, None]
        floats = g.kv_heads * self._capacities[pools] * g.head_dim
        base = np.array([pool.data.data_ptr() for pool in self._pools])[pools]
        sizes = np.array([pool.rows for pool in self._pools])[pools]
        return np.asarray(base + 4 * floats * (planes * sizes + rows))
