"""How much of a prompt to feed beside running sessions, so that none of them misses its deadline."""

from __future__ import annotations

import math
from operator import attrgetter

from wispprof.policies.api import SessionView
from wispprof.policies.build import StepBuilder

__all__ = ["add_prompts"]

_SPEED, _DEADLINE = attrgetter("slo.tokens_per_s"), attrgetter("deadline_ms")
_LEAST = 16
"""Tokens a prompt gets per step whatever the others need: nothing starves."""
_GAP = 0.8
"""Share of the fastest running session's time for a step's tokens that it may take with prompts."""
_STRETCH = 1.5
"""A step may always grow by this factor for prompts: on a loaded server the gap is spent already."""


def add_prompts(
    build: StepBuilder,
    now_ms: float,
    prompts: list[SessionView],
    decode: list[SessionView],
    tokens: float = 1.0,
    *,
    sized: bool = True,
) -> None:
    """Add prompt chunks to a step whose decoding members are chosen.

    Earliest first-token deadline first, then arrival. ``sized``: the step's bound stays within the
    slack of every running session that could keep it, and within its usual gap between tokens times
    the ``tokens`` that a running session is expected to commit in this step.
    """
    order = sorted(prompts, key=lambda s: (s.hopeless, s.deadline_ms, s.arrived_ms))
    budget_ms = _budget(build, now_ms, decode, tokens) if sized else math.inf
    for session in order:
        if build.full or not build.prefill_left:
            return
        if build.add_prefill(session, max(budget_ms, _hurry_ms(build, now_ms, session))):
            continue
        if session is order[0]:
            build.add_prefill(session, most=_LEAST)


def _budget(build: StepBuilder, now_ms: float, decode: list[SessionView], tokens: float) -> float:
    if not decode:
        return math.inf
    running_ms = build.cost.bound_ms
    alive = [s for s in decode if not s.hopeless] or decode
    gap_ms: float = _GAP * tokens * 1000.0 / max(map(_SPEED, alive))
    earliest_ms = now_ms + running_ms
    keepable: list[float] = [d for d in map(_DEADLINE, alive) if d >= earliest_ms]
    return min(max(gap_ms, _STRETCH * running_ms), min(keepable, default=math.inf) - now_ms)


def _hurry_ms(build: StepBuilder, now_ms: float, session: SessionView) -> float:
    """Time a step may take so that this prompt's first token is still in time, at one step's share.

    Zero while it has time: only a first token that is about to be late lets the step grow, and never
    beyond twice what the running sessions need.
    """
    left_ms = session.deadline_ms - now_ms
    running_ms = build.cost.bound_ms
    if session.hopeless or not running_ms or left_ms > 4.0 * running_ms or left_ms < running_ms:
        return 0.0
    return min(left_ms, 2.0 * running_ms)
