"""The link's round trip as measured: smoothed mean, spread and least, in ms."""

from __future__ import annotations

__all__ = ["RttMeter"]


class RttMeter:
    """Smoothed round trip as TCP keeps it (RFC 6298: gains 1/8 and 1/4). ``guess_ms`` until measured."""

    def __init__(self, guess_ms: float = 30.0) -> None:
        self.mean_ms = guess_ms
        self.spread_ms = guess_ms / 2.0
        self.least_ms = guess_ms
        self.samples = 0

    def add(self, sample_ms: float) -> None:
        """Take in one measured round trip."""
        if self.samples == 0:
            self.mean_ms, self.spread_ms, self.least_ms = sample_ms, sample_ms / 2.0, sample_ms
        else:
            self.spread_ms += (abs(sample_ms - self.mean_ms) - self.spread_ms) / 4.0
            self.mean_ms += (sample_ms - self.mean_ms) / 8.0
            self.least_ms = min(self.least_ms, sample_ms)
        self.samples += 1
