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
    ``short``: cache tokens that must be freed beyond that, from kept caches. ``waiting``: held back."""

    runnable: list[ServerSession] = field(default_factory=list)
    evict: list[ServerSession] = field(default_factory=list)
    short: int = 0
    waiting: int = 0


def _need(live: ServerSession) -> int:
    """Cache tokens it takes to let a session advance once."""
    return live.ledger.prompt_left or 1


def schedule_kv(
    lives: Sequence[ServerSession], kv_free: int, kept_tokens: int, now_ms: float, idle_ms: float
) -> KvPlacement:
    """Seat as many sessions as memory allows; see the module's order of sacrifice."""
    plan = KvPlacement()
    running, fresh, idle = [], [], []
    for live in lives:
        if not live.ledger.ready:
            # A session without KV and without a round has nothing to ask of this step.
            if live.ledger.cached or not live.ledger.prompt_left:
                plan.runnable.append(live)
            if live.ledger.cached and now_ms - live.last_seen_ms >= idle_ms:
                idle.append(live)
        elif live.ledger.prompt_left:
            fresh.append(live)
        else:
            running.append(live)
    need = len(running) + sum(_need(live) for live in fresh)
    if need <= kv_free:
        plan.runnable += running
        plan.runnable += fresh
        return plan
    plan.short = min(kept_tokens, need - kv_free)
    room = kv_free + plan.short
    for live in sorted(idle, key=lambda one: one.last_seen_ms):
        if room >= need:
            break
        room += live.ledger.cached
        plan.evict.append(live)
        plan.runnable.remove(live)
    room = _seat_running(plan, running, fresh, room)
    # Sleepers come back or turn idle; with neither them nor runners, somebody must be let in now.
    alone = not running and not any(live.ledger.cached for live in plan.runnable)
    _seat_fresh(plan, fresh, room, alone)
    return plan


def _seat_running(
    plan: KvPlacement, running: list[ServerSession], fresh: list[ServerSession], room: int
) -> int:
    """Seat who decodes, if need be at the cost of half-prefilled prompts, then of each other;
    returns the room that is left."""
    for live in sorted(fresh, key=lambda one: -one.ledger.waiting_from_ms):
        if room >= len(running):
            break
        if live.ledger.cached:
            room += live.ledger.cached
            plan.evict.append(live)
            plan.waiting += 1
            fresh.remove(live)
    order = sorted(running, key=lambda one: one.ledger.deadline_ms)
    while len(order) > max(1, room):
        victim = order.pop()
        plan.evict.append(victim)
        plan.waiting += 1
        room += victim.ledger.cached
    plan.runnable += order
    return room - len(order)


def _seat_fresh(plan: KvPlacement, fresh: list[ServerSession], room: int, alone: bool) -> None:
    order = sorted(fresh, key=lambda one: (not one.ledger.cached, one.ledger.waiting_from_ms))
    runnable = 0
    for live in order:
        need = _need(live)
        if need <= room:
            room -= need
            runnable += 1
            plan.runnable.append(live)
        else:
            plan.waiting += 1
    if alone and not runnable and order:
        # Half-prefilled prompts that block each other: all but the first give back what they hold.
        plan.evict += [live for live in order[1:] if live.ledger.cached]
        plan.runnable.append(order[0])
