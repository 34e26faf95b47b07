"""Caches of sessions that ended or lost their link, kept for sessions that share their prefix."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from wispprof.sessions.pending_drafts import common_prefix

MIN_REUSE_TOKENS = 8
"""Shorter prefixes are not worth an engine call."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """The first ``length`` tokens that ``session`` caches; ``whole``: it caches no more than these."""

    session: str
    length: int
    whole: bool


class PrefixCache:
    """Ended sessions whose KV stays for sessions that share their prefix: the next turn of a chat, a
    resumed generation, a common system prompt. Only sessions of the same ``owner`` (API key) share one:
    otherwise the time to the first token would tell one user what another has asked. Least recently used
    first; methods return the sessions that the caller must close."""

    def __init__(self, max_sessions: int, ttl_ms: float) -> None:
        self._max_sessions = max_sessions
        self._ttl_ms = ttl_ms
        self._entries: OrderedDict[str, tuple[str, list[int], float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def tokens(self) -> int:
        """Cached tokens in all."""
        return sum(self.lengths().values())

    def lengths(self) -> dict[str, int]:
        """Cached tokens by session."""
        return {name: len(tokens) for name, (_, tokens, _) in self._entries.items()}

    def insert(self, session: str, owner: str, tokens: list[int], now_ms: float) -> list[str]:
        """Add a session that caches exactly ``tokens``; returns the sessions to close instead."""
        if len(tokens) < MIN_REUSE_TOKENS or self._max_sessions < 1:
            return [session]
        evicted = [
            name
            for name, (its_owner, held, _) in self._entries.items()
            if its_owner == owner and tokens[: len(held)] == held
        ]
        for name in evicted:
            del self._entries[name]
        self._entries[session] = (owner, tokens, now_ms + self._ttl_ms)
        while len(self._entries) > self._max_sessions:
            evicted.append(self._entries.popitem(last=False)[0])
        return evicted

    def find(self, owner: str, tokens: Sequence[int]) -> Prefix | None:
        """The longest cached prefix of ``tokens`` that leaves at least one token to prefill."""
        wanted = list(tokens[:-1])
        best: Prefix | None = None
        for name, (its_owner, held, _) in self._entries.items():
            if its_owner != owner:
                continue
            length = common_prefix(held, wanted)
            if length >= MIN_REUSE_TOKENS and (best is None or length > best.length):
                best = Prefix(name, length, length == len(held))
        if best is not None:
            self._entries.move_to_end(best.session)
        return best

    def remove(self, session: str) -> None:
        del self._entries[session]

    def pop_oldest(self) -> str | None:
        """Remove the least recently used session."""
        return self._entries.popitem(last=False)[0] if self._entries else None

    def pop_expired(self, now_ms: float) -> list[str]:
        """Remove all sessions past their time to live."""
        expired = [name for name, (*_, until_ms) in self._entries.items() if now_ms >= until_ms]
        for name in expired:
            del self._entries[name]
        return expired
