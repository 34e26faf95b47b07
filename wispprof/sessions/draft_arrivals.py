"""When the next draft of a streaming edge will arrive, and what it will be worth."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["DraftArrivals"]

_WEIGHT = 0.25
_PATIENCE = 2.0
"""An arrival later than this many times the usual wait is no longer expected at a known time."""


def _blend(old: float | None, new: float) -> float:
    return new if old is None else old + _WEIGHT * (new - old)


class DraftArrivals:
    """Running means of one session's draft frames: gap, length, survival by place in the frame.

    Two waits are kept apart: the gap between frames of one epoch, and the recovery from a commit
    that contradicted the drafts to the first frame of the next epoch, which costs the link's round
    trip besides the drafting.
    """

    __slots__ = (
        "_acceptance_probs",
        "_gap_ms",
        "_last_ms",
        "_length",
        "_recover_ms",
        "_recovering",
    )

    def __init__(self) -> None:
        self._last_ms: float | None = None
        self._gap_ms: float | None = None
        self._recover_ms: float | None = None
        self._recovering = False
        self._length: float | None = None
        self._acceptance_probs: list[float] = []

    def arrived(self, now_ms: float, acceptance_prob: Sequence[float], draft_ms: float) -> None:
        """A frame that added drafts came; ``draft_ms`` is the time its drafting took."""
        if self._last_ms is not None:
            gap = now_ms - self._last_ms
            if gap < 0.0:
                gap = 0.0
            if self._recovering:
                self._recover_ms = _blend(self._recover_ms, gap)
                self._recovering = False
            else:
                usual_ms = self._gap_ms
                self._gap_ms = gap if usual_ms is None else usual_ms + _WEIGHT * (gap - usual_ms)
        elif draft_ms > 0:
            self._gap_ms = draft_ms
        self._last_ms = now_ms
        length = self._length
        if length is None:
            self._length = float(len(acceptance_prob))
        else:
            self._length = length + _WEIGHT * (len(acceptance_prob) - length)
        usual = self._acceptance_probs
        known = len(usual)
        for place, value in enumerate(acceptance_prob):
            if place < known:
                usual[place] += _WEIGHT * (value - usual[place])
            else:
                usual.append(value)

    def contradicted(self, now_ms: float) -> None:
        """A commit left at ``now_ms`` that sends the edge back: drafts restart from there."""
        self._recovering = True
        self._last_ms = now_ms

    def due(self, now_ms: float) -> tuple[float | None, tuple[float, ...], float]:
        """(when the next frame is expected, survival expected of its drafts in order, until when to
        believe it); ``(None, (), inf)`` while too little is known, and once the frame is overdue.
        """
        wait = self._recover_ms if self._recovering else self._gap_ms
        last_ms, length = self._last_ms, self._length
        if wait is None or last_ms is None or now_ms >= last_ms + _PATIENCE * wait:
            return None, (), math.inf
        acceptance_probs = (
            () if length is None else tuple(self._acceptance_probs[: max(1, round(length))])
        )
        return last_ms + wait, acceptance_probs, last_ms + _PATIENCE * wait
