"""wispprof: measure, plan and run split speculative LLM serving.

The Python API, in the order of use (each name is imported when it is first used)::

    profile_server(ServerProfilerSettings(...)) -> ServerProfile      step times of a target
    profile_edge(EdgeProfilerSettings(...))     -> EdgeProfile        drafting times of a device
    trace(TraceSettings(...))                   -> AcceptanceTrace    what the target accepts
    fit(out, server=[...], trace=[...])         -> FitResult          estimator and predictor
    plan(estimator, edges=[...], traces=[...])  -> Plan               draft lengths, batching, capacity
    simulate(Scenario(...))                     -> Report             a fleet that does not exist yet
    running_server(ServerSettings(...)), serve                        a verification server
    open_edge(EdgeSettings(...)), generate                            a draft client

Settings take all options of a command by name, a remote server's key included::

    edge = EdgeSettings.of(server="gpu-box:8200", key="...", max_tokens=64, slo=8.0)
    print(generate("def read_config(path):", edge, Sampling(temperature=0.8, seed=1)))

``examples/`` shows each. Errors are :class:`WispprofError` and its subclasses (:mod:`wispprof.errors`).
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from wispprof.errors import WispprofError

if TYPE_CHECKING:
    from wispprof.artifacts import load_profile, load_trace
    from wispprof.artifacts.plan import load_plan, save_plan
    from wispprof.edge.edge_runtime import Prompt, generate, open_edge
    from wispprof.engines.loading import load_model
    from wispprof.fitting import load_estimator, load_predictor
    from wispprof.fitting.pipeline import fit_files as fit
    from wispprof.planning.planner import plan_files as plan
    from wispprof.profiling.acceptance_trace import trace_pair as trace
    from wispprof.profiling.edge_profiler import profile_edge
    from wispprof.profiling.server_profiler import profile_server
    from wispprof.server.process import running_server, serve
    from wispprof.settings.edge_settings import EdgeSettings
    from wispprof.settings.planner_settings import PlanSettings
    from wispprof.settings.profiler_settings import (
        EdgeProfilerSettings,
        ServerProfilerSettings,
        TraceSettings,
    )
    from wispprof.settings.server_settings import ServerSettings
    from wispprof.simulation import Scenario, ServerModel, simulate, system
    from wispprof.types import BatchShape, Sampling, Slo

__version__ = "0.3.0"

__all__ = [
    "BatchShape",
    "EdgeProfilerSettings",
    "EdgeSettings",
    "PlanSettings",
    "Prompt",
    "Sampling",
    "Scenario",
    "ServerModel",
    "ServerProfilerSettings",
    "ServerSettings",
    "Slo",
    "TraceSettings",
    "WispprofError",
    "__version__",
    "fit",
    "generate",
    "load_estimator",
    "load_model",
    "load_plan",
    "load_predictor",
    "load_profile",
    "load_trace",
    "open_edge",
    "plan",
    "profile_edge",
    "profile_server",
    "running_server",
    "save_plan",
    "serve",
    "simulate",
    "system",
    "trace",
]

_WHERE = {
    "BatchShape": "wispprof.types",
    "EdgeProfilerSettings": "wispprof.settings.profiler_settings",
    "EdgeSettings": "wispprof.settings.edge_settings",
    "PlanSettings": "wispprof.settings.planner_settings",
    "Prompt": "wispprof.edge.edge_runtime",
    "Sampling": "wispprof.types",
    "Scenario": "wispprof.simulation",
    "ServerModel": "wispprof.simulation",
    "ServerProfilerSettings": "wispprof.settings.profiler_settings",
    "ServerSettings": "wispprof.settings.server_settings",
    "Slo": "wispprof.types",
    "TraceSettings": "wispprof.settings.profiler_settings",
    "fit": "wispprof.fitting.pipeline:fit_files",
    "generate": "wispprof.edge.edge_runtime",
    "load_estimator": "wispprof.fitting",
    "load_model": "wispprof.engines.loading",
    "load_plan": "wispprof.artifacts.plan",
    "load_predictor": "wispprof.fitting",
    "load_profile": "wispprof.artifacts",
    "load_trace": "wispprof.artifacts",
    "open_edge": "wispprof.edge.edge_runtime",
    "plan": "wispprof.planning.planner:plan_files",
    "profile_edge": "wispprof.profiling.edge_profiler",
    "profile_server": "wispprof.profiling.server_profiler",
    "running_server": "wispprof.server.process",
    "save_plan": "wispprof.artifacts.plan",
    "serve": "wispprof.server.process",
    "simulate": "wispprof.simulation",
    "system": "wispprof.simulation",
    "trace": "wispprof.profiling.acceptance_trace:trace_pair",
}


def __getattr__(name: str) -> Any:
    where = _WHERE.get(name)
    if where is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = where.partition(":")
    made = globals()[name] = getattr(import_module(module), attribute or name)
    return made


logging.getLogger(__name__).addHandler(logging.NullHandler())  # Who imports this decides what is printed.


def __dir__() -> list[str]:
    return sorted(__all__)
