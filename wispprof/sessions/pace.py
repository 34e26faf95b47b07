"""When a session's next token is due. Pure arithmetic on the asker's clock."""

from __future__ import annotations

import math

from wispprof.core import Slo

__all__ = ["Pace"]


class Pace:
    """The promise of one session, counted over its whole generation.

    Before the first token the time to first token counts. From the first token on, token number
    ``n`` after it is due ``n * tpot_ms`` later: a session that ran ahead can wait, one that fell
    behind has until its last token to catch up.
    """

    __slots__ = ("_first_ms", "_since_first", "_ttft_missed", "opened_ms", "slo")

    def __init__(self, slo: Slo, opened_ms: float) -> None:
        self.slo = slo
        self.opened_ms = opened_ms
        self._first_ms: float | None = None
        self._since_first = 0
        self._ttft_missed = False

    @property
    def first_ms(self) -> float | None:
        """When the first token was committed; ``None`` before."""
        return self._first_ms

    @property
    def ttft_deadline_ms(self) -> float:
        """When the first token must be out; ``inf`` without such a promise."""
        return math.inf if self.slo.ttft_ms is None else self.opened_ms + self.slo.ttft_ms

    @property
    def deadline_ms(self) -> float:
        """When the next token must be out."""
        if self._first_ms is None:
            return self.ttft_deadline_ms
        return self._first_ms + (self._since_first + 1) * self.slo.tpot_ms

    def commit(self, tokens: int, now_ms: float) -> None:
        """Note that ``tokens`` (at least one) were committed at ``now_ms``."""
        if self._first_ms is None:
            self._ttft_missed = now_ms > self.ttft_deadline_ms
            self._first_ms = now_ms
            self._since_first = tokens - 1
        else:
            self._since_first += tokens

    def hopeless_from_ms(self, tokens_left: int, floor_ms: float) -> float:
        """The moment from which the promise is lost whatever is done.

        ``tokens_left`` may still come, each taking at least ``floor_ms``. ``-inf`` where a missed
        first token has already lost it.
        """
        if self._ttft_missed:
            return -math.inf
        if self._first_ms is None:
            return self.ttft_deadline_ms - floor_ms
        last = self._first_ms + (self._since_first + tokens_left) * self.slo.tpot_ms
        return last - tokens_left * floor_ms

    def kept(self, now_ms: float) -> bool:
        """Whether the promise holds for what was committed up to ``now_ms`` (the last commit)."""
        if self._first_ms is None:
            return now_ms <= self.ttft_deadline_ms
        late = now_ms > self._first_ms + self._since_first * self.slo.tpot_ms
        return not self._ttft_missed and not late
