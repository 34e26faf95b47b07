"""Rows of equal capacity for the dense KV store."""

from __future__ import annotations

import torch
from torch import Tensor

from wispprof.engines.torch.kv_store import KvGeometry


class KvPool:
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
