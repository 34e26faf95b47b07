"""What is simulated, as frozen settings: a system, a server, a fleet, its links and its load."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from wispprof.settings.shared_settings import LinkModel
from wispprof.simulation.arrivals import ClosedFleet, OpenLoad
from wispprof.simulation.devices import DeviceProfile
from wispprof.simulation.simulated_output import AcceptanceSource
from wispprof.simulation.systems import System
from wispprof.types import Slo, StepTimeEstimator

__all__ = ["DEVICE_STEP", "LINK_STEP", "SLO_STEP", "Scenario", "ServerModel", "pick"]

# Irrational steps deal each mix in its own order (golden ratio, and two that are independent of it).
DEVICE_STEP, LINK_STEP, SLO_STEP = 0.6180339887498949, 0.7548776662466927, 0.4142135623730951

T = TypeVar("T")


@dataclass(frozen=True)
class ServerModel:
    """One verification server. ``kv_tokens``: cache tokens that fit in its memory (``None``: no limit).

    A session is admitted once its whole generation fits. With ``host_kv_ms`` everybody is: the caches that
    were used least recently then wait in host memory, and each of their tokens costs a step that much
    longer when its session is next in one (nothing is computed meanwhile; estimators do not know of it).

    ``overhead_ms``: what the step loop adds to each step (collecting, deciding, sending). ``spread``: see
    :class:`~wispprof.simulation.step_costs.SimulatedStepTimes`. ``prefill_chunk``: most prompt tokens a step takes.
    """

    estimator: StepTimeEstimator
    kv_tokens: int | None = None
    max_items: int = 1024
    max_tokens: int = 8192
    prefill_chunk: int = 512
    max_context: int = 131_072
    overhead_ms: float = 0.5
    spread: float | None = None
    host_kv_ms: float | None = None

    def __post_init__(self) -> None:
        if self.host_kv_ms is not None and (self.host_kv_ms < 0 or self.kv_tokens is None):
            raise ValueError("host_kv_ms must not be negative and needs kv_tokens")


@dataclass(frozen=True)
class Scenario:
    """Everything that a run depends on; two runs of equal scenarios give equal reports.

    ``devices``, ``links`` and ``slos`` are mixes: values with weights, dealt to devices by their number, so
    a larger fleet holds the smaller one. Sessions that were asked for in the first ``warmup_s`` seconds are
    served but not counted.
    """

    system: System
    server: ServerModel
    load: ClosedFleet | OpenLoad
    acceptance: AcceptanceSource
    devices: tuple[tuple[DeviceProfile, float], ...] = ((DeviceProfile(), 1.0),)
    links: tuple[tuple[LinkModel, float], ...] = ((LinkModel(), 1.0),)
    slos: tuple[tuple[Slo, float], ...] = ((Slo(4.0), 1.0),)
    seconds: float = 120.0
    warmup_s: float = 20.0
    seed: int = 0
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
