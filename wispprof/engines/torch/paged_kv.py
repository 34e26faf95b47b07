"""Paged KV: keys and values in blocks of one pool, addressed through block tables.

Nothing moves when sessions grow, close or fork. A step's metadata is a few index tensors of fixed shape, as
captured graphs need. Three attention backends compute the same:

- ``triton``: :mod:`~wispprof.engines.torch.triton_attention`, split over the keys, reads blocks in place
- ``varlen``: torch's variable-length attention with a block table (torch 2.12 and FlashAttention-3)
- ``gather``: copies blocks to a dense batch for
  :func:`~wispprof.engines.torch.kv_store.grouped_attention`; any device
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wispprof.engines.torch.block_table import BlockTables
from wispprof.engines.torch.draft_tree import NO_TREES, Trees
from wispprof.engines.torch.kv_store import (
    KvGeometry,
    KvStore,
    additive_mask,
    causal,
    grouped_attention,
)
from wispprof.errors import EngineError, OutOfKvMemory

ATTENTIONS = ("triton", "varlen", "gather")
BLOCK_SIZE = 64


@dataclass(slots=True)
class AttentionMetadata:
    """What attention needs of a step, on the device, with inputs padded to B and tokens to T.

    ``slot_mapping`` (T,) int64: slots of the new tokens. ``query_start_loc`` (B + 1,) int32: first packed
    token of each input. ``seq_lens`` (B,) int32: cached + new. ``token_to_input`` (T,) int32.
    ``block_tables`` (B, W) int32. ``max_query_len`` and ``max_seq_len`` bound new tokens and length of
    every input. Padding tokens belong to inputs of their own and write to the null block; their outputs are
    dropped.

    With draft trees: ``tree_starts`` (B,) int32, place of an input's first node, or its length if it has
    none. ``ancestors`` (T,) int64: bit j of a node's row is set if it sees node j of its tree.
    """

    slot_mapping: Tensor
    query_start_loc: Tensor
    seq_lens: Tensor
    token_to_input: Tensor
    block_tables: Tensor
    max_query_len: int
    max_seq_len: int
    tree_starts: Tensor | None = None
    ancestors: Tensor | None = None


class PagedKvPlan:
    """A step over a paged store."""

    def __init__(self, store: PagedKvStore, metadata: AttentionMetadata, order: np.ndarray) -> None:
        self.order = order
        self._metadata = metadata
        self._store = store
        self._gather: _Gather | None = None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        store, x = self._store, self._metadata
        keys, values = store.blocks(layer)
        flat = (-1, k.shape[1], k.shape[2])
        keys.view(flat).index_copy_(0, x.slot_mapping, k)
        values.view(flat).index_copy_(0, x.slot_mapping, v)
        if store.attention == "triton":
            from wispprof.engines.torch.triton_attention import paged_attention

            return paged_attention(q, keys, values, x, store.scale)
        if store.attention == "varlen":
            return _varlen(q, keys, values, x, store.scale)
        if self._gather is None:
            self._gather = _Gather(x, q.shape[1] // k.shape[1], q.dtype, store.block_size)
        return self._gather.attend(q, keys, values, store.scale)


class PagedKvStore(KvStore):
    """KV in blocks (see the module's docstring).

    Holds ``kv_tokens`` rounded up to blocks, one block more per session, whose last block is part empty, and
    the null block. So any sessions within the engine's limits fit.
    """

    def __init__(
        self,
        geometry: KvGeometry,
        scale: float,
        dtype: torch.dtype,
        device: torch.device,
        kv_tokens: int,
        max_sessions: int,
        block_size: int = BLOCK_SIZE,
        attention: str = "auto",
    ) -> None:
        self.scale = scale
        self.block_size = block_size
        self.max_context = geometry.max_context
        if attention == "auto":
            attention = _select_attention(device, dtype, geometry.head_dim)
        if attention not in ATTENTIONS:
            raise EngineError(
                f"Unknown paged attention {attention!r}.", f"Use one of {', '.join(ATTENTIONS)}."
            )
        self.attention = attention
        self._device = device
        blocks = -(-kv_tokens // block_size) + max_sessions
        self.tables = BlockTables(blocks, block_size, geometry.max_context, max_sessions)
        shape = (geometry.layers, 2, blocks + 1, block_size, geometry.kv_heads, geometry.head_dim)
        with torch.inference_mode(False):
            self._data = torch.zeros(shape, dtype=dtype, device=device)

    def blocks(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer: (blocks, block_size, kv_heads, d) each."""
        return self._data[layer, 0], self._data[layer, 1]

    def add(self) -> int:
        return self.tables.add()

    def remove(self, handle: int) -> None:
        self.tables.remove(handle)

    def allocate(self, handles: np.ndarray, cached: np.ndarray, lengths: np.ndarray) -> None:
        copies = self.tables.allocate(handles, cached, lengths)
        if copies:
            old, new = (torch.tensor(side, device=self._device) for side in zip(*copies, strict=True))
            self._data[:, :, new] = self._data[:, :, old]

    def fork(self, source: int, length: int, private: bool = False) -> int:
        if private and -(-length // self.block_size) > self.tables.free_blocks:
            raise OutOfKvMemory("A private copy does not fit.", "Fork without copying.")
        handle = self.tables.fork(source, length)
        if private:
            self.allocate(np.array([handle]), np.array([0]), np.array([length]))
        return handle

    def truncate(self, handle: int, length: int) -> None:
        self.tables.truncate(handle, length)

    def move(self, handles: np.ndarray, sources: np.ndarray, targets: np.ndarray) -> None:
        slots = self._data.flatten(2, 3)
        slots[:, :, self._slots(handles, targets)] = slots[:, :, self._slots(handles, sources)]

    def clear(self, handle: int, start: int, stop: int) -> None:
        slots = self._slots(np.full(stop - start, handle), np.arange(start, stop))
        self._data.flatten(2, 3)[:, :, slots] = 0

    def read(self, handle: int, length: int) -> Tensor:
        slots = self._slots(np.full(length, handle), np.arange(length))
        return self._data.flatten(2, 3)[:, :, slots].transpose(2, 3).contiguous()

    def _slots(self, handles: np.ndarray, positions: np.ndarray) -> Tensor:
        return torch.from_numpy(self.tables.slots(handles, positions)).to(self._device)

    def check(self, lengths: dict[int, int]) -> None:
        self.tables.check(lengths)

    def plan(
        self, handles: np.ndarray, cached: np.ndarray, new: np.ndarray, trees: Trees = NO_TREES
    ) -> PagedKvPlan:
        arrays = self.metadata_arrays(handles, cached, new, trees)
        metadata = AttentionMetadata(
            **{name: torch.from_numpy(a).to(self._device) for name, a in arrays.items()},
            max_query_len=int(new.max()),
            max_seq_len=int((cached + new).max()),
        )
        return self.plan_from(metadata)

    def metadata_arrays(
        self, handles: np.ndarray, cached: np.ndarray, new: np.ndarray, trees: Trees = NO_TREES
    ) -> dict[str, np.ndarray]:
        """The tensors of :class:`AttentionMetadata` as arrays, unpadded, tokens in the inputs' order."""
        lengths = cached + new
        ends = np.cumsum(new)
        positions = np.arange(int(ends[-1])) + np.repeat(cached - (ends - new), new)
        width = max(1, int(self.tables.count[handles].max()))
        arrays = {
            "slot_mapping": self.tables.slots(np.repeat(handles, new), positions),
            "query_start_loc": np.concatenate([[0], ends]).astype(np.int32),
            "seq_lens": lengths.astype(np.int32),
            "token_to_input": np.repeat(np.arange(len(handles), dtype=np.int32), new),
            "block_tables": self.tables.table[handles, :width].copy(),
        }
        if trees:
            arrays["tree_starts"] = lengths.astype(np.int32)
            arrays["ancestors"] = np.zeros(len(positions), dtype=np.int64)
            for i, tree in trees.items():
                nodes = len(tree.parents)
                arrays["tree_starts"][i] -= nodes
                arrays["ancestors"][ends[i] - nodes : ends[i]] = tree.ancestors
        return arrays

    def plan_from(self, metadata: AttentionMetadata) -> PagedKvPlan:
        """A plan over given tensors, such as the static inputs of a captured graph."""
        return PagedKvPlan(self, metadata, np.arange(len(metadata.seq_lens)))


class _Gather:
    """Index tensors of the ``gather`` backend: inputs padded to the longest, and to the most new tokens."""

    def __init__(self, x: AttentionMetadata, group: int, dtype: torch.dtype, block_size: int) -> None:
        lengths, starts = x.seq_lens.long(), x.query_start_loc.long()
        new = starts[1:] - starts[:-1]
        steps = torch.arange(x.max_query_len, device=lengths.device)
        # Padding repeats an input's last token; its output is not picked up by `_unpad`.
        within = torch.minimum(steps[None], (new - 1).clamp(min=0)[:, None])
        self._pad = (starts[:-1, None] + within).clamp(max=len(x.slot_mapping) - 1).flatten()
        last_seen = ((lengths - new)[:, None] + within).clamp(min=0)
        seen = causal(last_seen, x.max_seq_len)
        if x.tree_starts is not None and x.ancestors is not None:
            node = torch.arange(x.max_seq_len, device=lengths.device) - x.tree_starts[:, None]
            bits = x.ancestors[self._pad].view(len(lengths), -1, 1)
            # Beyond an input's last node nothing is seen, so any bit will do.
            seen &= (node < 0)[:, None] | ((bits >> node.clamp(0, 63)[:, None]) & 1).bool()
        self._mask = additive_mask(seen, group, dtype)
        inputs = x.token_to_input.long()
        offset = torch.arange(len(inputs), device=inputs.device) - starts[inputs]
        self._unpad = inputs * x.max_query_len + offset.clamp(0, x.max_query_len - 1)
        self._blocks = x.block_tables[:, : -(-x.max_seq_len // block_size)].long()
        self._shape = (len(lengths), x.max_query_len)
        self._length = x.max_seq_len

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        inputs, new = self._shape
        heads, dim = q.shape[1:]
        k, v = (
            pool[self._blocks].flatten(1, 2)[:, : self._length].transpose(1, 2) for pool in (keys, values)
        )
        padded = q[self._pad].view(inputs, new, heads, dim)
        out = grouped_attention(padded, k, v, self._mask, scale)
        return out.view(inputs * new, heads * dim)[self._unpad]


def _varlen(q: Tensor, keys: Tensor, values: Tensor, x: AttentionMetadata, scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(
        q.contiguous(),
        keys,
        values,
        x.query_start_loc,
        None,
        x.max_query_len,
        x.max_seq_len,
        scale=scale,
        window_size=(-1, 0),
        enable_gqa=True,
        seqused_k=x.seq_lens,
        block_table=x.block_tables,
    )
    assert isinstance(out, Tensor)
    return out.flatten(1)


def _select_attention(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The first of :data:`ATTENTIONS` that runs here."""
    if device.type != "cuda":
        return "gather"
    power_of_two = head_dim >= 16 and head_dim & (head_dim - 1) == 0
    if power_of_two and importlib.util.find_spec("triton") is not None:
        return "triton"
    return "varlen" if _varlen_works(device, dtype) else "gather"


def _varlen_works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's variable-length attention accepts a block table here, by one trial call.

    An older torch has no such argument; a newer one without FlashAttention-3 refuses it.
    """
    blocks = torch.zeros((2, BLOCK_SIZE, 1, 64), dtype=dtype, device=device)
    one = torch.tensor([1], dtype=torch.int32, device=device)
    starts = torch.tensor([0, 1], dtype=torch.int32, device=device)
    metadata = AttentionMetadata(one.long(), starts, one, one - 1, one[None], 1, BLOCK_SIZE)
    try:
        _varlen(blocks[0, :1], blocks, blocks, metadata, 1.0)
    except (
        ImportError,
        RuntimeError,
        TypeError,
        ValueError,
    ):  # NotImplementedError is a RuntimeError
        return False
    return True
