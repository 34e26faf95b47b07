"""Sessions and drafts by the kind of their device: the name that an edge gives at hello, else ``api``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from wispprof.server.session import ServerSession
from wispprof.sessions.pending_drafts import DraftCounters

MAX_KINDS = 16
"""Most kinds that are named. Clients choose them, so there is a limit."""

OTHER = "other"
_KEEP_MS = 600_000.0
"""A kind is kept for so long after its last session."""


@dataclass(slots=True)
class _KindTotals:
    open: int = 0
    drafting: int = 0
    tokens: int = 0
    last_ms: float = 0.0
    counters: DraftCounters = field(default_factory=DraftCounters)

    def add(self, other: _KindTotals) -> None:
        self.open += other.open
        self.drafting += other.drafting
        self.tokens += other.tokens
        self.last_ms = max(self.last_ms, other.last_ms)
        self.counters.add(other.counters)


def named_kinds(sessions: Iterable[ServerSession]) -> set[str]:
    """The kinds of most of the sessions."""
    counts = Counter(session.listener.kind for session in sessions)
    return {kind for kind, _ in counts.most_common(MAX_KINDS)}


class DeviceKinds:
    """Keeps the totals of ended sessions, for as many kinds as are named."""

    def __init__(self) -> None:
        self._ended: dict[str, _KindTotals] = {}

    def ended(self, session: ServerSession, now_ms: float) -> None:
        """A session ended."""
        state = session.state
        totals = self._ended.setdefault(session.listener.kind, _KindTotals())
        totals.add(_KindTotals(0, 0, state.generated, now_ms, state.counters))
        if len(self._ended) > MAX_KINDS:
            del self._ended[min(self._ended, key=lambda kind: self._ended[kind].last_ms)]

    def table(self, sessions: Sequence[ServerSession], now_ms: float) -> list[dict[str, Any]]:
        """Each kind with its open sessions, and what became of its drafts, also in sessions that ended."""
        found: dict[str, _KindTotals] = {}
        for session in sessions:
            state = session.state
            mine = _KindTotals(1, not state.undrafted, state.generated, now_ms, state.counters)
            found.setdefault(session.listener.kind, _KindTotals()).add(mine)
        for kind, totals in list(self._ended.items()):
            if kind in found or now_ms - totals.last_ms <= _KEEP_MS:
                found.setdefault(kind, _KindTotals()).add(totals)
            else:
                del self._ended[kind]
        order = sorted(found, key=lambda kind: (-found[kind].open, -found[kind].last_ms, kind))
        rows = {kind: found[kind] for kind in order[:MAX_KINDS]}
        for kind in order[MAX_KINDS:]:
            rows.setdefault(OTHER, _KindTotals()).add(found[kind])
        return [
            {
                "kind": kind,
                "open": totals.open,
                "drafting": totals.drafting,
                "tokens": totals.tokens,
                **draft_counts(totals.counters),
            }
            for kind, totals in rows.items()
        ]


def draft_counts(counters: DraftCounters) -> dict[str, Any]:
    """What became of drafts; ``dropped`` by the reason of their refusal."""
    return {
        "drafted": counters.drafted,
        "accepted": counters.accepted,
        "matched": counters.matched,
        "wasted": counters.wasted,
        "cut": counters.cut_drafts,
        "dropped": dict(counters.dropped),
    }
