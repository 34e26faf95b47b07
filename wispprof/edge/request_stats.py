"""Energy of requests that run side by side on one device.

What one request went through, as the user sees it and as the edge spent it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

from wispprof.hardware import EnergyMeter
from wispprof.sessions.draft_buffer import CommitEffect
from wispprof.types import Slo


@dataclass(slots=True, eq=False)
class EnergyShare:
    """One request's part, in joules; ``None`` where no sensor answers."""

    energy_j: float | None = 0.0


class EnergyShares:
    """Deals what a device uses to the requests that run meanwhile, in equal parts.

    A meter knows one window at a time, and nobody can tell which request a joule was for. So a window
    ends whenever a request comes or goes, and all that shared it pay the same. Idle power within a request
    is part of what the request costs; what is used while none runs is nobody's.
    """

    def __init__(self, meter: EnergyMeter) -> None:
        self.sensor = meter.sensor
        self._meter = meter
        self._running: list[EnergyShare] = []

    @contextmanager
    def share(self) -> Iterator[EnergyShare]:
        """A request runs within; what its share says is complete after it."""
        mine = EnergyShare()
        self._deal()
        self._running.append(mine)
        try:
            self._meter.begin()
            yield mine
        finally:
            self._deal()
            self._running.remove(mine)
            if self._running:
                self._meter.begin()

    def _deal(self) -> None:
        """End the window, if one is open."""
        if not self._running:
            return
        used = self._meter.end().energy_j
        for one in self._running:
            if used is None or one.energy_j is None:
                one.energy_j = None
            else:
                one.energy_j += used / len(self._running)


@dataclass(slots=True)
class RequestStats:
    """Statistics of one request. Times are ms since the request began.

    ``rounds``: commits after the first token. ``drafted``: tokens drafted. ``accepted``: verified and
    kept. ``wasted_ms``: edge time spent on drafts after the first rejected one; ``dropped_ms`` and
    ``dropped``: all drafts that ended in no committed token, the rejected ones included.
    ``offered_by_position[j]``: verified rounds with at least j+1 drafts; ``accepted_by_position[j]``:
    those in which the first j+1 were accepted. ``proactive_hits`` of ``proactive_guesses``: how often a
    guess at the target's own token was right. ``draft_only``: tokens that no server confirmed.
    ``energy_j``: what the device used meanwhile (see :mod:`wispprof.edge.request_stats`); ``None`` without a
    sensor.
    """

    begun_ms: float = 0.0
    first_ms: float | None = None
    last_ms: float | None = None
    tokens: int = 0
    draft_only: int = 0
    rounds: int = 0
    drafted: int = 0
    sent: int = 0
    verified_drafts: int = 0
    accepted: int = 0
    draft_ms: float = 0.0
    wasted_ms: float = 0.0
    dropped: int = 0
    dropped_ms: float = 0.0
    proactive_guesses: int = 0
    proactive_hits: int = 0
    queue_ms: float = 0.0
    verify_ms: float = 0.0
    rtt_ms: float = 0.0
    up_bytes: int = 0
    down_bytes: int = 0
    reopened: int = 0
    finished: str = ""
    energy_j: float | None = None
    first_tokens: int = 0
    offered_by_position: list[int] = field(default_factory=list)
    accepted_by_position: list[int] = field(default_factory=list)

    def commit(self, effect: CommitEffect, now_ms: float, drafted: int) -> None:
        """Note a commit that arrived at ``now_ms`` for which ``drafted`` proposals were verified."""
        at = now_ms - self.begun_ms
        if self.first_ms is None:
            self.first_ms = at
            self.first_tokens = len(effect.tokens)
        else:
            self.rounds += 1
            self.verified_drafts += drafted
            self.accepted += effect.accepted
            self._by_position(drafted, effect.accepted)
        self.last_ms = at
        self.tokens += len(effect.tokens)
        self.wasted_ms += effect.wasted_ms
        self.proactive_guesses += effect.proactive
        self.proactive_hits += effect.proactive_hit

    def _by_position(self, drafted: int, accepted: int) -> None:
        missing = drafted - len(self.offered_by_position)
        if missing > 0:
            self.offered_by_position += [0] * missing
            self.accepted_by_position += [0] * missing
        for place in range(drafted):
            self.offered_by_position[place] += 1
            self.accepted_by_position[place] += place < accepted

    @property
    def ttft_ms(self) -> float | None:
        return self.first_ms

    @property
    def tpot_ms(self) -> float | None:
        """Mean ms per token after the first commit; ``None`` with nothing after it."""
        later = self.tokens - self.first_tokens
        if later <= 0 or self.first_ms is None or self.last_ms is None:
            return None
        return (self.last_ms - self.first_ms) / later

    @property
    def tokens_per_s(self) -> float:
        """Committed tokens over the whole request, its first token's wait included."""
        return self.tokens * 1000.0 / self.last_ms if self.last_ms else 0.0

    @property
    def accepted_per_round(self) -> float:
        return self.accepted / self.rounds if self.rounds else 0.0

    @property
    def energy_j_per_token(self) -> float | None:
        """Joules of the device per token; ``None`` without a sensor or a token."""
        made = self.tokens + self.draft_only
        return None if self.energy_j is None or not made else self.energy_j / made

    def met_slo(self, slo: Slo) -> bool:
        """Whether TTFT and mean TPOT were within the SLO."""
        if self.first_ms is None or (slo.ttft_ms is not None and self.first_ms > slo.ttft_ms):
            return False
        tpot_ms = self.tpot_ms
        return tpot_ms is None or tpot_ms <= slo.tpot_ms

    def summary(self) -> dict[str, object]:
        """Everything, with the derived figures; JSON-ready."""
        rounds = max(1, self.rounds)
        return {
            **{k: v for k, v in asdict(self).items() if k not in ("begun_ms", "first_tokens")},
            "tokens_per_s": self.tokens_per_s,
            "ttft_ms": self.ttft_ms,
            "tpot_ms": self.tpot_ms,
            "accepted_per_round": self.accepted_per_round,
            "queue_ms_per_round": self.queue_ms / rounds,
            "verify_ms_per_round": self.verify_ms / rounds,
            "energy_j_per_token": self.energy_j_per_token,
        }

    def line(self) -> str:
        """One line for a terminal."""
        parts = [f"{self.tokens} tokens"]
        if self.first_ms is not None:
            parts.append(f"{self.tokens_per_s:.1f} tokens/s")
            parts.append(f"first after {self.first_ms:.0f} ms")
        if self.rounds and self.drafted:
            parts.append(f"accepted {self.accepted_per_round:.2f} per round ({self.rounds} rounds)")
            share = self.wasted_ms / self.draft_ms if self.draft_ms else 0.0
            parts.append(f"wasted drafting {self.wasted_ms:.0f} ms ({share:.0%})")
        if self.proactive_guesses:
            parts.append(f"guessed ahead {self.proactive_hits}/{self.proactive_guesses}")
        if self.energy_j_per_token is not None:
            parts.append(f"{self.energy_j_per_token:.2g} J/token")
        parts.append(f"link {self.rtt_ms:.1f} ms")
        if self.reopened:
            parts.append(f"reopened {self.reopened}x")
        if self.draft_only:
            parts.append(f"{self.draft_only} tokens UNVERIFIED (draft alone)")
        return " · ".join(parts)
