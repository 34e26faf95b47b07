"""Policies by name, for commands, plans and the simulator."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from wispprof.errors import PlanError
from wispprof.policies.api import BatchPolicy, Controller
from wispprof.policies.baselines import Fcfs, ServerOnly, SledStatic, SpecEdgePipeline
from wispprof.policies.controllers import FixedController, SledController, WispController
from wispprof.policies.stopping import WispprofController
from wispprof.policies.wisp import Wisp
from wispprof.policies.wispprof import Wispprof, WispprofSettings
from wispprof.types import RejectionPredictor

__all__ = ["BATCH_POLICIES", "CONTROLLERS", "make_batch_policy", "make_controller"]


def _wispprof(**options: Any) -> Wispprof:
    return Wispprof(WispprofSettings(**options))


_BATCH: Mapping[str, Callable[..., BatchPolicy]] = {
    "server-only": ServerOnly,
    "fcfs": Fcfs,
    "sled_static": SledStatic,
    "specedge_pipeline": SpecEdgePipeline,
    "wisp": Wisp,
    "wispprof": _wispprof,
}
_OPTIONS_OF: Mapping[str, Callable[..., Any]] = {"wispprof": WispprofSettings}
_CONTROLLERS: Mapping[str, Callable[..., Controller]] = {
    "fixed": FixedController,
    "sled": SledController,
    "wisp": WispController,
    "wispprof": WispprofController,
}

BATCH_POLICIES: tuple[str, ...] = tuple(_BATCH)
CONTROLLERS: tuple[str, ...] = tuple(_CONTROLLERS)


def make_batch_policy(name: str, **options: Any) -> BatchPolicy:
    """A fresh batching policy. Raises :class:`PlanError` on an unknown name or option."""
    policy: BatchPolicy = _make("batching policy", _BATCH, name, options)
    return policy


def make_controller(
    name: str, predictor: RejectionPredictor | None = None, **options: Any
) -> Controller:
    """A fresh controller for one session. ``predictor`` gives the survival of each token."""
    options["predictor"] = predictor
    controller: Controller = _make("controller", _CONTROLLERS, name, options)
    return controller


@functools.cache
def _options(maker: Callable[..., Any]) -> tuple[str, ...]:
    """Names of what it takes. Remembered: a controller is made for every session."""
    return tuple(inspect.signature(maker).parameters)


def _make(
    kind: str, table: Mapping[str, Callable[..., Any]], name: str, options: dict[str, Any]
) -> Any:
    if name not in table:
        raise PlanError(f"There is no {kind} named {name!r}.", f"Choose one of {', '.join(table)}.")
    maker = table[name]
    known = _options(_OPTIONS_OF.get(name, maker) if table is _BATCH else maker)
    unknown = sorted(options.keys() - known)
    if unknown:
        raise PlanError(
            f"The {kind} {name!r} has no option {', '.join(unknown)}.",
            f"Its options: {', '.join(known) or 'none'}.",
        )
    return maker(**options)
