"""Products with the weights of a layer: as torch does them, or from weights laid out beforehand.

A verify step multiplies a handful of rows with every weight of the model. On a CPU, torch's float32 product
of two or more rows lays the weight out anew in every call, which for few rows costs as much as the product:
a step of two tokens took 1.5 times that of one. oneDNN multiplies with a laid-out copy, the way torch's own
compiler does on CPUs. One row alone is a matrix-vector product, which reads the weight as it lies.

oneDNN makes a kernel for every number of rows that it meets, which takes a millisecond or two and keeps half
a megabyte, up to 1,024 of them; beyond that they push each other out and leave their memory in pieces. Steps
with prompts have any number of rows, so these are filled up to one of few (:func:`pad_rows`). Small steps are
not: every row of theirs costs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["PackedLinear", "can_pack", "pad_rows", "should_prepack"]

MOST_BYTES = 2 << 30
"""Models with more weights than this are served without a second copy of them."""


def should_prepack(model: Any) -> bool:
    """Whether a model is small enough that a second copy of its weights is no burden."""
    return sum(p.nbytes for p in model.parameters()) <= MOST_BYTES


def can_pack(weight: Tensor) -> bool:
    """Whether a laid-out copy of this weight can be made, and would be used."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


def pad_rows(rows: int) -> int:
    """``rows`` as they are up to 64, then rounded up to eights, and from 256 on to multiples of 32."""
    if rows <= 64:
        return rows
    step = 8 if rows <= 256 else 32
    return -(-rows // step) * step


class PackedLinear:
    """``x @ weight.T + bias`` for ``x`` (rows, in), weight (out, in), bias (out,) or None.

    ``pack``: keep a second copy of the weight, laid out, where :func:`can_pack` allows it.
    """

    __slots__ = ("_bias", "_packed", "_weight")

    def __init__(self, weight: Tensor, bias: Tensor | None = None, pack: bool = False) -> None:
        self._weight = weight.detach()
        self._bias = None if bias is None else bias.detach()
        self._packed: Any = None
        if pack and can_pack(weight):
            # Told how many rows to expect, or oneDNN may choose a layout for one row.
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self._weight, 16)

    def __call__(self, x: Tensor) -> Tensor:
        if self._packed is not None and len(x) > 1:
            rows = len(x)
            if missing := pad_rows(rows) - rows:
                x = F.pad(x, (0, 0, 0, missing))
            out: Tensor = torch.ops.mkldnn._linear_pointwise(
                x, self._packed, self._bias, "none", [], ""
            )
            return out[:rows] if missing else out
        return F.linear(x, self._weight, self._bias)
