"""Draft-length and batching tables, capacity, break-even, objectives: answers before serving."""

from wispprof.planning.acceptance import Runs, runs_of_trace
from wispprof.planning.cells import Device
from wispprof.planning.make import make_plan
from wispprof.planning.settings import PlanSettings

__all__ = ["Device", "PlanSettings", "Runs", "make_plan", "runs_of_trace"]
