"""One commit as the device saw it, for those who watch a generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from wispprof.sessions.draft_buffer import CommitEffect, Held

if TYPE_CHECKING:
    from wispprof import protocol
    from wispprof.edge.request_stats import RequestStats

ACCEPTED, MATCHED, TARGET, UNVERIFIED = "accepted", "matched", "target", "unverified"


class TokenOrigin(NamedTuple):
    """How a token came.

    ``kind``: ``accepted`` (drafted here, verified), ``matched`` (the target's own; the unverified draft there
    is the same), ``target`` (the target's own) or ``unverified`` (of a draft model without a server).
    ``acceptance_prob``: of the verified draft that stood there; ``None`` without one. ``draft``: the token
    that this device held instead of the target's; ``None`` if it held none.
    """

    kind: str
    acceptance_prob: float | None = None
    draft: int | None = None


class RoundRecord(NamedTuple):
    """One commit, with as many ``origins`` as it has tokens. Times in ms.

    ``at_ms``: since the request began; ``round_ms``: since the commit before, or the request. ``drafted``:
    drafts that the server verified, ``accepted`` of them stand. ``draft_ms``: spent on draft steps that ended
    within ``round_ms``. ``drafting``: whether drafts were wanted.
    """

    at_ms: float
    round_ms: float
    origins: tuple[TokenOrigin, ...]
    drafted: int
    accepted: int
    draft_ms: float
    rtt_ms: float
    queue_ms: float
    verify_ms: float
    drafting: bool


def origins(effect: CommitEffect, held: Sequence[Held], drafted: int) -> tuple[TokenOrigin, ...]:
    """Origin of each token of a commit. ``held``: the drafts before it; ``drafted`` of them were verified."""
    made: list[TokenOrigin] = []
    for index in range(len(effect.tokens)):
        # The edge may have drafted anew since, so what it holds need not be what was verified.
        probability = held[index].acceptance_prob if index < min(drafted, len(held)) else None
        if index < effect.accepted:
            made.append(TokenOrigin(ACCEPTED, probability if index < effect.hits else None))
        elif index < effect.hits:
            made.append(TokenOrigin(MATCHED))
        elif index == effect.hits < len(held):
            made.append(TokenOrigin(TARGET, probability, held[index].token))
        else:
            made.append(TokenOrigin(TARGET))
    return tuple(made)


class RoundWatch:
    """Reports a generation's commits, each before its tokens are streamed."""

    def __init__(self, report: Callable[[RoundRecord], None]) -> None:
        self._report = report
        self._last_ms = self._draft_ms = 0.0

    def committed(
        self,
        effect: CommitEffect,
        held: Sequence[Held],
        commit: protocol.Commit,
        stats: RequestStats,
        rtt_ms: float,
        drafting: bool,
    ) -> None:
        """A commit, which ``stats`` counts already. ``held``: the drafts before it."""
        self._add(
            stats.last_ms or 0.0,
            stats.draft_ms,
            origins(effect, held, commit.drafted),
            (commit.drafted, effect.accepted),
            (rtt_ms, commit.queue_ms, commit.verify_ms),
            drafting,
        )

    def unverified(self, at_ms: float, stats: RequestStats) -> None:
        """A token of the draft model alone, ``at_ms`` after the request began."""
        self._add(at_ms, stats.draft_ms, (TokenOrigin(UNVERIFIED),), (0, 0), (0.0, 0.0, 0.0), True)

    def _add(
        self,
        at_ms: float,
        draft_ms: float,
        tokens: tuple[TokenOrigin, ...],
        drafts: tuple[int, int],
        server_ms: tuple[float, float, float],
        drafting: bool,
    ) -> None:
        since_ms, spent_ms = at_ms - self._last_ms, draft_ms - self._draft_ms
        self._last_ms, self._draft_ms = at_ms, draft_ms
        self._report(RoundRecord(at_ms, since_ms, tokens, *drafts, spent_ms, *server_ms, drafting))
