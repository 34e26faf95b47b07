"""Which pages hold which tokens: block tables, reference counts, copy on write. No torch.

A page holds ``page_size`` consecutive tokens of one session, or of several that were forked from each
other: forking shares pages, and a shared page is copied when one of its owners is about to write into it.
Page 0 is nobody's: padding of captured graphs writes there.
"""

from __future__ import annotations

import numpy as np

from wispprof.errors import EngineError, OutOfKvMemory

__all__ = ["NULL_PAGE", "BlockTables"]

NULL_PAGE = 0


class BlockTables:
    """Block tables of up to ``handles`` handles over ``pages`` pages (page 0 not counted)."""

    def __init__(self, pages: int, page_size: int, max_context: int, handles: int) -> None:
        self.page_size = page_size
        self.width = -(-max_context // page_size)
        self.table = np.full((handles, self.width), NULL_PAGE, dtype=np.int32)
        self.count = np.zeros(handles, dtype=np.int64)
        self._references = np.zeros(pages + 1, dtype=np.int64)
        self._free = list(range(pages, 0, -1))
        self._unused = list(range(handles - 1, -1, -1))
        self._live: set[int] = set()

    @property
    def free_pages(self) -> int:
        return len(self._free)

    def add(self) -> int:
        if not self._unused:
            raise OutOfKvMemory("All block tables are taken.", "Start with more --max-sessions.")
        handle = self._unused.pop()
        self._live.add(handle)
        return handle

    def remove(self, handle: int) -> None:
        self.truncate(handle, 0)
        self._live.discard(handle)
        self._unused.append(handle)

    def ensure(
        self, handles: np.ndarray, cached: np.ndarray, lengths: np.ndarray
    ) -> list[tuple[int, int]]:
        """Room for ``lengths`` tokens, pages from ``cached`` on writable and unshared.

        Returns page copies to make, (from, to). Raises :class:`OutOfKvMemory` before anything changed.
        """
        size = self.page_size
        pages = -(-lengths // size)
        grow = np.flatnonzero(pages > self.count[handles])
        shared = [
            (int(handles[i]), slot)
            for i in range(len(handles))
            for slot in range(
                int(cached[i]) // size, min(int(pages[i]), int(self.count[handles[i]]))
            )
            if self._references[self.table[handles[i], slot]] > 1
        ]
        wanted = int((pages[grow] - self.count[handles[grow]]).sum()) + len(shared)
        if wanted > len(self._free):
            raise OutOfKvMemory(
                f"{wanted} KV pages are needed and {len(self._free)} are free.",
                "Close sessions, or start with more --kv-tokens.",
            )
        copies = []
        for handle, slot in shared:
            old = int(self.table[handle, slot])
            if self._references[old] > 1:  # an earlier copy may have left this owner alone
                new = self._take()
                self._references[old] -= 1
                self.table[handle, slot] = new
                copies.append((old, new))
        for i in grow:
            handle = int(handles[i])
            for slot in range(int(self.count[handle]), int(pages[i])):
                self.table[handle, slot] = self._take()
            self.count[handle] = pages[i]
        return copies

    def fork(self, source: int, length: int) -> int:
        """A new handle that shares the pages of the first ``length`` tokens."""
        handle = self.add()
        pages = -(-length // self.page_size)
        self.table[handle, :pages] = self.table[source, :pages]
        self.count[handle] = pages
        self._references[self.table[source, :pages]] += 1
        return handle

    def truncate(self, handle: int, length: int) -> None:
        """Give back the pages beyond the first ``length`` tokens."""
        keep = -(-length // self.page_size)
        have = int(self.count[handle])
        if keep >= have:
            return
        for page in self.table[handle, keep:have].tolist():
            self._references[page] -= 1
            if not self._references[page]:
                self._free.append(page)
        self.table[handle, keep:have] = NULL_PAGE
        self.count[handle] = keep

    def places(self, handles: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Where tokens lie: page * page_size + offset, for (handle, position) pairs."""
        pages = self.table[handles, positions // self.page_size].astype(np.int64)
        return np.asarray(pages * self.page_size + positions % self.page_size)

    def check(self, lengths: dict[int, int]) -> None:
        """Raise :class:`EngineError` if references, free pages and tables contradict each other."""
        found = np.zeros_like(self._references)
        for handle in self._live:
            used = self.table[handle, : self.count[handle]]
            np.add.at(found, used, 1)
            if (used == NULL_PAGE).any() or (
                self.table[handle, self.count[handle] :] != NULL_PAGE
            ).any():
                raise EngineError(f"The block table of handle {handle} has holes.")
            if lengths.get(handle, 0) > self.count[handle] * self.page_size:
                raise EngineError(f"Handle {handle} is longer than its pages.")
        if (found != self._references).any():
            raise EngineError("References of KV pages are miscounted.")
        free = sorted(self._free)
        if free != np.flatnonzero(found[1:] == 0).__add__(1).tolist():
            raise EngineError("KV pages leaked, or are free and used at once.")
        if set(lengths) != self._live:
            raise EngineError("Block tables without a session, or sessions without one.")

    def _take(self) -> int:
        page = self._free.pop()
        self._references[page] = 1
        return page
