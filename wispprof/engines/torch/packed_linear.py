"""Linear layers whose weights are packed beforehand for oneDNN, where that is faster.

On a CPU, torch's float32 product of two or more rows packs the weight anew in every call. For the few rows
of a verify step that costs as much as the product itself. oneDNN also multiplies with a packed copy, as
torch's compiler uses it. A single row is a matrix-vector product, which needs no packing: it is faster with
the plain weight if that is in the processor's cache, and with the packed one if it comes from memory.

oneDNN compiles a kernel for every number of rows, which takes 1 to 2 ms and half a megabyte, and caches 1,024
of them. Steps with prompts have any number of rows, so :func:`pad_rows` rounds them up to a few numbers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_PACKED_BYTES = 2 << 30
"""Models with more weights than this are served without a second, packed copy."""

MAX_CACHED_BYTES = 16 << 20
"""Up to so many weights are assumed to stay in the processor's cache from step to step."""


def rows_to_pack(model: Any) -> int:
    """Fewest rows that a model's packed weights are used for; 0: it is too large for a second copy."""
    size: int = sum(p.nbytes for p in model.parameters())
    if size > MAX_PACKED_BYTES:
        return 0
    return 1 if size > MAX_CACHED_BYTES else 2


def can_pack(weight: Tensor) -> bool:
    """Whether a packed copy of this weight can be made, and would be used."""
    return bool(
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


def pad_rows(rows: int) -> int:
    """``rows`` up to 64; above, rounded up to a multiple of 8, and of 32 from 257 on."""
    if rows <= 64:
        return rows
    step = 8 if rows <= 256 else 32
    return -(-rows // step) * step


WARM_ROWS = sorted({pad_rows(rows) for rows in range(1, 129)})
"""Numbers of rows whose kernels are compiled before serving: those of decode steps."""

if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    # Looked up once: an operator's overload costs less to call than the packet that resolves it.
    _linear: Any = torch.ops.mkldnn._linear_pointwise.default
    _linear_binary: Any = torch.ops.mkldnn._linear_pointwise.binary


class PackedLinear:
    """``x @ weight.T + bias`` for ``x`` (rows, in), weight (out, in), bias (out,) or None.

    ``fewest``: fewest rows to multiply with a packed copy of the weight, 0: never. No copy is made if
    :func:`can_pack` forbids it.
    """

    __slots__ = ("_bias", "_fewest", "_packed", "_weight")

    def __init__(self, weight: Tensor, bias: Tensor | None = None, fewest: int = 0) -> None:
        self._fewest = fewest
        self._weight = weight.detach()
        self._bias = None if bias is None else bias.detach()
        self._packed: Any = None
        if fewest and can_pack(weight):
            # With an expected number of rows, or oneDNN may choose a layout for one row.
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self._weight, 16)

    def __call__(self, x: Tensor) -> Tensor:
        if self._packed is not None and len(x) >= self._fewest:
            rows = len(x)
            if missing := pad_rows(rows) - rows:
                x = F.pad(x, (0, 0, 0, missing))
            out: Tensor = _linear(x, self._packed, self._bias, "none", [], "")
            return out[:rows] if missing else out
        return F.linear(x, self._weight, self._bias)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """``residual + self(x)``, in one call if the copy is used."""
        rows = len(x)
        if self._packed is not None and rows >= self._fewest and pad_rows(rows) == rows:
            out: Tensor = _linear_binary(x, residual, self._packed, self._bias, "add")
            return out
        return residual + self(x)
