"""Block tables of a paged KV cache: reference counts, copy on write. No torch.

A block holds the KV of ``block_size`` consecutive tokens of one session, or of several that were forked from
each other: a fork shares blocks, and a shared block is copied before one of its sessions writes into it.
The null block belongs to no session; padding tokens write there.
"""

from __future__ import annotations

import numpy as np

from wispprof.errors import EngineError, OutOfKvMemory

NULL_BLOCK = 0
NULL_SLOT = 0
"""First slot of the null block. A slot is the place of one token: block * block_size + offset."""


class BlockTables:
    """Block tables of up to ``handles`` handles over ``blocks`` blocks besides the null block."""

    def __init__(self, blocks: int, block_size: int, max_context: int, handles: int) -> None:
        self.block_size = block_size
        self.width = -(-max_context // block_size)
        self.table = np.full((handles, self.width), NULL_BLOCK, dtype=np.int32)
        self.count = np.zeros(handles, dtype=np.int64)
        self._references = np.zeros(blocks + 1, dtype=np.int64)
        self._free = list(range(blocks, 0, -1))
        self._free_handles = list(range(handles - 1, -1, -1))
        self._used_handles: set[int] = set()

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    def add(self) -> int:
        """A new handle without blocks."""
        if not self._free_handles:
            raise OutOfKvMemory("All block tables are taken.", "Start with more --max-sessions.")
        handle = self._free_handles.pop()
        self._used_handles.add(handle)
        return handle

    def remove(self, handle: int) -> None:
        self.truncate(handle, 0)
        self._used_handles.discard(handle)
        self._free_handles.append(handle)

    def allocate(self, handles: np.ndarray, cached: np.ndarray, lengths: np.ndarray) -> list[tuple[int, int]]:
        """Give each handle blocks for ``lengths`` tokens, unshared from token ``cached`` on.

        Returns block copies to make, (from, to). Raises :class:`OutOfKvMemory` before anything changes.
        """
        size = self.block_size
        blocks = -(-lengths // size)
        grow = np.flatnonzero(blocks > self.count[handles])
        shared = [
            (int(handles[i]), index)
            for i in range(len(handles))
            for index in range(int(cached[i]) // size, min(int(blocks[i]), int(self.count[handles[i]])))
            if self._references[self.table[handles[i], index]] > 1
        ]
        needed = int((blocks[grow] - self.count[handles[grow]]).sum()) + len(shared)
        if needed > len(self._free):
            raise OutOfKvMemory(
                f"{needed} KV blocks are needed and {len(self._free)} are free.",
                "Close sessions, or start with more --kv-tokens.",
            )
        copies = []
        for handle, index in shared:
            old = int(self.table[handle, index])
            if self._references[old] > 1:  # an earlier copy may have left one session only
                new = self._take()
                self._references[old] -= 1
                self.table[handle, index] = new
                copies.append((old, new))
        for i in grow:
            handle = int(handles[i])
            for index in range(int(self.count[handle]), int(blocks[i])):
                self.table[handle, index] = self._take()
            self.count[handle] = blocks[i]
        return copies

    def fork(self, source: int, length: int) -> int:
        """A new handle that shares the blocks of the first ``length`` tokens."""
        handle = self.add()
        blocks = -(-length // self.block_size)
        self.table[handle, :blocks] = self.table[source, :blocks]
        self.count[handle] = blocks
        self._references[self.table[source, :blocks]] += 1
        return handle

    def truncate(self, handle: int, length: int) -> None:
        """Free the blocks beyond the first ``length`` tokens."""
        keep = -(-length // self.block_size)
        have = int(self.count[handle])
        if keep >= have:
            return
        for block in self.table[handle, keep:have].tolist():
            self._references[block] -= 1
            if not self._references[block]:
                self._free.append(block)
        self.table[handle, keep:have] = NULL_BLOCK
        self.count[handle] = keep

    def slots(self, handles: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Slots of tokens given as (handle, position) pairs."""
        blocks = self.table[handles, positions // self.block_size].astype(np.int64)
        return np.asarray(blocks * self.block_size + positions % self.block_size)

    def check(self, lengths: dict[int, int]) -> None:
        """Raise :class:`EngineError` if references, free blocks and tables contradict each other."""
        found = np.zeros_like(self._references)
        for handle in self._used_handles:
            used, rest = np.split(self.table[handle], [self.count[handle]])
            np.add.at(found, used, 1)
            if (used == NULL_BLOCK).any() or (rest != NULL_BLOCK).any():
                raise EngineError(f"The block table of handle {handle} has holes.")
            if lengths.get(handle, 0) > self.count[handle] * self.block_size:
                raise EngineError(f"Handle {handle} is longer than its blocks.")
        if (found != self._references).any():
            raise EngineError("The reference counts of KV blocks are wrong.")
        if sorted(self._free) != (np.flatnonzero(found[1:] == 0) + 1).tolist():
            raise EngineError("KV blocks leaked, or are free and used at once.")
        if set(lengths) != self._used_handles:
            raise EngineError("Block tables and sessions do not correspond.")

    def _take(self) -> int:
        block = self._free.pop()
        self._references[block] = 1
        return block
