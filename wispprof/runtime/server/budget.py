"""How many tokens per second a key may use: a bucket that fills at that rate."""

from __future__ import annotations

__all__ = ["TokenBudget"]

_SECONDS_HELD = 20.0


class TokenBudget:
    """A bucket per key holding up to twenty seconds of its rate. ``rate`` 0: no limit."""

    def __init__(self, tokens_per_s: float) -> None:
        self.rate = tokens_per_s
        self._left: dict[str, tuple[float, float]] = {}

    def spend(self, key: str, tokens: int, now_ms: float) -> None:
        """Book tokens that were prefilled or committed; the bucket may go below empty."""
        if self.rate > 0:
            self._left[key] = (self._now(key, now_ms) - tokens, now_ms)

    def wait_ms(self, key: str, now_ms: float) -> float:
        """How long until the key may ask again; 0 if it may now."""
        if self.rate <= 0:
            return 0.0
        return max(0.0, -self._now(key, now_ms) / self.rate * 1000.0)

    def _now(self, key: str, now_ms: float) -> float:
        full = self.rate * _SECONDS_HELD
        left, since = self._left.get(key, (full, now_ms))
        return min(full, left + (now_ms - since) / 1000.0 * self.rate)
