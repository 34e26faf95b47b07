"""A policy's plan, held to its limits: a simulation ends beyond them, a server drops the drafts."""

from __future__ import annotations

import traceback

from wispprof.errors import PluginError
from wispprof.policies.interface import BatchPolicy, Limits, SessionView, StepPlan
from wispprof.types import StepTimeEstimator


class PolicyViolation(PluginError):
    """A batching policy exceeded its limits, or planned a session twice or one that it was not given."""


def checked_plan(
    policy: BatchPolicy, now_ms: float, views: list[SessionView], estimator: StepTimeEstimator, limits: Limits
) -> StepPlan:
    """What the policy plans. Raises :class:`PolicyViolation` if it raises or exceeds ``limits``."""
    try:
        plan = policy.plan(now_ms, views, estimator, limits)
    except Exception as err:
        where = traceback.extract_tb(err.__traceback__)[-1]
        raise PolicyViolation(
            f"{policy.name} raised {type(err).__name__}: {err} ({where.filename}:{where.lineno}).",
            "A server would serve such a step without drafts.",
        ) from err
    rows = sum(item.prefill or 1 + item.drafts for item in plan.items)
    prefill = sum(item.prefill for item in plan.items)
    for name, planned in zip(Limits.__slots__, (len(plan.items), rows, prefill, rows), strict=True):
        if planned > (limit := getattr(limits, name)):
            if twice := _twice(plan):
                raise PolicyViolation(f"{policy.name} planned {twice} twice.")
            raise PolicyViolation(f"{policy.name} planned {planned} where {name} is {limit}.")
    return plan


def _twice(plan: StepPlan) -> str:
    """A session that stands twice in a plan; empty if there is none."""
    names = [item.session for item in plan.items]
    return next((name for number, name in enumerate(names) if name in names[:number]), "")
