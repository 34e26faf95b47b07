"""Paged KV: keys and values in pages of one pool, found through block tables.

Nothing moves when sessions grow, close or fork, and a step's arrangement is a handful of index tensors of
fixed shape, which is what a captured graph needs. Three ways to attend, tested for parity where they run:

- ``triton``: :mod:`~wispprof.engines.torch.triton_attention`, split over the keys, reads pages in place
- ``varlen``: torch's variable-length attention with its block table (torch 2.12 and FlashAttention-3)
- ``gather``: pages gathered to dense, then
  :func:`~wispprof.engines.torch.attention.grouped_attention`; any device
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wispprof.engines.torch.attention import grouped_attention, visible
from wispprof.engines.torch.block_table import NULL_PAGE, BlockTables
from wispprof.engines.torch.kv_store import KvGeometry
from wispprof.errors import EngineError, OutOfKvMemory

__all__ = ["ATTENTIONS", "PagedInputs", "PagedKvStore", "pick_attention"]

ATTENTIONS = ("triton", "varlen", "gather")
PAGE_SIZE = 64


@dataclass(slots=True)
class PagedInputs:
    """What attention needs of a step, on the device. With items padded to B and tokens to T:

    ``write`` (T,) int64 flat places of the new tokens; ``starts`` (B + 1,) int32 first packed token of each
    item; ``lengths`` (B,) int32 cached + new; ``tables`` (B, W) int32; ``max_new`` and ``max_length``
    bound new and length of every item. ``rows`` (T,) int32: the item of each token. Padding tokens belong to
    an item of length 0 or of their own, write to page 0, and their outputs are dropped.
    """

    write: Tensor
    starts: Tensor
    lengths: Tensor
    tables: Tensor
    rows: Tensor
    max_new: int
    max_length: int


class PagedKvPlan:
    """A step on pages."""

    def __init__(self, store: PagedKvStore, inputs: PagedInputs, order: np.ndarray) -> None:
        self.order = order
        self.inputs = inputs
        self._store = store
        self._dense: _Dense | None = None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        store, x = self._store, self.inputs
        keys, values = store.pages(layer)
        flat = (-1, k.shape[1], k.shape[2])
        keys.view(flat).index_copy_(0, x.write, k)
        values.view(flat).index_copy_(0, x.write, v)
        if store.attention == "triton":
            from wispprof.engines.torch.triton_attention import paged_attention

            return paged_attention(q, keys, values, x, store.scale)
        if store.attention == "varlen":
            return _varlen(q, keys, values, x, store.scale)
        if self._dense is None:
            self._dense = _Dense(x, q.shape[1] // k.shape[1], q.dtype, store.page_size)
        return self._dense.attend(q, keys, values, store.scale)


class PagedKvStore:
    """Paged KV store; implements :class:`~wispprof.engines.torch.kv_store.KvStore`.

    Holds ``kv_tokens`` rounded up to pages, one page more per session (its last page is part empty), and the
    null page; so any sessions within the engine's limits fit.
    """

    def __init__(
        self,
        geometry: KvGeometry,
        scale: float,
        dtype: torch.dtype,
        device: torch.device,
        kv_tokens: int,
        max_sessions: int,
        page_size: int = PAGE_SIZE,
        attention: str = "auto",
    ) -> None:
        self.scale = scale
        self.page_size = page_size
        self.max_context = geometry.max_context
        if attention == "auto":
            attention = pick_attention(device, dtype, geometry.head_dim)
        self.attention = attention
        if self.attention not in ATTENTIONS:
            raise EngineError(
                f"Unknown paged attention {attention!r}.", f"Use one of {ATTENTIONS}."
            )
        self._geometry = geometry
        self._device = device
        pages = -(-kv_tokens // page_size) + max_sessions
        self.tables = BlockTables(pages, page_size, geometry.max_context, max_sessions)
        shape = (geometry.layers, 2, pages + 1, page_size, geometry.kv_heads, geometry.head_dim)
        with torch.inference_mode(False):
            self._data = torch.zeros(shape, dtype=dtype, device=device)

    def pages(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer: (pages, page_size, kv_heads, d) each."""
        return self._data[layer, 0], self._data[layer, 1]

    def add(self) -> int:
        return self.tables.add()

    def remove(self, handle: int) -> None:
        self.tables.remove(handle)

    def ensure(self, handles: np.ndarray, cached: np.ndarray, lengths: np.ndarray) -> None:
        copies = self.tables.ensure(handles, cached, lengths)
        if copies:
            old, new = (
                torch.tensor(side, device=self._device) for side in zip(*copies, strict=True)
            )
            self._data[:, :, new] = self._data[:, :, old]

    def fork(self, source: int, length: int, private: bool = False) -> int:
        if private and -(-length // self.page_size) > self.tables.free_pages:
            raise OutOfKvMemory("A private copy does not fit.", "Fork without copying.")
        handle = self.tables.fork(source, length)
        if private:
            self.ensure(np.array([handle]), np.array([0]), np.array([length]))
        return handle

    def truncate(self, handle: int, length: int) -> None:
        self.tables.truncate(handle, length)

    def read(self, handle: int, length: int) -> Tensor:
        places = self.tables.places(np.full(length, handle), np.arange(length))
        flat = self._data.flatten(2, 3)[:, :, torch.from_numpy(places).to(self._device)]
        return flat.transpose(2, 3).contiguous()

    def check(self, lengths: dict[int, int]) -> None:
        self.tables.check(lengths)

    def plan(self, handles: np.ndarray, cached: np.ndarray, new: np.ndarray) -> PagedKvPlan:
        arrays = self.arrange(handles, cached, new)
        inputs = PagedInputs(
            **{name: torch.from_numpy(a).to(self._device) for name, a in arrays.items()},
            max_new=int(new.max()),
            max_length=int((cached + new).max()),
        )
        return PagedKvPlan(self, inputs, np.arange(len(handles)))

    def arrange(
        self, handles: np.ndarray, cached: np.ndarray, new: np.ndarray
    ) -> dict[str, np.ndarray]:
        """The tensors of :class:`PagedInputs` as arrays, unpadded; tokens packed in the items' order."""
        ends = np.cumsum(new)
        positions = np.arange(int(ends[-1])) + np.repeat(cached - (ends - new), new)
        width = max(1, int(self.tables.count[handles].max()))
        return {
            "write": self.tables.places(np.repeat(handles, new), positions),
            "starts": np.concatenate([[0], ends]).astype(np.int32),
            "lengths": (cached + new).astype(np.int32),
            "tables": self.tables.table[handles, :width].copy(),
            "rows": np.repeat(np.arange(len(handles), dtype=np.int32), new),
        }

    def plan_on(self, inputs: PagedInputs) -> PagedKvPlan:
        """A plan over tensors that live elsewhere (the static inputs of a captured graph)."""
        return PagedKvPlan(self, inputs, np.arange(len(inputs.lengths)))

    @property
    def null_place(self) -> int:
        """Where padding tokens write."""
        return NULL_PAGE * self.page_size


class _Dense:
    """The gather way: every item padded to the longest and to the most new tokens of the step."""

    def __init__(self, x: PagedInputs, group: int, dtype: torch.dtype, page_size: int) -> None:
        lengths = x.lengths.long()
        starts = x.starts.long()
        new = starts[1:] - starts[:-1]
        steps = torch.arange(x.max_new, device=lengths.device)
        last = (new - 1).clamp(min=0)[:, None]
        within = torch.minimum(steps[None], last)
        # Missing tokens of an item repeat its last one; what they compute is not picked up below.
        self._take = (starts[:-1, None] + within).clamp(max=len(x.write) - 1).flatten()
        limits = (lengths - new)[:, None] + within
        self._mask = visible(limits.clamp(min=0), x.max_length, group, dtype)
        rows = x.rows.long()
        tokens = torch.arange(len(rows), device=rows.device)
        self._put = rows * x.max_new + (tokens - starts[rows]).clamp(0, x.max_new - 1)
        pages = -(-x.max_length // page_size)
        self._pages = x.tables[:, :pages].long()
        self._shape = (len(lengths), x.max_new)
        self._length = x.max_length

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        items, most = self._shape
        heads, dim = q.shape[1:]
        k, v = (
            pool[self._pages].flatten(1, 2)[:, : self._length].transpose(1, 2)
            for pool in (keys, values)
        )
        padded = q[self._take].view(items, most, heads, dim)
        out = grouped_attention(padded, k, v, self._mask, scale)
        return out.view(items * most, heads * dim)[self._put]


def _varlen(q: Tensor, keys: Tensor, values: Tensor, x: PagedInputs, scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(
        q.contiguous(),
        keys,
        values,
        x.starts,
        None,
        x.max_new,
        x.max_length,
        scale=scale,
        window_size=(-1, 0),
        enable_gqa=True,
        seqused_k=x.lengths,
        block_table=x.tables,
    )
    assert isinstance(out, Tensor)
    return out.flatten(1)


def pick_attention(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The first way of :data:`ATTENTIONS` that this machine can run."""
    if device.type != "cuda":
        return "gather"
    import importlib.util

    tiles = head_dim >= 16 and head_dim & (head_dim - 1) == 0
    if tiles and importlib.util.find_spec("triton") is not None:
        return "triton"
    return "varlen" if varlen_works(device, dtype) else "gather"


def varlen_works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's variable-length attention takes a block table here, by asking it once."""
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: F401
    except ImportError:
        return False
    pages = torch.zeros((2, PAGE_SIZE, 1, 64), dtype=dtype, device=device)
    one = torch.tensor([1], dtype=torch.int32, device=device)
    inputs = PagedInputs(
        write=one.long(),
        starts=torch.tensor([0, 1], dtype=torch.int32, device=device),
        lengths=one,
        tables=one[None],
        rows=one - 1,
        max_new=1,
        max_length=PAGE_SIZE,
    )
    try:
        _varlen(pages[0, :1], pages, pages, inputs, 1.0)
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        # An older torch knows no block_table; a newer one without FlashAttention-3 refuses it.
        return False
    return True
