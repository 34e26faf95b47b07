"""What a server's session says of itself: what a step changed, counts of drafts."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = ["CommitResult", "DraftCounters"]


class CommitResult(NamedTuple):
    """What a step changed. ``tokens`` is empty after a prompt chunk that was not the last.

    ``accepted`` of ``drafted`` verified proposals stand; ``finished`` is "" while the session goes
    on, else ``stop``, ``length`` or ``context``. ``rollback``: where the commit was cut short, the
    length that the engine's cache must be cut to. ``first``: these hold the session's first token.
    ``late_ms``: by how much the commit missed its deadline (negative: early).
    """

    session: str
    epoch: int
    committed_len: int
    tokens: tuple[int, ...]
    accepted: int
    drafted: int
    queue_ms: float
    finished: str = ""
    rollback: int | None = None
    first: bool = False
    late_ms: float = -math.inf


@dataclass(slots=True)
class DraftCounters:
    """Counts of draft tokens. ``drafted == accepted + matched + wasted + len(tail)`` at all times.

    ``drafted``: taken into the pending_drafts. ``accepted``: verified and kept. ``matched``: overtaken by a
    commit that agreed with them, without having been verified. ``wasted``: contradicted or withdrawn.
    ``cut_drafts``: held at a step and left out of it by the policy (they may be verified later).
    ``dropped``: tokens refused by merge, by reason; ``frames`` likewise counts the frames. Reasons: ``epoch``
    (old), ``contradiction`` (differs from committed text), ``gap`` (begins beyond the pending_drafts), ``conflict``
    (differs from the tail within one epoch), ``overflow``, ``finished``.
    """

    drafted: int = 0
    accepted: int = 0
    matched: int = 0
    wasted: int = 0
    cut_drafts: int = 0
    steps: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    frames: Counter[str] = field(default_factory=Counter)
