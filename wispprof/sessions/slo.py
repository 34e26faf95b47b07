"""When a session's next token is due to meet its SLO. Pure: the caller gives the time."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from wispprof.types import Slo


@dataclass(slots=True, eq=False)
class SloTracker:
    """The SLO of one session, counted over its whole generation.

    The first token is due within the TTFT. Token ``n`` after it is due ``n * tpot_ms`` later: a session
    that is ahead can wait, and one that lags has until its last token to catch up.

    ``first_ms``: when the first token was committed, ``None`` before. ``deadline_ms``: when the next token is
    due, ``inf`` before the first token of an SLO without TTFT.
    """

    slo: Slo
    opened_ms: float
    first_ms: float | None = field(default=None, init=False)
    deadline_ms: float = field(init=False)
    _tpot_ms: float = field(init=False)
    _since_first: int = field(default=0, init=False)
    _ttft_missed: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        ttft_ms = self.slo.ttft_ms
        self.deadline_ms = math.inf if ttft_ms is None else self.opened_ms + ttft_ms
        self._tpot_ms = self.slo.tpot_ms

    def commit(self, tokens: int, now_ms: float) -> None:
        """``tokens`` (at least one) were committed at ``now_ms``."""
        first_ms = self.first_ms
        if first_ms is None:
            self._ttft_missed = now_ms > self.deadline_ms
            self.first_ms = first_ms = now_ms
            self._since_first = -1
        self._since_first += tokens
        self.deadline_ms = first_ms + (self._since_first + 1) * self._tpot_ms

    def deadline_after(self, tokens: float, now_ms: float) -> float:
        """The deadline once so many more tokens were committed at ``now_ms``."""
        if self.first_ms is None:
            return now_ms + tokens * self._tpot_ms
        return self.deadline_ms + tokens * self._tpot_ms

    def slo_unreachable_from_ms(self, tokens_left: int, floor_ms: float) -> float:
        """The time from which the SLO cannot be met any more.

        ``tokens_left`` may still come, each taking at least ``floor_ms``. ``-inf`` if the first token
        was late.
        """
        if self._ttft_missed:
            return -math.inf
        if self.first_ms is None:
            return self.deadline_ms - floor_ms
        last = self.first_ms + (self._since_first + tokens_left) * self._tpot_ms
        return last - tokens_left * floor_ms

    def met(self, now_ms: float) -> bool:
        """Whether the tokens committed up to ``now_ms`` (the last commit) met the SLO."""
        if self.first_ms is None:
            return now_ms <= self.deadline_ms
        late = now_ms > self.first_ms + self._since_first * self._tpot_ms
        return not self._ttft_missed and not late
