"""Prompt chunks beside running sessions: as large as their SLOs allow.

A step that grows to L times its usual length for prompts reads a prompt in L ÷ (L − 1) times its prefill time
alone: twice at 2, a third longer at 4. The growth factors in
:class:`~wispprof.policies.wispprof_settings.WispprofSettings` follow from that.
"""

from __future__ import annotations

import math
from operator import attrgetter

import numpy as np

from wispprof.policies.batch_builder import BatchBuilder
from wispprof.policies.cost_model import FloatArray
from wispprof.policies.interface import SessionView, column
from wispprof.policies.wispprof_settings import WispprofSettings

_SPEED, _DEADLINE = attrgetter("slo.tokens_per_s"), column("deadline_ms")


def add_prompts(
    batch: BatchBuilder,
    now_ms: float,
    prompts: list[SessionView],
    running: list[SessionView],
    tokens: float,
    settings: WispprofSettings,
) -> None:
    """Add prompt chunks to a step whose decoding items are chosen.

    Order: earliest first-token deadline, then arrival. A prompt without a TTFT SLO is due after
    ``settings.ttft_target`` times its prefill time alone.

    With ``settings.size_prefill``, the step's bound stays within the slack of every running session that can
    still meet its deadline. It also stays within their usual gap for ``tokens``, the tokens that each is
    expected to commit in this step, and is no longer than the prompt's own deadline requires. A prompt
    that is late, or about to be, may double the step whatever the running sessions' next deadlines:
    those count over a whole generation.
    """
    token_ms = _token_ms(batch)
    running_ms = batch.cost.bound_ms
    reachable = [s for s in running if not s.slo_unreachable] or running
    slack_ms = np.fromiter(map(_DEADLINE, reachable), np.float64, len(reachable)) - now_ms
    growth_ms = _growth_ms(running_ms, slack_ms, len(prompts), settings)
    queue = []
    for session in prompts:
        due_ms = session.deadline_ms
        if due_ms == math.inf and settings.ttft_target < math.inf:
            prompt = session.cached + session.prompt_left
            due_ms = session.arrived_ms + settings.ttft_target * token_ms * prompt
        key = (session.slo_unreachable, due_ms, session.arrived_ms, session.session)
        queue.append((*key, session))
    queue.sort()
    budget_ms = math.inf
    if settings.size_prefill and reachable:
        gap_ms: float = settings.prefill_gap * tokens * 1000.0 / max(map(_SPEED, reachable))
        meetable = slack_ms[slack_ms >= running_ms]
        budget_ms = max(gap_ms, growth_ms)
        budget_ms = min(budget_ms, float(meetable.min()) if len(meetable) else math.inf)
    for position, (_, due_ms, _, _, session) in enumerate(queue):
        if batch.full or not batch.prefill_left:
            return
        left_ms = due_ms - now_ms
        step_ms = math.inf
        if settings.size_prefill and running:
            needed_ms = _needed_ms(running_ms, token_ms * session.prompt_left, left_ms)
            urgent_ms = _urgent_ms(running_ms, left_ms, session.slo_unreachable, settings)
            step_ms = max(min(budget_ms, max(growth_ms, needed_ms)), urgent_ms)
        if not batch.add_prefill(session, step_ms) and position == 0:
            batch.add_prefill(session, max_chunk=settings.min_chunk)


def _token_ms(batch: BatchBuilder) -> float:
    """Time per prompt token in a step with one full chunk and nothing else."""
    chunk = batch.limits.prefill_chunk
    return batch.estimator.start().add(chunk, 0, True).p50_ms / chunk


def _growth_ms(running_ms: float, slack_ms: FloatArray, prompts: int, settings: WispprofSettings) -> float:
    """Step time that prompts may always use, whatever the running sessions' SLOs.

    ``slack_ms`` (n,): time to the next deadline of each running session.
    """
    if not len(slack_ms):
        return math.inf
    if prompts > 1:
        return settings.prefill_growth_queue * running_ms
    middle = len(slack_ms) // 2
    ahead_ms = settings.prefill_ahead_share * float(np.partition(slack_ms, middle)[middle])
    growth_ms = max(ahead_ms, settings.prefill_growth * running_ms)
    return min(growth_ms, settings.prefill_growth_ahead * running_ms)


def _needed_ms(running_ms: float, prefill_ms: float, left_ms: float) -> float:
    """Length of steps that prefill the prompt in time; each leaves it what the running sessions do not
    use."""
    share = prefill_ms / left_ms if left_ms > prefill_ms else 1.0
    return running_ms / (1.0 - share) if share < 1.0 else math.inf


def _urgent_ms(running_ms: float, left_ms: float, slo_unreachable: bool, settings: WispprofSettings) -> float:
    """Step time for a prompt whose first token is late or about to be; 0 while it has time."""
    if left_ms > settings.prefill_urgent_steps * running_ms:
        return 0.0
    doubled_ms = settings.prefill_urgent * running_ms
    return doubled_ms if slo_unreachable or left_ms < running_ms else min(left_ms, doubled_ms)
