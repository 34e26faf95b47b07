"""Who may hold KV. Pure: decides over ledgers, touches no engine.

Order of sacrifice when memory is short: kept caches of ended sessions; sessions that have been idle for
a while (their tokens stay, and are prefilled again with their next round); then newcomers wait, and give
back what they have prefilled so far; and only then is a running session set back, the one whose deadline
is furthest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from wispprof.server.session import ServerSession

__all__ = ["KvPlacement", "schedule_kv"]


@dataclass(slots=True)
class KvPlacement:
    """``runnable``: sessions the policy may see. ``evict``: sessions that lose their cache.
    ``tokens_to_free``: cache tokens that must be freed beyond that, from kept caches. ``waiting``: held back."""

    runnable: list[ServerSession] = field(default_factory=list)
    evict: list[ServerSession] = field(default_factory=list)
    tokens_to_free: int = 0
    waiting: int = 0


def _need(session: ServerSession) -> int:
    """Cache tokens it takes to let a session advance once."""
    return session.state.prompt_left or 1


def schedule_kv(
    sessions: Sequence[ServerSession], kv_free: int, kept_tokens: int, now_ms: float, idle_ms: float
) -> KvPlacement:
    """Seat as many sessions as memory allows; see the module's order of sacrifice."""
    plan = KvPlacement()
    running, new, idle = [], [], []
    for session in sessions:
        if not session.state.ready:
            # A session without KV and without a round has nothing to ask of this step.
            if session.state.cached or not session.state.prompt_left:
                plan.runnable.append(session)
            if session.state.cached and now_ms - session.last_seen_ms >= idle_ms:
                idle.append(session)
        elif session.state.prompt_left:
            new.append(session)
        else:
            running.append(session)
    need = len(running) + sum(_need(session) for session in new)
    if need <= kv_free:
        plan.runnable += running
        plan.runnable += new
        return plan
    plan.tokens_to_free = min(kept_tokens, need - kv_free)
    remaining = kv_free + plan.tokens_to_free
    for session in sorted(idle, key=lambda one: one.last_seen_ms):
        if remaining >= need:
            break
        remaining += session.state.cached
        plan.evict.append(session)
        plan.runnable.remove(session)
    remaining = _schedule_running(plan, running, new, remaining)
    # Sleepers come back or turn idle; with neither them nor runners, somebody must be let in now.
    none_cached = not running and not any(session.state.cached for session in plan.runnable)
    _schedule_new(plan, new, remaining, none_cached)
    return plan


def _schedule_running(
    plan: KvPlacement, running: list[ServerSession], new: list[ServerSession], remaining: int
) -> int:
    """Seat who decodes, if need be at the cost of half-prefilled prompts, then of each other;
    returns the room that is left."""
    for session in sorted(new, key=lambda one: -one.state.waiting_from_ms):
        if remaining >= len(running):
            break
        if session.state.cached:
            remaining += session.state.cached
            plan.evict.append(session)
            plan.waiting += 1
            new.remove(session)
    order = sorted(running, key=lambda one: one.state.deadline_ms)
    while len(order) > max(1, remaining):
        victim = order.pop()
        plan.evict.append(victim)
        plan.waiting += 1
        remaining += victim.state.cached
    plan.runnable += order
    return remaining - len(order)


def _schedule_new(
    plan: KvPlacement, new: list[ServerSession], remaining: int, none_cached: bool
) -> None:
    order = sorted(new, key=lambda one: (not one.state.cached, one.state.waiting_from_ms))
    runnable = 0
    for session in order:
        need = _need(session)
        if need <= remaining:
            remaining -= need
            runnable += 1
            plan.runnable.append(session)
        else:
            plan.waiting += 1
    if none_cached and not runnable and order:
        # Half-prefilled prompts that block each other: all but the first give back what they hold.
        plan.evict += [session for session in order[1:] if session.state.cached]
        plan.runnable.append(order[0])
