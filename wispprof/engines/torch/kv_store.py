"""What the engine asks of a KV store, and the attention that all stores share.

A store knows handles and lengths, not sessions and tokens. ``plan`` arranges a step once; ``attend`` then
runs in every layer with what was planned.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from wispprof.engines.torch.draft_tree import NO_TREES, Trees
from wispprof.errors import EngineError

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q (T, heads, d), k (T, kv_heads, d), v (T, kv_heads, d)) → (T, heads · d). Writes k and v of the
step's T packed tokens behind the cached tokens of each input, then attends: causally, or as a draft tree
tells."""


@dataclass(frozen=True, slots=True)
class KvGeometry:
    """Sizes of a model's KV cache, on one rank."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_context: int


class KvPlan(Protocol):
    """An arranged step. ``order``: input numbers in the order in which their tokens must be packed."""

    order: np.ndarray

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See :data:`Attend`."""


class KvStore(ABC):
    """Keys and values of up to ``max_sessions`` handles and ``kv_tokens`` tokens in all.

    Any handles within both limits fit: the store must cope with fragmentation. ``attention``: the name of
    what attends.
    """

    attention: str

    @abstractmethod
    def add(self) -> int:
        """A new, empty handle."""

    @abstractmethod
    def remove(self, handle: int) -> None:
        """Free all that a handle holds."""

    @abstractmethod
    def allocate(self, handles: np.ndarray, cached: np.ndarray, lengths: np.ndarray) -> None:
        """Reserve memory for ``lengths`` tokens per handle, keeping the first ``cached``.

        Raises :class:`~wispprof.errors.OutOfKvMemory` before anything changes.
        """

    @abstractmethod
    def plan(
        self, handles: np.ndarray, cached: np.ndarray, new: np.ndarray, trees: Trees = NO_TREES
    ) -> KvPlan:
        """Arrange a step that adds ``new`` tokens to ``cached`` ones, after :meth:`allocate`.

        ``trees``: by number of the input; the last of its new tokens are the nodes.
        """

    @abstractmethod
    def move(self, handles: np.ndarray, sources: np.ndarray, targets: np.ndarray) -> None:
        """Copy the KV of tokens ``sources`` (n,) to the places ``targets`` of the same handles (n,).

        Everything is read before anything is written. Targets lie where :meth:`allocate` has unshared.
        """

    @abstractmethod
    def fork(self, source: int, length: int, private: bool = False) -> int:
        """A new handle with the first ``length`` tokens of ``source``; ``private``: copied at once."""

    @abstractmethod
    def truncate(self, handle: int, length: int) -> None:
        """Drop all but the first ``length`` tokens."""

    @abstractmethod
    def clear(self, handle: int, start: int, stop: int) -> None:
        """Set the values of tokens ``start:stop`` to 0, within what :meth:`allocate` reserved.

        Values that are not finite must not stay behind: masked, they would still spoil the sum of whoever
        gets their memory.
        """

    @abstractmethod
    def read(self, handle: int, length: int) -> Tensor:
        """A copy of cached keys and values, (layers, 2, kv_heads, length, d)."""

    @abstractmethod
    def check(self, lengths: dict[int, int]) -> None:
        """Raise :class:`~wispprof.errors.EngineError` if the bookkeeping contradicts itself."""


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention of padded inputs, without repeating KV heads.

    ``q`` (B, N, heads, d), ``k`` and ``v`` (B, kv_heads, L, d), possibly strided; ``mask`` additive
    (B or 1, 1, N·g, L) with the g query heads of a KV head innermost, or ``None`` if everything is visible.
    Returns (B, N, heads · d). The query heads that share a KV head are rows of one matrix, so keys and
    values are read once for all of them.
    """
    batch, new, heads, dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    if new == 1:
        folded = q.reshape(batch, kv_heads, group, dim)
    else:
        folded = q.view(batch, new, kv_heads, group, dim).transpose(1, 2)
        folded = folded.reshape(batch, kv_heads, new * group, dim)
    out = F.scaled_dot_product_attention(folded, k, v, attn_mask=mask, scale=scale)
    if new == 1:
        return out.reshape(batch, 1, heads * dim)
    out = out.view(batch, kv_heads, new, group, dim).transpose(1, 2)
    return out.reshape(batch, new, heads * dim)


def one_token_attention(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """As :func:`grouped_attention` for inputs of one token each, in plain batched products.

    ``q`` (B, heads, d); ``keys`` and ``values`` (B·kv_heads, L, d), possibly strided; ``mask`` additive
    (B·kv_heads, g, L). Returns (B, heads · d). Such steps are bound by reading KV, which the products do
    faster than the fused kernel.
    """
    tokens, heads, dim = q.shape
    rows, keys = q.reshape(len(keys), -1, dim), keys.transpose(1, 2)
    if mask is None:
        scores = torch.baddbmm(rows[:1, :1, :1], rows, keys, beta=0, alpha=scale)
    else:
        scores = torch.baddbmm(mask, rows, keys, alpha=scale)
    return torch.bmm(scores.softmax(-1), values).view(tokens, heads * dim)


def causal(last: Tensor, length: int) -> Tensor:
    """What tokens see, (B, N, length) bool: places up to their ``last`` (B, N)."""
    return torch.arange(length, device=last.device) <= last[:, :, None]


def causal_mask(last: Tensor, length: int, group: int, dtype: torch.dtype) -> Tensor:
    """Additive mask (B, 1, N·group, length): a token sees places up to its ``last`` (B, N)."""
    return additive_mask(causal(last, length), group, dtype)


def additive_mask(seen: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """``seen`` (B, N, L) as a mask (B, 1, N·group, L) to add to scores."""
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    mask.masked_fill_(~seen, -torch.inf)
    batch, new, length = mask.shape
    if group > 1:
        mask = mask[:, :, None].expand(batch, new, group, length)
    return mask.reshape(batch, 1, new * group, length)


def kv_layout(backend: str, device: torch.device) -> str:
    """``dense`` or ``paged``; ``auto``: paged on CUDA, dense elsewhere."""
    if backend == "auto":
        return "paged" if device.type == "cuda" else "dense"
    if backend not in ("dense", "paged"):
        raise EngineError(f"Unknown KV backend {backend!r}.", "Use auto, dense or paged.")
    return backend
