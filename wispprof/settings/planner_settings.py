"""Settings of the planner, with the defaults the commands show."""

from __future__ import annotations

from dataclasses import dataclass

from wispprof.artifacts.plan import machine_of
from wispprof.errors import PlanError

__all__ = ["OBJECTIVES", "Mix", "PlanSettings", "weights_of"]

OBJECTIVES = ("goodput", "cost", "energy")

Mix = tuple[tuple[float, float], ...]
"""SLO classes (tokens/s) with their shares of the sessions, any positive weights."""


@dataclass(frozen=True, slots=True)
class PlanSettings:
    """``rtts_ms`` and ``slos``: the grid. ``k_max``: longest draft considered. ``context``: cached
    tokens per session. ``max_sessions``: most concurrent sessions the engine takes; ``kv_tokens``:
    its cache, 0 for unlimited. ``max_step_tokens`` and ``max_prefill_chunk``: limits of a step.

    ``violations``: share of sessions that may miss their promise. ``min_gain``: drafting must beat
    not drafting by this factor, or the cell says k = 0 (drafting costs energy, and ties flap).
    ``objective``: ``goodput``, ``cost``, ``energy`` (the least among the k whose speed is within
    ``energy_slack`` of the best), or a mix, see :mod:`wispprof.planning.objective`. ``server_price``:
    dollars an hour of the server, of which a session is billed its share of busy time;
    ``edge_prices``: (device, dollars an hour of drafting), ``""`` for every device that has none of its
    own. ``mixes``: class mixes whose capacity is wanted beside that of each class alone; without any,
    all classes in equal shares.
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
    server_price: float = 0.0
    edge_prices: tuple[tuple[str, float], ...] = ()
    mixes: tuple[Mix, ...] = ()

    def __post_init__(self) -> None:
        if not self.rtts_ms or min(self.rtts_ms) < 0:
            raise PlanError("The plan needs round trips of at least 0 ms.", "Give --rtt.")
        if not self.slos or min(self.slos) <= 0:
            raise PlanError("The plan needs SLO classes above 0 tokens/s.", "Give --slo.")
        for mix in self.mixes:
            if not mix or min(min(pair) for pair in mix) <= 0:
                raise PlanError(
                    "A class mix needs promises and shares above 0.",
                    "For example: --mix 4=0.7,8=0.3.",
                )
        if self.k_max < 1 or self.max_sessions < 1 or self.context < 0:
            raise PlanError(
                "k_max and max_sessions must be at least 1, context at least 0.", "Correct them."
            )
        if not min((self.server_price, *(price for _, price in self.edge_prices))) >= 0:
            raise PlanError("A price must not be negative.", "Correct it.")
        if "cost" in self.weights and not self.server_price > 0:
            raise PlanError(
                "What a token costs needs the price of the server.",
                "Give --server-price in dollars an hour (and --edge-price, if drafting costs you).",
            )

    @property
    def weights(self) -> dict[str, float]:
        """The objective as weights that sum to one."""
        return weights_of(self.objective)

    def edge_price(self, device: str) -> float:
        """Dollars an hour of drafting on a device."""
        prices = dict(self.edge_prices)
        return prices.get(device, prices.get(machine_of(device), prices.get("", 0.0)))

    @property
    def mixes_or_equal(self) -> tuple[Mix, ...]:
        """The mixes wanted, or all classes in equal shares."""
        if self.mixes or len(self.slos) < 2:
            return self.mixes
        return (tuple((speed, 1.0) for speed in self.slos),)

    @property
    def kv_sessions(self) -> int:
        """Sessions whose caches fit at once."""
        if not self.kv_tokens:
            return self.max_sessions
        return max(1, min(self.max_sessions, self.kv_tokens // max(1, self.context)))


def weights_of(objective: str) -> dict[str, float]:
    """``goodput``, or ``goodput=0.7,energy=0.3``, as weights that sum to one.

    Raises :class:`PlanError` on what is neither.
    """
    try:
        pairs = [entry.partition("=") for entry in objective.split(",")]
        weights = {name.strip(): float(value) if found else 1.0 for name, found, value in pairs}
    except ValueError:
        weights = {}
    # A bare name weighs nothing beside others: which share it should have was not said.
    bare = len(weights) > 1 and any(not found for _, found, _ in pairs)
    total = sum(weights.values())
    sound = not bare and 0 < total < float("inf") and min(weights.values()) >= 0
    if not sound or len(weights) < len(pairs) or not set(weights) <= set(OBJECTIVES):
        raise PlanError(
            f"There is no objective {objective!r}.",
            f"Choose {', '.join(OBJECTIVES)}, or a mix such as goodput=0.7,energy=0.3.",
        )
    return {name: weight / total for name, weight in weights.items() if weight > 0}
