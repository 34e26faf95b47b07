"""Dense slots: each session's keys and values lie in one contiguous stretch that grows by doubling.

Slots of equal capacity share a pool, ``(layers, 2, rows, kv_heads, capacity, d)``, packed to the front:
closing a session moves the last row into the gap. So the sessions of a pool are a batch as they lie,
and a step reads them in place where other engines would copy; and since a pool's sessions are between
half full and full, padding to the longest wastes at most half of the reading, and far less as a rule.

A step splits into groups of one pool and one size of feed (verify items together, prompt chunks by
powers of two), each padded and attended at once. A group whose rows are scattered is gathered first.
Pools begin as zeros and masked scores are −∞, so what lies beyond a session's length is never seen,
and never NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from wispprof.engines.torch.attention import grouped_attention, visible
from wispprof.engines.torch.kv_store import KvGeometry
from wispprof.errors import EngineError, OutOfKvMemory

__all__ = ["DenseKvStore"]

# Feeds up to this many tokens form one group: a pending token and its drafts.
_SMALL_FEED = 16
# Rows read in place may outnumber the items by this factor before gathering is cheaper (a gathered
# row costs a quarter of attending to it; an idle row costs one whole).
_IDLE_ROWS = 1.25


class _Pool:
    """Slots of one capacity. ``owners[row]`` is the handle in a row; rows are packed to the front."""

    def __init__(
        self, geometry: KvGeometry, capacity: int, dtype: torch.dtype, device: torch.device
    ):
        self.capacity = capacity
        self.owners: list[int] = []
        self._shape = (geometry.layers, 2, geometry.kv_heads, capacity, geometry.head_dim)
        self._dtype, self._device = dtype, device
        self.rows = 0
        self.data = torch.empty(0)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def grow(self, rows: int) -> None:
        """Have at least ``rows`` rows; what is stored stays."""
        if rows <= self.rows:
            return
        self._resize(max(rows, 2 * self.rows))

    def shrink(self) -> None:
        """Give memory back once three quarters of the rows stand empty."""
        if self.rows > 4 and 4 * len(self.owners) <= self.rows:
            self._resize(2 * len(self.owners))

    # Ordinary tensors, so that they may be written in and out of inference mode.
    @torch.inference_mode(False)
    def _resize(self, rows: int) -> None:
        layers, two, kv_heads, capacity, dim = self._shape
        shape = (layers, two, rows, kv_heads, capacity, dim)
        data = torch.zeros(shape, dtype=self._dtype, device=self._device)
        kept = len(self.owners)
        if kept:
            data[:, :, :kept] = self.data[:, :, :kept]
        self.data, self.rows = data, rows
        self.keys = [data[layer, 0] for layer in range(layers)]
        self.values = [data[layer, 1] for layer in range(layers)]


@dataclass(slots=True)
class _Group:
    """Items of a step that are attended together: tokens ``start:stop`` of the packed order."""

    pool: _Pool
    start: int
    stop: int
    items: int
    new: int
    length: int
    write: Tensor
    first: int
    span: int
    gather: Tensor | None
    pad: Tensor | None
    unpad: Tensor | None
    mask: Tensor | None


class DenseKvPlan:
    """A step on dense slots."""

    def __init__(self, order: np.ndarray, groups: list[_Group], scale: float, kv_heads: int):
        self.order = order
        self._groups = groups
        self._scale = scale
        self._kv_heads = kv_heads

    @property
    def groups(self) -> int:
        return len(self._groups)

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
        keys, values = g.pool.keys[layer], g.pool.values[layer]
        keys.view(-1, dim).index_copy_(0, g.write, k.reshape(-1, dim))
        values.view(-1, dim).index_copy_(0, g.write, v.reshape(-1, dim))
        if g.gather is None:
            rows = slice(g.first, g.first + g.span)
            keys, values = keys[rows, :, : g.length], values[rows, :, : g.length]
        else:
            keys = keys[:, :, : g.length].index_select(0, g.gather)
            values = values[:, :, : g.length].index_select(0, g.gather)
        heads = q.shape[1]
        if g.pad is not None:
            q = q.index_select(0, g.pad)
        out = grouped_attention(
            q.reshape(g.span, g.new, heads, dim), keys, values, g.mask, self._scale
        )
        out = out.view(g.span * g.new, heads * dim)
        return out if g.unpad is None else out.index_select(0, g.unpad)


class DenseKvStore:
    """Dense slot KV store (see the module's text): a :class:`~wispprof.engines.torch.kv_store.KvStore`."""

    def __init__(
        self,
        geometry: KvGeometry,
        scale: float,
        dtype: torch.dtype,
        device: torch.device,
        base_capacity: int = 256,
        keep: bool = False,
    ) -> None:
        """``keep``: hold on to memory that stands empty, so that sessions come and go without it being
        zeroed and copied anew."""
        self._keep = keep
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
        self._live: set[int] = set()
        self._free: list[int] = []

    # --- bookkeeping ---------------------------------------------------------------------------

    def add(self) -> int:
        handle = self._free.pop() if self._free else len(self._live)
        if handle >= len(self._pool_of):
            self._pool_of = np.concatenate([self._pool_of, np.full_like(self._pool_of, -1)])
            self._row_of = np.concatenate([self._row_of, np.zeros_like(self._row_of)])
        self._live.add(handle)
        self._pool_of[handle] = -1
        return handle

    def remove(self, handle: int) -> None:
        if (number := int(self._pool_of[handle])) >= 0:
            self._vacate(handle)
            if not self._keep:
                self._pools[number].shrink()
        self._live.discard(handle)
        self._free.append(handle)

    def ensure(self, handles: np.ndarray, cached: np.ndarray, lengths: np.ndarray) -> None:
        wanted = np.searchsorted(self._capacities, lengths)
        move = np.flatnonzero(wanted > self._pool_of[handles])
        if not len(move):
            return
        try:
            for pool, count in zip(*np.unique(wanted[move], return_counts=True), strict=True):
                self._pools[pool].grow(len(self._pools[pool].owners) + int(count))
        except (RuntimeError, MemoryError) as err:  # torch says "not enough memory" either way
            raise OutOfKvMemory(
                f"The KV cache cannot grow: {str(err).splitlines()[0]}",
                "Start with fewer --kv-tokens, or use a machine with more memory.",
            ) from err
        for i in move:
            self._move(int(handles[i]), int(wanted[i]), int(cached[i]))
        for left in () if self._keep else self._pools:
            left.shrink()

    def _move(self, handle: int, number: int, length: int) -> None:
        """Into a row of a larger pool (which has room), taking the first ``length`` tokens along."""
        pool = self._pools[number]
        row = len(pool.owners)
        if length:
            old = self._pools[self._pool_of[handle]]
            old_row = int(self._row_of[handle])
            pool.data[:, :, row, :, :length] = old.data[:, :, old_row, :, :length]
        self._vacate(handle)
        pool.owners.append(handle)
        self._pool_of[handle], self._row_of[handle] = number, row

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
        """Always a copy: slots share nothing."""
        handle = self.add()
        number = int(np.searchsorted(self._capacities, length))
        pool = self._pools[number]
        pool.grow(len(pool.owners) + 1)
        row = len(pool.owners)
        if length:
            old = self._pools[self._pool_of[source]]
            old_row = int(self._row_of[source])
            pool.data[:, :, row, :, :length] = old.data[:, :, old_row, :, :length]
        pool.owners.append(handle)
        self._pool_of[handle], self._row_of[handle] = number, row
        return handle

    def truncate(self, handle: int, length: int) -> None:
        """Nothing to do: what lies beyond a length is masked and then overwritten."""

    def read(self, handle: int, length: int) -> Tensor:
        g = self._geometry
        if self._pool_of[handle] < 0 or not length:
            shape = (g.layers, 2, g.kv_heads, 0, g.head_dim)
            return torch.zeros(shape, dtype=self._dtype, device=self._device)
        pool = self._pools[self._pool_of[handle]]
        kept: Tensor = pool.data[:, :, int(self._row_of[handle]), :, :length]
        return kept.clone()

    def check(self, lengths: dict[int, int]) -> None:
        seen: set[int] = set()
        for number, pool in enumerate(self._pools):
            for row, handle in enumerate(pool.owners):
                if self._pool_of[handle] != number or self._row_of[handle] != row:
                    raise EngineError(f"Slot {row} of pool {number} and handle {handle} disagree.")
                if handle in seen or handle not in self._live:
                    raise EngineError(f"Handle {handle} is stored twice, or was removed.")
                if lengths.get(handle, 0) > pool.capacity:
                    raise EngineError(f"Handle {handle} is longer than its slot.")
                seen.add(handle)
        missing = [h for h, n in lengths.items() if n and h not in seen]
        if missing or set(lengths) != self._live:
            raise EngineError(f"Handles without a slot, or slots without a session: {missing}.")

    # --- a step --------------------------------------------------------------------------------

    def plan(self, handles: np.ndarray, cached: np.ndarray, new: np.ndarray) -> DenseKvPlan:
        pools, rows = self._pool_of[handles], self._row_of[handles]
        if len(handles) == 1:
            order = np.zeros(1, dtype=np.int64)
            bounds = [0, 1]
        else:
            sizes = np.where(new <= _SMALL_FEED, 0, np.ceil(np.log2(new)).astype(np.int64))
            order = np.lexsort((rows, sizes, pools))
            kind = (pools * 64 + sizes)[order]
            bounds = [0, *(np.flatnonzero(np.diff(kind)) + 1).tolist(), len(order)]
        groups, start = [], 0
        for a, b in pairwise(bounds):
            items = order[a:b]
            group = self._group(
                self._pools[pools[items[0]]], start, rows[items], cached[items], new[items]
            )
            groups.append(group)
            start = group.stop
        return DenseKvPlan(order, groups, self._scale, self._geometry.kv_heads)

    def _group(
        self, pool: _Pool, start: int, rows: np.ndarray, cached: np.ndarray, new: np.ndarray
    ) -> _Group:
        """``rows`` ascend. All index arithmetic of the step happens here, none in the layers."""
        kv_heads, heads = self._geometry.kv_heads, self._geometry.heads
        items, total, most = len(rows), int(new.sum()), int(new.max())
        length = int((cached + new).max())
        # Where each new token's key and value go: ((row * kv_heads) + head) * capacity + position.
        first_token = np.cumsum(new) - new
        within = np.arange(total) - np.repeat(first_token, new)
        base = np.repeat(rows * kv_heads * pool.capacity + cached, new) + within
        write = (base[:, None] + np.arange(kv_heads) * pool.capacity).ravel()
        # In place, or gathered?
        first, span = int(rows[0]), int(rows[-1] - rows[0]) + 1
        in_place = span <= _IDLE_ROWS * items
        if in_place:
            local = rows - first
        else:
            span, local = items, np.arange(items)
        exact = span == items and total == items * most
        pad = unpad = None
        if not exact:
            # Idle rows and missing tokens borrow token 0; what they compute is dropped.
            slots = np.zeros(span * most, dtype=np.int64)
            place = np.repeat(local * most, new) + within
            slots[place] = np.arange(total)
            pad, unpad = self._to(slots), self._to(place)
        mask = None
        if items > 1 or most > 1:
            limits = np.zeros((span, most), dtype=np.int64)
            limits[local] = np.minimum(
                cached[:, None] + np.arange(most), (cached + new - 1)[:, None]
            )
            if limits.min() < length - 1:
                mask = visible(self._to(limits), length, heads // kv_heads, self._dtype)
        return _Group(
            pool=pool,
            start=start,
            stop=start + total,
            items=items,
            new=most,
            length=length,
            write=self._to(write),
            first=first,
            span=span,
            gather=None if in_place else self._to(rows),
            pad=pad,
            unpad=unpad,
            mask=mask,
        )

    def _to(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device)
