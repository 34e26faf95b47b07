"""Scheduling decisions shared by server, edge and simulator: batching policies, speculation controllers."""

from wispprof.policies.cost_model import LOAD_LEVELS, load_level, slowdown
from wispprof.policies.interface import (
    BatchPolicy,
    Limits,
    RoundContext,
    ScheduledItem,
    SessionView,
    StepPlan,
)
from wispprof.policies.registry import BATCH_POLICIES, CONTROLLERS, make_batch_policy, make_controller

__all__ = [
    "BATCH_POLICIES",
    "CONTROLLERS",
    "LOAD_LEVELS",
    "BatchPolicy",
    "Limits",
    "RoundContext",
    "ScheduledItem",
    "SessionView",
    "StepPlan",
    "load_level",
    "make_batch_policy",
    "make_controller",
    "slowdown",
]
