"""What is simulated, as frozen settings: systems, a server, a fleet, its links and its load.

A system names the policies of a server and its edges. All of them are the runtime's own, except the
clairvoyant bound: it knows what the target will say, so nothing real can run it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

from wispprof import plugins
from wispprof.errors import PlanError, suggestion
from wispprof.policies.controllers import ConfidenceAcceptance, FixedController
from wispprof.policies.interface import BatchPolicy, Controller, RoundContext
from wispprof.policies.registry import make_batch_policy, make_controller
from wispprof.settings.edge_settings import BEST_GUESS, LIKELIEST, DraftingSettings
from wispprof.settings.fleet_settings import SimulationSettings
from wispprof.settings.shared_settings import LinkModel
from wispprof.simulation.arrivals import ClosedFleet, OpenLoad
from wispprof.simulation.devices import DeviceProfile
from wispprof.simulation.simulated_output import AcceptanceSource, SimulatedOutput
from wispprof.types import RejectionPredictor, Slo, StepTimeEstimator

# Irrational steps deal each mix in its own order (golden ratio, and two that are independent of it).
DEVICE_STEP, LINK_STEP, SLO_STEP = 0.6180339887498949, 0.7548776662466927, 0.4142135623730951

T = TypeVar("T")


_WAITS = DraftingSettings(proactive=0)
_PROACTIVE = DraftingSettings(proactive=8)
_TREES = DraftingSettings(proactive=0, draft_ahead=64, ahead=LIKELIEST)
_TREES_BEST_GUESS = replace(_TREES, ahead=BEST_GUESS)
# WISP with slack counted over the whole generation: a session that is ahead may use the time later. The paper
# leaves this open.
_CARRIES = DraftingSettings(proactive=0, carry=True)


@dataclass(frozen=True)
class System:
    """A way of serving. ``controller`` ``None``: the edge never drafts (server-only serving).

    ``drafting``: how far edges draft ahead (``proactive``: in round mode, while a round is out).
    ``prefix_cache``: the server keeps KV between rounds. ``clairvoyant``: edges know how many of their
    drafts will be accepted. ``server_drafts``: the server drafts for its sessions, see
    :class:`ServerDraft`. ``trees``: edges draft trees if their controller, device and acceptance have any.
    ``label`` is its name in tables.
    """

    label: str
    batching: str
    controller: str | None = None
    batching_options: Mapping[str, Any] = field(default_factory=dict)
    controller_options: Mapping[str, Any] = field(default_factory=dict)
    prefix_cache: bool = True
    clairvoyant: bool = False
    drafting: DraftingSettings = _WAITS
    server_drafts: bool = False
    trees: bool = False

    def make_batching(self) -> BatchPolicy:
        return make_batch_policy(self.batching, **self.batching_options)

    def make_controller(
        self, predictor: RejectionPredictor, output: SimulatedOutput, device: DeviceProfile
    ) -> Controller | None:
        """One session's controller; ``None`` for sessions that never draft."""
        if self.clairvoyant:
            return _Clairvoyant(output, **self.controller_options)
        if self.controller is None:
            return None
        options = dict(self.controller_options)
        if self.trees and self.controller == "wispprof" and output.candidates:
            options["node_ms"] = device.node_ms
        return make_controller(self.controller, predictor, **options)

    def replace(self, **changes: Any) -> System:
        """A variant, e.g. ``system("wisp").replace(label="wisp k=4", controller_options={"k_max": 4})``."""
        return replace(self, **changes)


class _Clairvoyant(FixedController):
    """Drafts exactly what will be accepted: an upper bound for controllers."""

    name = "clairvoyant"

    def __init__(self, output: SimulatedOutput, k_max: int = 16) -> None:
        super().__init__(k_max, ConfidenceAcceptance(1.0, 1.0))
        self._output = output
        self._k_max = k_max

    def begin(self, context: RoundContext) -> int:
        self.k = self._output.ahead(self._k_max)
        return super().begin(context)


_SLED_FIXED = System("sled-fixed", "sled", "fixed", controller_options={"k": 5}, drafting=_PROACTIVE)
_SLED_THRESHOLD = System(
    "sled-threshold", "sled", "sled", controller_options={"k_max": 8}, drafting=_PROACTIVE
)

