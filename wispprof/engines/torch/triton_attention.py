# mypy: disable-error-code="import-not-found,import-untyped,untyped-decorator,no-untyped-call,no-untyped-def"
"""Paged attention for few query rows over long caches, as two Triton kernels (flash-decoding).

The first reads each page once for all query heads that share its KV head, split over stretches of the
keys so that few sessions still fill the device; the second joins the stretches. Sizes that vary from step to
step are read from tensors, so the launch of a captured graph holds for any step of its bucket.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from wispprof.engines.torch.paged_kv import PagedInputs

__all__ = ["paged_attention", "splits_for"]

_KEYS = 64
_MAX_ROWS = 64


def splits_for(tokens: int, kv_heads: int, processors: int, max_length: int) -> int:
    """Stretches per session, a power of two: enough programs to fill the device about four times."""
    items = max(1, tokens // 4)
    wanted = -(-4 * processors // (items * kv_heads))
    return int(min(16, triton.next_power_of_2(max(1, min(wanted, -(-max_length // 256))))))


def paged_attention(
    q: Tensor, keys: Tensor, values: Tensor, x: PagedInputs, scale: float
) -> Tensor:
    """Causal attention of packed queries over paged keys and values.

    ``q`` (T, heads, d); ``keys`` and ``values`` (pages, page_size, kv_heads, d), d a power of two, 16 or
    more. Returns (T, heads · d). Every packed token must belong to an item of ``x``.
    """
    tokens, heads, dim = q.shape
    page_size, kv_heads = keys.shape[1], keys.shape[2]
    group = heads // kv_heads
    items = len(x.lengths)
    processors = _processors(q.device)
    splits = splits_for(tokens, kv_heads, processors, x.max_length)
    rows = max(16, min(_MAX_ROWS, triton.next_power_of_2(x.max_new * group)))
    blocks = -(-x.max_new * group // rows)
    partial = torch.empty((tokens, heads, splits, dim), dtype=torch.float32, device=q.device)
    stats = torch.empty((tokens, heads, splits, 2), dtype=torch.float32, device=q.device)
    out = torch.empty((tokens, heads * dim), dtype=q.dtype, device=q.device)
    _stretch[(items, kv_heads, blocks * splits)](
        q, keys, values, x.starts, x.lengths, x.tables, partial, stats,
        scale, q.stride(0), q.stride(1), keys.stride(0), keys.stride(1), keys.stride(2),
        x.tables.stride(0), heads,
        GROUP=group, DIM=dim, PAGE=page_size, ROWS=rows, KEYS=_KEYS, SPLITS=splits,
    )  # fmt: skip
    _join[(tokens, heads)](partial, stats, out, heads, DIM=dim, SPLITS=splits)
    return out


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


# Triton reads a kernel's annotations: only its own may stand there.
@triton.jit
def _stretch(
    q, keys, values, starts, lengths, tables, partial, stats,
    scale, q_token, q_head, kv_page, kv_slot, kv_head,
    table_row, heads,
    GROUP: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2) % SPLITS
    block = tl.program_id(2) // SPLITS
    start = tl.load(starts + item)
    new = tl.load(starts + item + 1) - start
    if block * ROWS >= new * GROUP:
        return
    length = tl.load(lengths + item)
    # Rows are (token, query head of the group), the head innermost.
    row = block * ROWS + tl.arange(0, ROWS)
    token = row // GROUP
    q_heads = head * GROUP + row % GROUP
    valid = token < new
    dims = tl.arange(0, DIM)
    q_at = (
        (start + token).to(tl.int64)[:, None] * q_token + q_heads[:, None] * q_head + dims[None, :]
    )
    query = tl.load(q + q_at, mask=valid[:, None], other=0.0)
    limit = length - new + token
    share = tl.cdiv(tl.cdiv(length, SPLITS), KEYS) * KEYS
    low = split * share
    high = tl.minimum(length, low + share)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    for at in range(low, high, KEYS):
        position = at + tl.arange(0, KEYS)
        inside = position < high
        page = tl.load(tables + item * table_row + position // PAGE, mask=inside, other=0)
        base = page.to(tl.int64) * kv_page + (position % PAGE) * kv_slot + head * kv_head
        where = base[:, None] + dims[None, :]
        k = tl.load(keys + where, mask=inside[:, None], other=0.0)
        scores = tl.dot(query, tl.trans(k), input_precision="ieee") * scale
        seen = inside[None, :] & (position[None, :] <= limit[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp(scores - safe[:, None])
        decay = tl.exp(top - safe)
        total = total * decay + tl.sum(weights, 1)
        v = tl.load(values + where, mask=inside[:, None], other=0.0)
        acc = acc * decay[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        top = higher
    cell = ((start + token).to(tl.int64) * heads + q_heads) * SPLITS + split
    tl.store(partial + cell[:, None] * DIM + dims[None, :], acc, mask=valid[:, None])
    tl.store(stats + cell * 2, top, mask=valid)
    tl.store(stats + cell * 2 + 1, total, mask=valid)


@triton.jit
def _join(partial, stats, out, heads, DIM: tl.constexpr, SPLITS: tl.constexpr):
    cell = tl.program_id(0).to(tl.int64) * heads + tl.program_id(1)
    split = tl.arange(0, SPLITS)
    dims = tl.arange(0, DIM)
    top = tl.load(stats + (cell * SPLITS + split) * 2)
    total = tl.load(stats + (cell * SPLITS + split) * 2 + 1)
    # Position 0 is visible to every row, so one stretch at least has a finite top.
    share = tl.exp(top - tl.max(top, 0))
    acc = tl.load(partial + (cell * SPLITS + split)[:, None] * DIM + dims[None, :])
    result = tl.sum(acc * share[:, None], 0) / tl.sum(total * share, 0)
    tl.store(out + cell * DIM + dims, result.to(out.dtype.element_ty))
