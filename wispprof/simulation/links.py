"""What lies between an edge and the server: delay, jitter, bandwidth, loss; frames stay in order.

A link is one ordered byte stream each way (a WebSocket over TCP). A lost packet is therefore not a lost
frame: it is a frame that comes later, and holds up those behind it.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

__all__ = ["COMMIT_BYTES", "DRAFT_BYTES", "OPEN_BYTES", "TOKEN_BYTES", "Link", "LinkProfile"]

DRAFT_BYTES = 78
"""A draft frame without its tokens: msgpack fields, WebSocket, TCP and IP headers."""
COMMIT_BYTES = 92
"""A commit frame without its tokens, likewise."""
OPEN_BYTES = 110
"""An opening frame without its prompt, likewise."""
TOKEN_BYTES = 4
"""A token id in msgpack (3 bytes up to 65,535, 5 beyond); a draft's survival byte comes on top."""


@dataclass(frozen=True, slots=True)
class LinkProfile:
    """A link's figures. ``rtt_ms``: round trip of an empty frame, half of it each way.

    ``jitter_ms``: mean of an exponential delay added each way. ``loss``: probability that a frame needs
    a retransmission (again for each one), which costs ``max(200 ms, 1.5 RTT)`` once: a lone small frame has
    nothing behind it that would trigger fast retransmission (RFC 6298 section 2.4's floor as Linux sets it).
    ``up_mbps`` and ``down_mbps``: serialisation speed, 0 for unlimited.
    """

    rtt_ms: float = 30.0
    jitter_ms: float = 0.0
    loss: float = 0.0
    up_mbps: float = 0.0
    down_mbps: float = 0.0

    def __post_init__(self) -> None:
        if self.rtt_ms < 0 or self.jitter_ms < 0 or not 0 <= self.loss < 1:
            raise ValueError(
                f"a link needs rtt_ms >= 0, jitter_ms >= 0 and 0 <= loss < 1, got {self}"
            )

    @property
    def retransmission_ms(self) -> float:
        """What one lost packet costs."""
        return max(200.0, 1.5 * self.rtt_ms)

    @property
    def mean_rtt_ms(self) -> float:
        """Mean round trip of an empty frame: what a meter on the edge settles at."""
        lost = self.loss / (1.0 - self.loss)
        return self.rtt_ms + 2.0 * (self.jitter_ms + lost * self.retransmission_ms)


class Link:
    """One device's link: when does a frame sent now arrive?"""

    __slots__ = (
        "_down_free",
        "_down_mbps",
        "_half",
        "_jitter",
        "_loss",
        "_penalty",
        "_rng",
        "_steady",
        "_up_free",
        "_up_mbps",
        "profile",
    )

    def __init__(self, profile: LinkProfile, rng: Random) -> None:
        self.profile = profile
        self._rng = rng
        self._half = profile.rtt_ms / 2.0
        self._jitter = profile.jitter_ms
        self._loss = profile.loss
        self._penalty = profile.retransmission_ms
        self._up_mbps, self._down_mbps = profile.up_mbps, profile.down_mbps
        self._steady = not (self._jitter > 0 or self._loss > 0)
        self._up_free = self._down_free = 0.0

    def up(self, now_ms: float, size: int) -> float:
        """Arrival at the server of ``size`` bytes sent by the edge at ``now_ms``."""
        at = self._arrival(now_ms, size, self._up_mbps)
        # In order: never before the frame sent earlier.
        if at < self._up_free:
            return self._up_free
        self._up_free = at
        return at

    def down(self, now_ms: float, size: int) -> float:
        """Arrival at the edge of ``size`` bytes sent by the server at ``now_ms``."""
        at = self._arrival(now_ms, size, self._down_mbps)
        if at < self._down_free:
            return self._down_free
        self._down_free = at
        return at

    def _arrival(self, now_ms: float, size: int, mbps: float) -> float:
        at = now_ms + self._half
        if mbps > 0:
            at += size * 8.0 / (mbps * 1000.0)
        if self._steady:
            return at
        if self._jitter > 0:
            at += self._rng.expovariate(1.0 / self._jitter)
        if self._loss > 0:
            while self._rng.random() < self._loss:
                at += self._penalty
        return at
