# mypy: disable-error-code="import-not-found,import-untyped,untyped-decorator,no-untyped-call,no-untyped-def"
"""Paged attention for few query rows over long caches, as two Triton kernels (flash-decoding).

The first kernel reads each block once for all query heads that share its KV head, and splits the keys so that
few sessions still fill the device; the second merges the splits. Sizes that vary from step to step are read
from tensors, so the launch of a captured graph holds for any step of its bucket.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from wispprof.engines.torch.paged_kv import AttentionMetadata

_KEY_TILE = 64
_MAX_QUERY_TILE = 64


def num_splits(tokens: int, kv_heads: int, processors: int, max_seq_len: int) -> int:
    """Splits of the keys, a power of two: enough programs to fill the device about four times."""
    inputs = max(1, tokens // 4)
    wanted = -(-4 * processors // (inputs * kv_heads))
    return int(min(16, triton.next_power_of_2(max(1, min(wanted, -(-max_seq_len // 256))))))


def paged_attention(q: Tensor, keys: Tensor, values: Tensor, x: AttentionMetadata, scale: float) -> Tensor:
    """Attention of packed queries over paged keys and values, causal but for nodes of draft trees.

    ``q`` (T, heads, d); ``keys`` and ``values`` (blocks, block_size, kv_heads, d), d a power of two, at
    least 16. Returns (T, heads · d). Every packed token must belong to an input of ``x``.
    """
    tokens, heads, dim = q.shape
    block_size, kv_heads = keys.shape[1], keys.shape[2]
    group = heads // kv_heads
    splits = num_splits(tokens, kv_heads, _processors(q.device), x.max_seq_len)
    rows = x.max_query_len * group
    query_tile = max(16, min(_MAX_QUERY_TILE, triton.next_power_of_2(rows)))
    query_tiles = -(-rows // query_tile)
    partial = torch.empty((tokens, heads, splits, dim), dtype=torch.float32, device=q.device)
    stats = torch.empty((tokens, heads, splits, 2), dtype=torch.float32, device=q.device)
    out = torch.empty((tokens, heads * dim), dtype=q.dtype, device=q.device)
    trees = x.tree_starts is not None
    _split_kv_kernel[(len(x.seq_lens), kv_heads, query_tiles * splits)](
        q, keys, values, x.query_start_loc, x.seq_lens, x.block_tables,
        x.tree_starts if trees else x.seq_lens, x.ancestors if trees else x.slot_mapping, partial, stats,
        scale, q.stride(0), q.stride(1), keys.stride(0), keys.stride(1), keys.stride(2),
        x.block_tables.stride(0), heads,
        GROUP=group, DIM=dim, BLOCK_SIZE=block_size, QUERY_TILE=query_tile, KEY_TILE=_KEY_TILE,
        SPLITS=splits, TREES=trees, num_warps=num_warps(query_tile),
    )  # fmt: skip
    _merge_splits_kernel[(tokens, heads)](partial, stats, out, heads, DIM=dim, SPLITS=splits)
    return out


def num_warps(query_tile: int) -> int:
    """Warps of a program: a tile of 64 rows over four would need more registers than there are."""
    return 8 if query_tile > 32 else 4


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


# Triton reads a kernel's annotations: only its own may stand there.
@triton.jit
def _split_kv_kernel(
    q, keys, values, query_start_loc, seq_lens, block_tables, tree_starts, ancestors, partial, stats,
    scale, q_token, q_head, kv_block, kv_slot, kv_head,
    table_row, heads,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, QUERY_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr, SPLITS: tl.constexpr, TREES: tl.constexpr,
):  # fmt: skip
    """Unnormalized outputs, maxima and sums of one input, KV head, query tile and split of the keys."""
    item = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2) % SPLITS
    tile = tl.program_id(2) // SPLITS
    start = tl.load(query_start_loc + item)
    new = tl.load(query_start_loc + item + 1) - start
    if tile * QUERY_TILE >= new * GROUP:
        return
    length = tl.load(seq_lens + item)
    # Rows are (token, query head of the group), the head innermost.
    row = tile * QUERY_TILE + tl.arange(0, QUERY_TILE)
    token = row // GROUP
    q_heads = head * GROUP + row % GROUP
    valid = token < new
    dims = tl.arange(0, DIM)
    q_at = (start + token).to(tl.int64)[:, None] * q_token + q_heads[:, None] * q_head + dims[None, :]
    query = tl.load(q + q_at, mask=valid[:, None], other=0.0)
    last_seen = length - new + token
    if TREES:
        tree_start = tl.load(tree_starts + item)
        seen_nodes = tl.load(ancestors + start + token, mask=valid, other=0)
    share = tl.cdiv(tl.cdiv(length, SPLITS), KEY_TILE) * KEY_TILE
    low = split * share
    high = tl.minimum(length, low + share)
    row_max = tl.full([QUERY_TILE], float("-inf"), tl.float32)
    row_sum = tl.zeros([QUERY_TILE], tl.float32)
    acc = tl.zeros([QUERY_TILE, DIM], tl.float32)
    for at in range(low, high, KEY_TILE):
        position = at + tl.arange(0, KEY_TILE)
        inside = position < high
        block = tl.load(block_tables + item * table_row + position // BLOCK_SIZE, mask=inside, other=0)
        base = block.to(tl.int64) * kv_block + (position % BLOCK_SIZE) * kv_slot + head * kv_head
        kv_at = base[:, None] + dims[None, :]
        k = tl.load(keys + kv_at, mask=inside[:, None], other=0.0)
        scores = tl.dot(query, tl.trans(k), input_precision="ieee") * scale
        seen = inside[None, :] & (position[None, :] <= last_seen[:, None])
        if TREES:
            node = position - tree_start
            bit = (seen_nodes[:, None] >> (node & 63)[None, :]) & 1
            seen = seen & ((node < 0)[None, :] | (bit != 0))
        scores = tl.where(seen, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp(scores - safe_max[:, None])
        decay = tl.exp(row_max - safe_max)
        row_sum = row_sum * decay + tl.sum(weights, 1)
        v = tl.load(values + kv_at, mask=inside[:, None], other=0.0)
        acc = acc * decay[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        row_max = new_max
    cell = ((start + token).to(tl.int64) * heads + q_heads) * SPLITS + split
    tl.store(partial + cell[:, None] * DIM + dims[None, :], acc, mask=valid[:, None])
    tl.store(stats + cell * 2, row_max, mask=valid)
    tl.store(stats + cell * 2 + 1, row_sum, mask=valid)


@triton.jit
def _merge_splits_kernel(partial, stats, out, heads, DIM: tl.constexpr, SPLITS: tl.constexpr):
    """The normalized output of one token and query head."""
    cell = tl.program_id(0).to(tl.int64) * heads + tl.program_id(1)
    split = tl.arange(0, SPLITS)
    dims = tl.arange(0, DIM)
    split_max = tl.load(stats + (cell * SPLITS + split) * 2)
    split_sum = tl.load(stats + (cell * SPLITS + split) * 2 + 1)
    # Every row sees position 0, so the maximum of at least one split is finite.
    share = tl.exp(split_max - tl.max(split_max, 0))
    acc = tl.load(partial + (cell * SPLITS + split)[:, None] * DIM + dims[None, :])
    result = tl.sum(acc * share[:, None], 0) / tl.sum(split_sum * share, 0)
    tl.store(out + cell * DIM + dims, result.to(out.dtype.element_ty))