SYSTEMS: Mapping[str, System] = {
    s.label: s
    for s in (
        System("server-only", "server-only"),
        System("server-spec", "fcfs", server_drafts=True),
        _SLED_FIXED,
        _SLED_FIXED.replace(label="sled-fixed-nocache", prefix_cache=False),
        _SLED_THRESHOLD,
        _SLED_THRESHOLD.replace(label="sled-threshold-nocache", prefix_cache=False),
        System("fcfs", "fcfs", "fixed", controller_options={"k": 4}),
        System("specedge", "specedge", "fixed", controller_options={"k": 5}, drafting=_PROACTIVE),
        System("specedge-trees", "specedge", "specedge", drafting=_TREES_BEST_GUESS, trees=True),
        System("wisp", "wisp", "wisp"),
        System("wisp-carry", "wisp", "wisp", drafting=_CARRIES),
        System("wispprof", "wispprof", "wispprof"),
        System("wispprof-trees", "wispprof", "wispprof", drafting=_TREES, trees=True),
        System("clairvoyant", "wispprof", clairvoyant=True),
        System("clairvoyant-rounds", "fcfs", clairvoyant=True),
    )
}
"""By label. The upper bound is the better of the two clairvoyants: asynchronous drafting wins if compute
limits a step, synchronous if cache reads do. ``sled`` is short for ``sled-threshold``."""

_ALIASES = {"sled": "sled-threshold", "sled-nocache": "sled-threshold-nocache"}


def names() -> tuple[str, ...]:
    """Every name that :func:`system` knows: systems, then batching policies of installed packages."""
    return tuple(dict.fromkeys((*SYSTEMS, *_ALIASES, *plugins.names("policies", {}))))


def system(name: str) -> System:
    """A system by label, or one of a batching policy by its plugin name (an entry point, or
    ``module:Class``).

    With such a policy edges draft asynchronously by the ``wispprof`` controller if it is asynchronous,
    else four tokens a round. Raises :class:`PlanError` on an unknown name, :class:`PluginError` if a
    plugin does not load.
    """
    found = SYSTEMS.get(_ALIASES.get(name, name))
    if found is not None:
        return found
    if ":" not in name and name not in plugins.names("policies", {}):
        raise PlanError(
            f"There is no system named {name!r} to simulate.",
            suggestion(name, names(), ", or a batching policy as MODULE:NAME"),
        )
    if make_batch_policy(name).stream:
        return System(name, name, "wispprof")
    return System(name, name, "fixed", controller_options={"k": 4})


@dataclass(frozen=True, slots=True)
class ServerDraft:
    """A draft model on the server (server-side speculation).

    Each step is ``k`` draft steps and a verify step. A draft step takes ``draft_ms``, and ``row_ms`` more a
    session. ``k`` is the one of 0 … ``k_max`` with the most expected tokens/ms for the number of sessions in
    the step, by ``cum_acceptance`` (cumulative, by depth), as dynamic speculation of vLLM and SGLang chooses
    it.
    """

    draft_ms: float = 1.5
    row_ms: float = 0.01
    k_max: int = 5
    cum_acceptance: tuple[float, ...] = (0.75, 0.5625, 0.4219, 0.3164, 0.2373)

    def __post_init__(self) -> None:
        if not 0 < self.k_max <= len(self.cum_acceptance) or min(self.draft_ms, self.row_ms) < 0:
            raise ValueError(f"k_max needs as many cumulative acceptances, and times at least 0: {self}")

    def added_ms(self, k: int, sessions: int) -> float:
        """Time that ``k`` draft steps add to a step."""
        return k * (self.draft_ms + self.row_ms * sessions)

    def best_k(self, estimator: StepTimeEstimator, sessions: int, cached: int) -> int:
        """The draft length for a step of so many sessions over ``cached`` tokens each."""

        def tokens_per_ms(k: int) -> float:
            verify = estimator.start().add_all([1 + k] * sessions, [cached] * sessions).p50_ms
            return (1.0 + sum(self.cum_acceptance[:k])) / (verify + self.added_ms(k, sessions))

        return max(range(self.k_max + 1), key=tokens_per_ms)


