"""Which sessions' caches are on the card, on a server that keeps the others in host memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

__all__ = ["KvOffload"]


class KvOffload:
    """``room`` cache tokens on the card; the least recently used session leaves first.

    Host memory holds a copy of everything, so leaving costs nothing and coming back is one read.
    """

    __slots__ = ("_held", "_room", "_used")

    def __init__(self, room: int) -> None:
        self._room = room
        self._held: OrderedDict[str, int] = OrderedDict()
        self._used = 0

    def take(self, members: Iterable[tuple[str, int, int]]) -> int:
        """A step over (session, cached, new) begins: cache tokens that must be read back for it."""
        missed = 0
        for session, cached, new in members:
            held = self._held.pop(session, None)
            if held is None:
                missed += cached
            else:
                self._used -= held
            self._held[session] = cached + new
            self._used += cached + new
        # Members are the most recently used: they go only where a step alone is more than fits.
        while self._used > self._room:
            self._used -= self._held.popitem(last=False)[1]
        return missed

    def drop(self, session: str) -> None:
        """A session is over."""
        self._used -= self._held.pop(session, 0)

    @property
    def used(self) -> int:
        """Cache tokens on the card, at most ``room``."""
        return self._used
