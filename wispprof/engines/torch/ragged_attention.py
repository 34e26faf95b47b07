"""Attention of small inputs in C, each at its own length; compiled on first use.

torch's attention pads the inputs of a step to the longest context and to the most drafts.
``ragged_attention.c`` does not, and multiplies small matrices faster. gcc (``$CC`` or ``cc``) builds it in
about a second (:mod:`~wispprof.engines.torch.native_library`). Without gcc, and for dtypes and head sizes
that the kernel does not support, the store attends with torch.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from wispprof.engines.torch.draft_tree import DraftTree
from wispprof.engines.torch.native_library import NotBuilt, load
from wispprof.errors import EngineError

_SOURCE = Path(__file__).with_suffix(".c")
HEAD_DIM_STEP = 64
"""Head sizes must be multiples of this."""
_log = logging.getLogger(__name__)


class _Strides(ctypes.Structure):
    _fields_ = (("token", ctypes.c_int64), ("head", ctypes.c_int64))


class Kernel(NamedTuple):
    """The compiled ``function``, or ``None`` and why it is ``missing``."""

    function: Any
    missing: str = ""


@functools.cache
def kernel() -> Kernel:
    """The kernel of this process; ``WISPPROF_NATIVE=0`` forbids it."""
    if os.environ.get("WISPPROF_NATIVE") == "0":
        return Kernel(None, "WISPPROF_NATIVE=0")
    try:
        function = load(_SOURCE).wispprof_attend
    except NotBuilt as err:
        _log.info("torch attends, because attention in C was not built: %s", err)
        return Kernel(None, str(err))
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    packed = (pointer, _Strides)
    inputs = (size, *(pointer,) * 7)
    function.argtypes = (*packed * 3, pointer, size, size, size, ctypes.c_float, *inputs, size, ctypes.c_int)
    function.restype = ctypes.c_int
    return Kernel(function)


def supports(dtype: torch.dtype, device: torch.device, head_dim: int) -> bool:
    """Whether the kernel can attend for such a store, here."""
    return bool(
        device.type == "cpu"
        and dtype == torch.float32
        and head_dim % HEAD_DIM_STEP == 0
        and kernel().function is not None
    )


class RaggedInputs(NamedTuple):
    """Inputs attended by the kernel: packed tokens up to ``stop``.

    ``columns`` (4, n): first packed token, new tokens, cached tokens and capacity of each input's row.
    ``rows`` (2 · layers, n): addresses of each input's keys, then values, of each layer. ``sees`` (n,):
    address of each tree's visibility, 0 for a chain. ``longest``: most tokens of an input. ``memory``: what
    the addresses point into.
    """

    stop: int
    columns: np.ndarray
    rows: np.ndarray
    sees: np.ndarray
    memory: Sequence[Tensor | np.ndarray]
    longest: int
    scale: float

    @classmethod
    def of(
        cls,
        new: np.ndarray,
        cached: np.ndarray,
        capacity: np.ndarray,
        rows: np.ndarray,
        pools: Sequence[Tensor],
        trees: dict[int, DraftTree],
        scale: float,
    ) -> Self:
        """Inputs packed one after another from token 0 on, in rows of the ``pools``; ``trees``: by number of
        the input. Raises :class:`EngineError` if an input does not fit into its row."""
        if (new + cached > capacity).any():
            raise EngineError("A step would write beyond the rows of its sessions.", "Report a defect.")
        sees = np.zeros(len(new), np.int64)
        visible = [_visible(tree, int(new[number])) for number, tree in trees.items()]
        for number, seen in zip(trees, visible, strict=True):
            sees[number] = seen.ctypes.data
        columns = np.stack((np.cumsum(new) - new, new, cached, capacity)).astype(np.int64)
        return cls(
            int(new.sum()),
            columns,
            np.ascontiguousarray(rows, np.int64),
            sees,
            (*pools, *visible),
            int((new + cached).max()),
            scale,
        )

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As :data:`~wispprof.engines.torch.kv_store.Attend`, for the tokens of these inputs.

        Raises :class:`MemoryError`.
        """
        tokens, heads, dim = q.shape
        q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
        out = q.new_empty((tokens, heads * dim))
        packed: list[Any] = []
        for x in (q, k, v):
            packed += (x.data_ptr(), _Strides(x.stride(0), x.stride(1)))
        failed = kernel().function(
            *packed,
            out.data_ptr(),
            heads,
            k.shape[1],
            dim,
            self.scale,
            len(self.sees),
            *(column.ctypes.data for column in self.columns),
            self.rows[2 * layer].ctypes.data,
            self.rows[2 * layer + 1].ctypes.data,
            self.sees.ctypes.data,
            self.longest,
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError(f"No memory for the scores of {self.longest} tokens.")
        return out


def _visible(tree: DraftTree, new: int) -> np.ndarray:
    """(new, new) bytes: which of an input's new tokens each of them sees; the last ones are the nodes."""
    seen = np.tri(new, dtype=np.uint8)
    root = new - len(tree.parents)
    nodes, others = tree.hidden()
    seen[root + np.asarray(nodes), root + np.asarray(others)] = 0
    return seen
