"""Inputs of a step over the dense KV store in groups, each padded and attended at once by torch.

A group has one pool and one size of input: verify inputs together, prompt chunks by powers of two. Values
beyond a session's length are masked.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from wispprof.engines.torch.draft_tree import DraftTree, Trees
from wispprof.engines.torch.kv_pool import KvPool
from wispprof.engines.torch.kv_store import (
    KvGeometry,
    additive_mask,
    causal,
    grouped_attention,
    one_token_attention,
)

SMALL_INPUT = 16
"""Inputs of up to this many tokens form one group."""
# Rows read in place may exceed the inputs by this factor: copying a row costs a quarter of attending to it.
_MAX_ROWS_PER_INPUT = 1.25


@dataclass(slots=True)
class PaddedGroup:
    """Inputs that are attended together: packed tokens up to ``stop``, ``span`` rows of the pool.

    ``write``: slots of new keys and values. ``cached``: keys, then values of each layer, as attention takes
    them. ``gather``: rows of these to copy, ``None`` if read in place. ``pad`` and ``unpad``: indices from
    packed to padded tokens and back, ``None`` if the group needs no padding. ``single``: by
    :func:`~wispprof.engines.torch.kv_store.one_token_attention`.
    """

    pool: KvPool
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
    scale: float

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As :data:`~wispprof.engines.torch.kv_store.Attend`, for the tokens of this group."""
        dim = k.shape[2]
        at = 2 * layer
        self.pool.slots[at].index_copy_(0, self.write, k.reshape(-1, dim))
        self.pool.slots[at + 1].index_copy_(0, self.write, v.reshape(-1, dim))
        keys, values = self.cached[at], self.cached[at + 1]
        if self.gather is not None:
            keys, values = keys.index_select(0, self.gather), values.index_select(0, self.gather)
        heads = q.shape[1]
        if self.pad is not None:
            q = q.index_select(0, self.pad)
        if self.single:
            out = one_token_attention(q, keys.flatten(0, -3), values.flatten(0, -3), self.mask, self.scale)
        else:
            padded = q.reshape(self.span, self.new, heads, dim)
            out = grouped_attention(padded, keys, values, self.mask, self.scale)
            out = out.view(self.span * self.new, heads * dim)
        return out if self.unpad is None else out.index_select(0, self.unpad)


class PaddedGroups(NamedTuple):
    """Forms the groups of a step."""

    pools: list[KvPool]
    geometry: KvGeometry
    scale: float
    dtype: torch.dtype
    device: torch.device

    def group(
        self,
        pools: np.ndarray,
        rows: np.ndarray,
        cached: np.ndarray,
        new: np.ndarray,
        trees: Trees,
        start: int = 0,
    ) -> tuple[np.ndarray, list[PaddedGroup]]:
        """(order of the inputs, their groups), packed from token ``start`` on."""
        if len(rows) == 1:
            order = np.zeros(1, dtype=np.int64)
            bounds = [0, 1]
        else:
            sizes = np.where(new <= SMALL_INPUT, 0, np.ceil(np.log2(new)).astype(np.int64))
            order = np.lexsort((rows, sizes, pools))
            kind = (pools * 64 + sizes)[order]
            bounds = [0, *(np.flatnonzero(np.diff(kind)) + 1).tolist(), len(order)]
        groups = []
        for a, b in pairwise(bounds):
            group_order = order[a:b]
            group = self._group(
                self.pools[pools[group_order[0]]],
                start,
                rows[group_order],
                cached[group_order],
                new[group_order],
                {place: trees[i] for place, i in enumerate(group_order.tolist()) if i in trees},
            )
            groups.append(group)
            start = group.stop
        return order, groups

    def _group(
        self, pool: KvPool, start: int, rows: np.ndarray, cached: np.ndarray, new: np.ndarray, trees: Trees
    ) -> PaddedGroup:
        """``rows`` ascend; ``trees`` by place in the group.

        All index arithmetic of the step happens here, none in the layers.
        """
        kv_heads, heads = self.geometry.kv_heads, self.geometry.heads
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
        single = max_new == 1 and self.dtype == torch.float32
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
                mask = additive_mask(seen, heads // kv_heads, self.dtype)
                if single:
                    mask = mask.expand(-1, kv_heads, -1, -1).flatten(0, 1)
        return PaddedGroup(
            pool=pool,
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
            scale=self.scale,
        )

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)


def _hidden(tree: DraftTree, cached: int, new: int, first_row: int, length: int) -> np.ndarray:
    """Flat places in a mask (…, length) where a node would see one that is not its ancestor."""
    root = new - len(tree.parents)
    nodes, others = tree.hidden()
    return np.asarray((first_row + root + nodes) * length + cached + root + others)
