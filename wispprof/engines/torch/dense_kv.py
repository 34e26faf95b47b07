"""Dense KV: each session's keys and values are contiguous, in a row that grows by doubling.

Rows of equal capacity share a pool, ``(layers, 2, rows, kv_heads, capacity, d)``, packed to the front:
closing a session moves the last row into the gap. So the sessions of a pool form a batch that a step reads
in place; they are at least half full, so padding to the longest wastes at most half of the reading.

A step splits into groups of one pool and one size of input (verify inputs together, prompt chunks by
powers of two), each padded and attended at once. A group whose rows are scattered is copied first.
Pools begin as zeros and masked scores are −∞, so values beyond a session's length are never seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from wispprof.engines.torch.draft_tree import NO_TREES, DraftTree, Trees
from wispprof.engines.torch.kv_store import (
    KvGeometry,
    KvPlan,
    KvStore,
    additive_mask,
    causal,
    grouped_attention,
    one_token_attention,
)
from wispprof.errors import EngineError, OutOfKvMemory

# Inputs of up to this many tokens form one group.
_SMALL_INPUT = 16
# Rows read in place may exceed the inputs by this factor: copying a row costs a quarter of attending to it.
_MAX_ROWS_PER_INPUT = 1.25


class _Pool:
    """Rows of one capacity. ``owners[row]`` is the handle in a row; used rows come first."""

    def __init__(self, geometry: KvGeometry, capacity: int, dtype: torch.dtype, device: torch.device):
        self.capacity = capacity
        self.owners: list[int] = []
        self._shape = (geometry.layers, 2, geometry.kv_heads, capacity, geometry.head_dim)
        self._dtype, self._device = dtype, device
        self.rows = 0
        self.data = torch.empty(0)
        self.slots: tuple[Tensor, ...] = ()
        """Keys, then values of each layer, one row per token and head: (rows · kv_heads · capacity, d)."""

    def grow(self, rows: int) -> None:
        """Have at least ``rows`` rows; stored values stay."""
        if rows <= self.rows:
            return
        self._resize(max(rows, 2 * self.rows))

    def shrink(self) -> None:
        """Free memory if at least three quarters of the rows are empty."""
        if self.rows > 4 and 4 * len(self.owners) <= self.rows:
            self._resize(2 * len(self.owners))

    # Ordinary tensors, so that they can be written in and out of inference mode.
    @torch.inference_mode(False)
    def _resize(self, rows: int) -> None:
        layers, two, kv_heads, capacity, dim = self._shape
        shape = (layers, two, rows, kv_heads, capacity, dim)
        data = torch.zeros(shape, dtype=self._dtype, device=self._device)
        kept = len(self.owners)
        if kept:
            data[:, :, :kept] = self.data[:, :, :kept]
        self.data, self.rows = data, rows
        self.slots = data.view(2 * layers, -1, dim).unbind()


@dataclass(slots=True)
class _Group:
    """Inputs that are attended together: packed tokens ``start:stop``, ``span`` rows of the pool.

    ``write``: slots of new keys and values. ``cached``: keys, then values of each layer, as attention takes
    them. ``gather``: rows of these to copy, ``None`` if read in place. ``pad`` and ``unpad``: indices from
    packed to padded tokens and back, ``None`` if the group needs no padding. ``single``: by
    :func:`~wispprof.engines.torch.kv_store.one_token_attention`.
    """

    pool: _Pool
    start: int
    stop: int
    new: int
    write: Tensor
    cached: tuple[Tensor, ...]
    span: int
    gather: Tensor | None
    pad: Tensor | None
    unpad: Tensor | None
    mask: Tensor | None
    single: bool


class DenseKvPlan(KvPlan):
    """A step over a dense store."""

    def __init__(self, order: np.ndarray, groups: list[_Group], scale: float):
        self.order = order
        self._groups = groups
        self._scale = scale

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dim = k.shape[2]
        if len(self._groups) == 1:
            return self._attend(self._groups[0], layer, q, k, v, dim)
        parts = []
        for g in self._groups:
            a, b = g.start, g.stop
            parts.append(self._attend(g, layer, q[a:b], k[a:b], v[a:b], dim))
        return torch.cat(parts)

    def _attend(self, g: _Group, layer: int, q: Tensor, k: Tensor, v: Tensor, dim: int) -> Tensor:
        at = 2 * layer
        g.pool.slots[at].index_copy_(0, g.write, k.reshape(-1, dim))
        g.pool.slots[at + 1].index_copy_(0, g.write, v.reshape(-1, dim))
        keys, values = g.cached[at], g.cached[at + 1]
        if g.gather is not None:
            keys, values = keys.index_select(0, g.gather), values.index_select(0, g.gather)
        heads = q.shape[1]
        if g.pad is not None:
            q = q.index_select(0, g.pad)
        if g.single:
            out = one_token_attention(q, keys.flatten(0, -3), values.flatten(0, -3), g.mask, self._scale)
        else:
            padded = q.reshape(g.span, g.new, heads, dim)
            out = grouped_attention(padded, keys, values, g.mask, self._scale)
            out = out.view(g.span * g.new, heads * dim)
        return out if g.unpad is None else out.index_select(0, g.unpad)


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
    ) -> None:
        """``keep_memory``: do not free empty rows, so that later sessions need not zero memory again."""
        self._keep_memory = keep_memory
        self._geometry = geometry
        self._scale = scale
        self._dtype = dtype
        self._device = device
        self._pools: list[_Pool] = []
        capacity = min(base_capacity, geometry.max_context)
        while True:
            self._pools.append(_Pool(geometry, capacity, dtype, device))
            if capacity >= geometry.max_context:
                break
            capacity = min(2 * capacity, geometry.max_context)
        self._capacities = np.array([p.capacity for p in self._pools])
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
        if len(handles) == 1:
            order = np.zeros(1, dtype=np.int64)
            bounds = [0, 1]
        else:
            sizes = np.where(new <= _SMALL_INPUT, 0, np.ceil(np.log2(new)).astype(np.int64))
            order = np.lexsort((rows, sizes, pools))
            kind = (pools * 64 + sizes)[order]
            bounds = [0, *(np.flatnonzero(np.diff(kind)) + 1).tolist(), len(order)]
        groups, start = [], 0
        for a, b in pairwise(bounds):
            group_order = order[a:b]
            group = self._group(
                self._pools[pools[group_order[0]]],
                start,
                rows[group_order],
                cached[group_order],
                new[group_order],
                {place: trees[i] for place, i in enumerate(group_order.tolist()) if i in trees},
            )
            groups.append(group)
            start = group.stop
        return DenseKvPlan(order, groups, self._scale)

    def _group(
        self, pool: _Pool, start: int, rows: np.ndarray, cached: np.ndarray, new: np.ndarray, trees: Trees
    ) -> _Group:
        """``rows`` ascend; ``trees`` by place in the group.

        All index arithmetic of the step happens here, none in the layers.
        """
        kv_heads, heads = self._geometry.kv_heads, self._geometry.heads
        count, total, max_new = len(rows), int(new.sum()), int(new.max())
        length = int((cached + new).max())
        # Place of a new key or value: ((row * kv_heads) + head) * capacity + position.
        first_token = np.cumsum(new) - new
        within = np.arange(total) - np.repeat(first_token, new)
        base = np.repeat(rows * kv_heads * pool.capacity + cached, new) + within
        write = (base[:, None] + np.arange(kv_heads) * pool.capacity).ravel()
        first, span = int(rows[0]), int(rows[-1] - rows[0]) + 1
        in_place = span <= _MAX_ROWS_PER_INPUT * count
        if in_place:
            local, read = rows - first, slice(first, first + span)
        else:
            span, local, read = count, np.arange(count), slice(None)
        exact = span == count and total == count * max_new
        pad = unpad = None
        if not exact:
            # Idle rows and missing tokens compute token 0; their output is dropped.
            source = np.zeros(span * max_new, dtype=np.int64)
            place = np.repeat(local * max_new, new) + within
            source[place] = np.arange(total)
            pad, unpad = self._to_device(source), self._to_device(place)
        # In a narrower dtype the plain products would round the scores.
        single = max_new == 1 and self._dtype == torch.float32
        cached_kv = pool.data[:, :, read, :, :length].flatten(0, 1)
        if single and in_place:
            cached_kv = cached_kv.flatten(1, 2)
        mask = None
        if count > 1 or max_new > 1:
            last_seen = np.zeros((span, max_new), dtype=np.int64)
            last_seen[local] = np.minimum(cached[:, None] + np.arange(max_new), (cached + new - 1)[:, None])
            if last_seen.min() < length - 1:
                seen = causal(self._to_device(last_seen), length)
                if trees:
                    hidden = [
                        _hidden(tree, int(cached[i]), int(new[i]), int(local[i]) * max_new, length)
                        for i, tree in trees.items()
                    ]
                    seen.view(-1)[self._to_device(np.concatenate(hidden))] = False
                mask = additive_mask(seen, heads // kv_heads, self._dtype)
                if single:
                    mask = mask.expand(-1, kv_heads, -1, -1).flatten(0, 1)
        return _Group(
            pool=pool,
            start=start,
            stop=start + total,
            new=max_new,
            write=self._to_device(write),
            cached=cached_kv.unbind(),
            span=span,
            gather=None if in_place else self._to_device(rows),
            pad=pad,
            unpad=unpad,
            mask=mask,
            single=single,
        )

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device)


def _hidden(tree: DraftTree, cached: int, new: int, first_row: int, length: int) -> np.ndarray:
    """Flat places in a mask (…, length) where a node would see one that is not its ancestor."""
    root = new - len(tree.parents)
    nodes, others = tree.hidden()
    return np.asarray((first_row + root + nodes) * length + cached + root + others)
