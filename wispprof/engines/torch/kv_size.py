"""How many KV tokens and sessions fit into the memory that is free after the weights."""

from __future__ import annotations

from typing import NamedTuple

from wispprof.engines.torch.paged_kv import BLOCK_SIZE
from wispprof.errors import OutOfKvMemory

_SHARE_OF_FREE_RAM = 0.25
_MOST_OF_FREE_RAM = 0.5
_SHARE_OF_FREE_VRAM = 0.85
_MAX_CPU_TOKENS = 1 << 18
# Sessions get at most this share of the blocks for their last, part empty block.
_BLOCKS_PER_SESSION = 4


class KvSize(NamedTuple):
    """``kv_tokens`` in all, of up to ``max_sessions`` sessions of up to ``max_context`` tokens."""

    kv_tokens: int
    max_sessions: int
    max_context: int


def ram_kv_size(free_bytes: int, bytes_per_token: int, max_sessions: int, max_context: int) -> KvSize:
    """A share of host memory, or one whole context if half of it is enough for that."""
    usual = min(int(free_bytes * _SHARE_OF_FREE_RAM) // bytes_per_token, _MAX_CPU_TOKENS)
    tokens = max(usual, min(max_context, int(free_bytes * _MOST_OF_FREE_RAM) // bytes_per_token))
    if tokens < 1:
        raise _too_little(free_bytes)
    return KvSize(tokens, max_sessions, min(max_context, tokens))


def vram_kv_size(free_bytes: int, bytes_per_token: int, max_sessions: int, max_context: int) -> KvSize:
    """Blocks in a share of device memory: those of the tokens, one more for each session, the null block."""
    blocks = int(free_bytes * _SHARE_OF_FREE_VRAM) // (bytes_per_token * BLOCK_SIZE) - 1
    sessions = min(max_sessions, max(1, blocks // _BLOCKS_PER_SESSION))
    tokens = (blocks - sessions) * BLOCK_SIZE
    if tokens < 1:
        raise _too_little(free_bytes)
    return KvSize(tokens, sessions, min(max_context, tokens))


def _too_little(free_bytes: int) -> OutOfKvMemory:
    return OutOfKvMemory(
        f"The weights leave {free_bytes / 1e9:.1f} GB free, too little for a KV cache.",
        "Use a smaller model or --dtype bfloat16, or free memory.",
    )
