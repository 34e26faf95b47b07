"""Which sessions hold KV, running or ended. Pure: does not touch the engine.

If memory is short, KV is taken in this order: cached prefixes; sessions idle for a while, which prefill
again with their next round; prompts half prefilled, which wait; last, the running session with the latest
deadline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from wispprof.server.session import ServerSession

# --- scheduling ------------------------------------------------------------------------------------


@dataclass(slots=True)
class KvSchedule:
    """``runnable``: sessions the policy may batch. ``evict``: sessions that lose their KV.
    ``tokens_to_free``: tokens to take from cached prefixes. ``waiting``: sessions held back."""

    runnable: list[ServerSession] = field(default_factory=list)
    evict: list[ServerSession] = field(default_factory=list)
    tokens_to_free: int = 0
    waiting: int = 0


def _tokens_needed(session: ServerSession) -> int:
    """KV tokens that let a session advance once."""
    return session.state.prompt_left or 1


def schedule_kv(
    sessions: Sequence[ServerSession],
    kv_free: int,
    cached_prefix_tokens: int,
    now_ms: float,
    idle_ms: float,
) -> KvSchedule:
    """Let as many sessions run as memory allows, taking KV in the module's order."""
    plan = KvSchedule()
    running, new, idle = [], [], []
    for session in sessions:
        state = session.state
        if not state.ready:
            # A session without KV and without a round needs nothing from this step.
            if state.cached or not state.prompt_left:
                plan.runnable.append(session)
            if state.cached and now_ms - session.last_seen_ms >= idle_ms:
                idle.append(session)
        elif state.prompt_left:
            new.append(session)
        else:
            running.append(session)
    needed = len(running) + sum(_tokens_needed(session) for session in new)
    if needed <= kv_free:
        plan.runnable += running + new
        return plan
    plan.tokens_to_free = min(cached_prefix_tokens, needed - kv_free)
    free = kv_free + plan.tokens_to_free
    for session in sorted(idle, key=lambda one: one.last_seen_ms):
        if free >= needed:
            break
        free += session.state.cached
        plan.evict.append(session)
        plan.runnable.remove(session)
    free = _schedule_running(plan, running, new, free)
    # Sessions with KV run or turn idle later. If there are none, one new session must run now.
    must_run = not running and not any(session.state.cached for session in plan.runnable)
    _schedule_new(plan, new, free, must_run)
    return plan


def _schedule_running(
    plan: KvSchedule, running: list[ServerSession], new: list[ServerSession], free: int
) -> int:
    """Schedule decoding sessions at the cost of half-prefilled prompts, then of each other; returns
    the free tokens left."""
    for session in sorted(new, key=lambda one: -one.state.waiting_from_ms):
        if free >= len(running):
            break
        if session.state.cached:
            free += session.state.cached
            plan.evict.append(session)
            plan.waiting += 1
            new.remove(session)
    by_deadline = sorted(running, key=lambda one: one.state.deadline_ms)
    while len(by_deadline) > max(1, free):
        victim = by_deadline.pop()
        plan.evict.append(victim)
        plan.waiting += 1
        free += victim.state.cached
    plan.runnable += by_deadline
    return free - len(by_deadline)


def _schedule_new(plan: KvSchedule, new: list[ServerSession], free: int, must_run: bool) -> None:
    order = sorted(new, key=lambda one: (not one.state.cached, one.state.waiting_from_ms))
    scheduled = 0
    for session in order:
        needed = _tokens_needed(session)
        if needed <= free:
            free -= needed
            scheduled += 1
            plan.runnable.append(session)
        else:
            plan.waiting += 1
    if must_run and not scheduled and order:
        # Half-prefilled prompts block each other: all but the first give back their KV.
        plan.evict += [session for session in order[1:] if session.state.cached]
        plan.runnable.append(order[0])
