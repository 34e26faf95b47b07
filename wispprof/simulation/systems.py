"""The systems that are compared: which policy pieces each is made of, and how its edges behave.

Every piece is the one that the runtime runs. Only the clairvoyant bound is the simulator's own: it knows
what the target will say, so nothing real can run it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from wispprof.errors import PlanError
from wispprof.policies.interface import BatchPolicy, Controller, RoundContext
from wispprof.policies.registry import make_batch_policy, make_controller
from wispprof.settings.edge_settings import DraftingSettings
from wispprof.simulation.simulated_output import SimulatedOutput
from wispprof.types import DraftFeatures, RejectionPredictor

__all__ = ["SYSTEMS", "System", "system"]


_WAITS = DraftingSettings(proactive=0)
_PROACTIVE = DraftingSettings(proactive=8)
# WISP with slack counted over the whole generation, as a sustained speed suggests: what a session ran
# ahead may be spent later. Its text leaves that open.
_CARRIES = DraftingSettings(proactive=0, carry=True)


@dataclass(frozen=True)
class System:
    """A way of serving. ``controller`` ``None``: the edge never drafts (server-only serving).

    ``drafting``: how far edges draft ahead (``proactive``: in round mode, while a round is out).
    ``prefix_cache``: the server keeps KV between rounds. ``clairvoyant``: edges know how many of their
    drafts will be accepted. ``label`` is its name in tables.
    """

    label: str
    batching: str
    controller: str | None = None
    batching_options: Mapping[str, Any] = field(default_factory=dict)
    controller_options: Mapping[str, Any] = field(default_factory=dict)
    prefix_cache: bool = True
    clairvoyant: bool = False
    drafting: DraftingSettings = _WAITS

    def make_batching(self) -> BatchPolicy:
        return make_batch_policy(self.batching, **self.batching_options)

    def make_controller(
        self, predictor: RejectionPredictor, output: SimulatedOutput
    ) -> Controller | None:
        """One session's controller; ``None`` for sessions that never draft."""
        if self.clairvoyant:
            return _Clairvoyant(output, **self.controller_options)
        if self.controller is None:
            return None
        return make_controller(self.controller, predictor, **self.controller_options)

    def replace_with(self, **changes: Any) -> System:
        """A variant, e.g. ``system("wisp").but(label="wisp k=4", controller_options={"k_max": 4})``."""
        return replace(self, **changes)


class _Clairvoyant:
    """Drafts exactly what will be accepted. A ceiling for controllers, not one of them."""

    name = "clairvoyant"

    def __init__(self, output: SimulatedOutput, k_max: int = 16) -> None:
        self._script = output
        self._k_max = k_max
        self._left = 0

    def begin(self, context: RoundContext) -> int:
        self._left = self._script.ahead(self._k_max)
        return self._left

    def go_on(self, depth: int, features: DraftFeatures) -> bool:
        return depth + 1 < self._left

    def acceptance_prob(self) -> float:
        return 1.0

    def finish(self, drafted: int, accepted: int) -> None:
        """Knows already."""


_SLED_FIXED = System(
    "sled-fixed", "sled", "fixed", controller_options={"k": 5}, drafting=_PROACTIVE
)
_SLED_THRESHOLD = System(
    "sled-threshold", "sled", "sled", controller_options={"k_max": 8}, drafting=_PROACTIVE
)

SYSTEMS: Mapping[str, System] = {
    s.label: s
    for s in (
        System("server-only", "server-only"),
        _SLED_FIXED,
        _SLED_FIXED.replace_with(label="sled-fixed-nocache", prefix_cache=False),
        _SLED_THRESHOLD,
        _SLED_THRESHOLD.replace_with(label="sled-threshold-nocache", prefix_cache=False),
        System("fcfs", "fcfs", "fixed", controller_options={"k": 4}),
        System(
            "specedge",
            "specedge",
            "fixed",
            controller_options={"k": 5},
            drafting=_PROACTIVE,
        ),
        System("wisp", "wisp", "wisp"),
        System("wisp-carry", "wisp", "wisp", drafting=_CARRIES),
        System("wispprof", "wispprof", "wispprof"),
        System("clairvoyant", "wispprof", clairvoyant=True),
        System("clairvoyant-rounds", "fcfs", clairvoyant=True),
    )
}
"""By label. The ceiling is the better of the two clairvoyants: streams win where compute binds, rounds
where cache reads do. ``sled`` is short for ``sled-threshold``."""

_ALIASES = {"sled": "sled-threshold", "sled-nocache": "sled-threshold-nocache"}


def system(name: str) -> System:
    """A system by label. Raises :class:`PlanError` on an unknown one."""
    found = SYSTEMS.get(_ALIASES.get(name, name))
    if found is None:
        raise PlanError(
            f"There is no system named {name!r} to simulate.", f"Choose of {', '.join(SYSTEMS)}."
        )
    return found