@dataclass(frozen=True)
class ServerModel:
    """One verification server. ``kv_tokens``: cache tokens that fit in its memory (``None``: no limit).

    A session is admitted once its whole generation fits. With ``host_kv_ms`` everybody is: the caches that
    were used least recently then wait in host memory, and each of their tokens costs a step that much
    longer when its session is next in one (nothing is computed meanwhile; estimators do not know of it).

    With ``preempt`` a session is admitted once its prompt fits, as vLLM does. If the cache is then full, the
    session admitted last loses its KV and is prefilled again when it fits.

    ``draft``: the draft model of systems with ``server_drafts``. ``prefix_tokens``: KV of ended sessions that
    is kept beside ``kv_tokens`` for requests with equal blocks.

    ``overhead_ms``: what the engine loop adds to each step (collecting, deciding, sending). ``plan_ahead``:
    a step is planned while the one before it runs, ``overhead_ms`` before that may end. ``spread``: see
    :class:`~wispprof.simulation.step_costs.SimulatedStepTimes`. ``prefill_chunk``: most prompt tokens a
    step takes.
    """

    estimator: StepTimeEstimator
    kv_tokens: int | None = None
    max_items: int = 1024
    max_tokens: int = 8192
    prefill_chunk: int = 512
    max_context: int = 131_072
    overhead_ms: float = 0.5
    plan_ahead: bool = True
    spread: float | None = None
    host_kv_ms: float | None = None
    preempt: bool = False
    draft: ServerDraft = field(default_factory=ServerDraft)
    prefix_tokens: int = 0

    def __post_init__(self) -> None:
        if self.preempt and (self.kv_tokens is None or self.host_kv_ms is not None):
            raise ValueError("preempt needs kv_tokens, and no host_kv_ms")
        if self.host_kv_ms is not None and (self.host_kv_ms < 0 or self.kv_tokens is None):
            raise ValueError("host_kv_ms must not be negative and needs kv_tokens")


class Client(NamedTuple):
    """Who sends a request: device, link, SLO, and how its drafts are accepted."""

    name: str
    device: DeviceProfile
    link: LinkModel
    slo: Slo
    acceptance: AcceptanceSource


@dataclass(frozen=True)
class Scenario:
    """Everything that a run depends on; two runs of equal scenarios give equal reports.

    ``devices``, ``links`` and ``slos`` are mixes: values with weights, dealt to devices by their number, so
    a larger fleet holds the smaller one. Requests that name one of the ``clients`` do not take part in them.
    Sessions that were asked for in the first ``warmup_s`` seconds are
    served but not counted. A run ends early once more than ``most_missed`` of the counted sessions have
    missed their SLO for certain.
    """

    system: System
    server: ServerModel
    load: ClosedFleet | OpenLoad
    acceptance: AcceptanceSource
    devices: tuple[tuple[DeviceProfile, float], ...] = ((DeviceProfile(), 1.0),)
    links: tuple[tuple[LinkModel, float], ...] = ((LinkModel(), 1.0),)
    slos: tuple[tuple[Slo, float], ...] = ((Slo(4.0), 1.0),)
    clients: tuple[Client, ...] = ()
    seconds: float = SimulationSettings.seconds
    warmup_s: float = 20.0
    seed: int = SimulationSettings.seed
    most_missed: int | None = None
    meta: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_s < self.seconds:
            raise ValueError("a scenario needs 0 <= warmup_s < seconds")
        for mix in (self.devices, self.links, self.slos):
            if not mix or min(weight for _, weight in mix) <= 0:
                raise ValueError("every mix needs at least one value, and weights above zero")

    def with_devices(self, devices: int) -> Scenario:
        """The same scenario with another fleet size. Only for closed fleets (``ValueError``)."""
        if not isinstance(self.load, ClosedFleet):
            raise ValueError("only a closed fleet has a number of devices")
        return replace(self, load=replace(self.load, devices=devices))


def pick(mix: Sequence[tuple[T, float]], number: int, step: float) -> T:
    """Deal a value to device ``number``: multiples of an irrational ``step``, of which any first part keeps
    the weights."""
    total = sum(weight for _, weight in mix)
    place = math.modf((number + 0.5) * step)[0] * total
    for value, weight in mix:
        place -= weight
        if place < 0:
            return value
    return mix[-1][0]
