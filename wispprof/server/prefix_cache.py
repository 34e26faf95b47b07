"""Caches of sessions that ended or lost their link, kept for whoever shares their prefix.

The next turn of a chat, a resumed generation, and a request with the same system prompt all begin with
tokens whose KV the engine still holds.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Prefix", "PrefixCache", "common_prefix"]

MIN_REUSE_TOKENS = 8
"""Shorter prefixes are not worth an engine call."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """``length`` tokens that ``session`` caches; ``whole``: it caches nothing else."""

    session: str
    length: int
    whole: bool


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix; bisection over slice comparisons, which run in C."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low


class PrefixCache:
    """Ended sessions whose KV stays, least recently used first. Knows names and tokens, no engine."""

    def __init__(self, max_sessions: int, ttl_ms: float) -> None:
        self._max_sessions = max_sessions
        self._ttl_ms = ttl_ms
        self._entries: OrderedDict[str, tuple[list[int], float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def tokens(self) -> int:
        """Cache tokens held."""
        return sum(len(tokens) for tokens, _ in self._entries.values())

    def keep(self, session: str, tokens: list[int], now_ms: float) -> list[str]:
        """Keep a session that caches exactly ``tokens``; returns the sessions to close instead."""
        if len(tokens) < MIN_REUSE_TOKENS or self._max_sessions < 1:
            return [session]
        redundant = [
            name
            for name, (held, _) in self._entries.items()
            if len(held) <= len(tokens) and tokens[: len(held)] == held
        ]
        for name in redundant:
            del self._entries[name]
        self._entries[session] = (tokens, now_ms + self._ttl_ms)
        while len(self._entries) > self._max_sessions:
            redundant.append(self._entries.popitem(last=False)[0])
        return redundant

    def find(self, tokens: Sequence[int]) -> Prefix | None:
        """The longest kept prefix of ``tokens``, leaving at least one token to feed."""
        wanted = list(tokens[:-1])
        best: Prefix | None = None
        for name, (held, _) in self._entries.items():
            length = common_prefix(held, wanted)
            if length >= MIN_REUSE_TOKENS and (best is None or length > best.length):
                best = Prefix(name, length, length == len(held))
        if best is not None:
            self._entries.move_to_end(best.session)
        return best

    def lengths(self) -> dict[str, int]:
        """Cached tokens by session."""
        return {name: len(tokens) for name, (tokens, _) in self._entries.items()}

    def forget(self, session: str) -> None:
        del self._entries[session]

    def oldest(self) -> str | None:
        """Take out the least recently used session, to be closed."""
        return self._entries.popitem(last=False)[0] if self._entries else None

    def expired(self, now_ms: float) -> list[str]:
        """Take out all sessions past their time to live, to be closed."""
        gone = [name for name, (_, until) in self._entries.items() if now_ms >= until]
        for name in gone:
            del self._entries[name]
        return gone
