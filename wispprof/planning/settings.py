"""Settings of the planner, with the defaults the commands show."""

from __future__ import annotations

from dataclasses import dataclass

from wispprof.errors import PlanError

__all__ = ["PlanSettings"]


@dataclass(frozen=True, slots=True)
class PlanSettings:
    """``rtts_ms`` and ``slos``: the grid. ``k_max``: longest draft considered. ``context``: cached
    tokens per session. ``max_sessions``: most concurrent sessions the engine takes; ``kv_tokens``:
    its cache, 0 for unlimited. ``max_step_tokens`` and ``max_prefill_chunk``: limits of a step.

    ``violations``: share of sessions that may miss their promise. ``min_gain``: drafting must beat
    not drafting by this factor, or the cell says k = 0 (drafting costs energy, and ties flap).
    ``objective``: ``goodput``, or ``energy``: the least energy per token among the k whose speed is
    within ``energy_slack`` of the best.
    """

    rtts_ms: tuple[float, ...] = (5.0, 20.0, 50.0, 100.0)
    slos: tuple[float, ...] = (2.0, 4.0, 6.0, 8.0)
    k_max: int = 12
    context: int = 512
    max_sessions: int = 256
    kv_tokens: int = 0
    max_step_tokens: int = 2048
    max_prefill_chunk: int = 512
    violations: float = 0.05
    min_gain: float = 1.02
    objective: str = "goodput"
    energy_slack: float = 0.05

    def __post_init__(self) -> None:
        if not self.rtts_ms or min(self.rtts_ms) < 0:
            raise PlanError("The plan needs round trips of at least 0 ms.", "Give --rtt.")
        if not self.slos or min(self.slos) <= 0:
            raise PlanError("The plan needs SLO classes above 0 tokens/s.", "Give --slo.")
        if self.k_max < 1 or self.max_sessions < 1 or self.context < 0:
            raise PlanError(
                "k_max and max_sessions must be at least 1, context at least 0.", "Correct them."
            )
        if self.objective not in ("goodput", "energy"):
            raise PlanError(
                f"There is no objective {self.objective!r}.", "Choose goodput or energy."
            )

    @property
    def kv_sessions(self) -> int:
        """Sessions whose caches fit at once."""
        if not self.kv_tokens:
            return self.max_sessions
        return max(1, min(self.max_sessions, self.kv_tokens // max(1, self.context)))
