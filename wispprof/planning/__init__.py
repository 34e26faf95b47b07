"""Draft-length and batching tables, capacity, break-even, objectives: answers before serving."""

from wispprof.planning.planner import make_plan
from wispprof.planning.session_speed import Runs, runs_of_trace
from wispprof.settings.planner_settings import PlanSettings

__all__ = ["PlanSettings", "Runs", "make_plan", "runs_of_trace"]
