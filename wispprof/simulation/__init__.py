"""A fleet that does not exist yet, as discrete events over the runtime's own policies."""

from wispprof.simulation.event_loop import simulate
from wispprof.simulation.metrics import Report
from wispprof.simulation.scenario import SYSTEMS, Scenario, ServerModel, System, system

__all__ = ["SYSTEMS", "Report", "Scenario", "ServerModel", "System", "simulate", "system"]
