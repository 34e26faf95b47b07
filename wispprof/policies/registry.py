"""Batching policies and controllers by name: built-ins, entry points and ``module:Class``."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from wispprof import plugins
from wispprof.errors import PlanError, suggestion
from wispprof.policies.baselines import FcfsPolicy, ServerOnlyPolicy, SledPolicy, SpecEdgePolicy
from wispprof.policies.controllers import (
    FixedController,
    SledController,
    SpecEdgeController,
    WispController,
)
from wispprof.policies.interface import BatchPolicy, Controller
from wispprof.policies.stopping import WispprofController
from wispprof.policies.wisp_policy import WispPolicy
from wispprof.policies.wispprof_policy import WispprofPolicy
from wispprof.policies.wispprof_settings import WispprofSettings
from wispprof.types import RejectionPredictor


def _wispprof(**options: Any) -> WispprofPolicy:
    return WispprofPolicy(WispprofSettings(**options))


_POLICIES: Mapping[str, Callable[..., BatchPolicy]] = {
    "server-only": ServerOnlyPolicy,
    "fcfs": FcfsPolicy,
    "sled": SledPolicy,
    "specedge": SpecEdgePolicy,
    "wisp": WispPolicy,
    "wispprof": _wispprof,
}
_CONTROLLERS: Mapping[str, Callable[..., Controller]] = {
    "fixed": FixedController,
    "sled": SledController,
    "specedge": SpecEdgeController,
    "wisp": WispController,
    "wispprof": WispprofController,
}

BATCH_POLICIES: tuple[str, ...] = tuple(_POLICIES)
CONTROLLERS: tuple[str, ...] = tuple(_CONTROLLERS)
TREE_CONTROLLERS = ("specedge", "wispprof")
"""Those with an option ``node_ms``: what each further node of a draft tree costs the device."""


def make_batch_policy(name: str, **options: Any) -> BatchPolicy:
    """Make a batching policy.

    ``name``: a built-in, an entry point of the group ``wispprof.policies``, or ``module:Class``.
    Raises :class:`~wispprof.errors.PluginError` on an unknown name, :class:`PlanError` on an unknown option.
    """
    make: Callable[..., BatchPolicy] = plugins.load("policies", name, _POLICIES)
    parameters = _parameters(WispprofSettings if make is _wispprof else make)
    _check("batching policy", name, parameters, options)
    return make(**options)


def make_controller(name: str, predictor: RejectionPredictor | None = None, **options: Any) -> Controller:
    """Make a controller for one session. ``predictor`` gives the acceptance probability of each draft.

    ``name``: a built-in, an entry point of the group ``wispprof.controllers``, or ``module:Class``.
    Raises :class:`~wispprof.errors.PluginError` on an unknown name, :class:`PlanError` on an unknown option.
    """
    make = _load_controller(name)
    known = _parameters(make)
    if known is None or "predictor" in known:
        options["predictor"] = predictor
    _check("controller", name, known, options)
    return make(**options)


@functools.cache
def _load_controller(name: str) -> Callable[..., Controller]:
    """Cached, because every session makes a controller."""
    return plugins.load("controllers", name, _CONTROLLERS)


@functools.cache
def _parameters(make: Callable[..., Any]) -> tuple[str, ...] | None:
    """Names of the parameters of ``make``; ``None`` if it takes any keyword."""
    parameters = inspect.signature(make).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return None
    return tuple(parameters)


def _check(kind: str, name: str, known: tuple[str, ...] | None, options: dict[str, Any]) -> None:
    unknown = [] if known is None else sorted(options.keys() - known)
    if unknown:
        raise PlanError(
            f"The {kind} {name!r} has no option {', '.join(unknown)}.",
            suggestion(unknown[0], known) if known else "It has no options.",
        )
