"""How much of a prompt to feed beside running sessions, so that none of them misses its deadline."""

from __future__ import annotations

import math
from operator import attrgetter

import numpy as np

from wispprof.policies.api import SessionView, column
from wispprof.policies.batch_builder import StepBuilder
from wispprof.policies.draft_selection import FloatArray

__all__ = ["add_prompts"]

_SPEED, _DEADLINE = attrgetter("slo.tokens_per_s"), column("deadline_ms")
_LEAST = 16
"""Tokens a prompt gets per step whatever the others need: nothing starves."""
_GAP = 0.8
"""Share of the fastest running session's time for a step's tokens that it may take with prompts."""
_CALM, _UNSEEN, _STRETCH = 2.0, 3.0, 4.0
"""A step may always grow by the first factor for prompts: on a loaded server the gap is spent already, and a
session that does not decode yet leaves the fixed part of every step to the others. It may grow by up to the
second where the running sessions are so far ahead of their promises that nobody would notice, and by the
third where more than one prompt waits: what is spared the running sessions then is paid by the whole queue.
More gains a prompt little: in steps of L times their usual length it is read L ÷ (L − 1) times as long as
alone, a third longer at 4, half at 3, two thirds at 2.5 (which, for everybody and always, cost a fleet with
long prompts 4 to 6 % of its goodput)."""
_UNNOTICED = 0.1
"""A gap this share of what a session ran ahead of its promise is not noticed by its reader."""
_FAIR = 2.0
"""For a first token that is late, or about to be: half of the step is the prompts'. More only helps where
prompts are few; a server that they saturate reads them no sooner, and its sessions run slower."""


def add_prompts(
    build: StepBuilder,
    now_ms: float,
    prompts: list[SessionView],
    decode: list[SessionView],
    tokens: float = 1.0,
    *,
    sized: bool = True,
    patience: float = math.inf,
) -> None:
    """Add prompt chunks to a step whose decoding members are chosen.

    Earliest first-token deadline first, then arrival. ``sized``: the step's bound stays within the
    slack of every running session that could keep it, and within its usual gap between tokens times
    the ``tokens`` that a running session is expected to commit in this step; and it is no longer than
    the prompt's own first-token deadline calls for, beyond a stretch.

    A prompt without a promise has a target instead: ``patience`` times what reading it alone would take.
    From then on, as from a promise that is missed, a step may take twice what its running sessions need,
    whatever their next tokens' deadlines: those count over a whole generation.
    """
    token_ms = _token_ms(build)
    # A hurried step is measured by what the running sessions need, not by the prompts that joined before.
    running_ms = build.cost.bound_ms
    alive = [s for s in decode if not s.slo_unreachable] or decode
    slack_ms = np.fromiter(map(_DEADLINE, alive), np.float64, len(alive)) - now_ms
    stretched_ms = _stretched_ms(running_ms, slack_ms, len(prompts))
    queue = []
    for session in prompts:
        due_ms = session.deadline_ms
        if due_ms == math.inf and patience < math.inf:
            whole = session.cached + session.prompt_left
            due_ms = session.arrived_ms + patience * token_ms * whole
        queue.append(
            (session.slo_unreachable, due_ms, session.arrived_ms, session.session, session)
        )
    queue.sort()
    budget_ms = math.inf
    if sized and alive:
        gap_ms: float = _GAP * tokens * 1000.0 / max(map(_SPEED, alive))
        keepable = slack_ms[slack_ms >= running_ms]
        budget_ms = max(gap_ms, stretched_ms)
        budget_ms = min(budget_ms, float(keepable.min()) if len(keepable) else math.inf)
    for place, (_, due_ms, _, _, session) in enumerate(queue):
        if build.full or not build.prefill_left:
            return
        left_ms = due_ms - now_ms
        hurry_ms = _hurry_ms(running_ms, left_ms, session.slo_unreachable)
        calm_ms = max(stretched_ms, _needed_ms(running_ms, token_ms * session.prompt_left, left_ms))
        allowed_ms = max(min(budget_ms, calm_ms), hurry_ms) if sized and decode else math.inf
        if not build.add_prefill(session, allowed_ms) and place == 0:
            build.add_prefill(session, most=_LEAST)


def _stretched_ms(running_ms: float, slack_ms: FloatArray, prompts: int) -> float:
    """How long a step may become for prompts that have time, whatever the gap that was promised: what most
    running sessions, ``slack_ms`` (n,) from their next deadlines, would not notice."""
    if not len(slack_ms):
        return math.inf
    if prompts > 1:
        return _STRETCH * running_ms
    middle = len(slack_ms) // 2
    unnoticed_ms = _UNNOTICED * float(np.partition(slack_ms, middle)[middle])
    return min(max(unnoticed_ms, _CALM * running_ms), _UNSEEN * running_ms)


def _token_ms(build: StepBuilder) -> float:
    """A prompt token's share of a step with a full chunk of one prompt and nothing else."""
    chunk = build.limits.prefill_chunk
    return build.estimator.start().add(chunk, 0, True).p50_ms / chunk


def _needed_ms(running_ms: float, work_ms: float, left_ms: float) -> float:
    """How long steps must be for a prompt with so much reading left to be through in time, if all of them
    are: reading takes what the running sessions leave of each."""
    share = work_ms / left_ms if left_ms > work_ms else 1.0
    return running_ms / (1.0 - share) if share < 1.0 else math.inf


def _hurry_ms(running_ms: float, left_ms: float, slo_unreachable: bool) -> float:
    """Time a step may take for a prompt whose first token is late or about to be; 0 while it has time."""
    if left_ms > 4.0 * running_ms:
        return 0.0
    fair_ms = _FAIR * running_ms
    return fair_ms if slo_unreachable or left_ms < running_ms else min(left_ms, fair_ms)
