"""Who needs the step, and how much: slack to the next deadline, promises behind or lost."""

from __future__ import annotations

import math
from operator import attrgetter
from typing import NamedTuple, Self

import numpy as np

from wispprof.policies.api import SessionView, column
from wispprof.policies.draft_selection import BoolArray, FloatArray, IntArray

__all__ = ["Urgency"]

_DEADLINE, _ARRIVED = column("deadline_ms"), column("arrived_ms")
_HOPELESS, _COMMITTED = column("slo_unreachable"), column("committed")
_SPEED = attrgetter("slo.tokens_per_s")
_SAFE = 0.15
"""Who ran ahead of its promise by this share of its generation so far will not miss it by a long step."""
_SPARE = 1.15
"""Undrafted steps must leave this much to spare, or a session that is late already catches up in none of
them."""
_NEAR, _FAR = 1.0, 3.0
"""Shorter steps are needed in full when the next deadline is as near as the first, in steps, and not at all
from the second."""


class Urgency(NamedTuple):
    """Who needs the step how much, (n,) each: ``slack`` in ms to each deadline, ``lost``: the promise is,
    ``idle``: ms since it became ready, ``starved``: left out for so long that it takes part whatever it is
    worth, ``rank``: the lower, the more it needs the step: stale ones, then by slack, lost promises last."""

    slack: FloatArray
    lost: BoolArray
    idle: FloatArray
    starved: BoolArray
    rank: FloatArray

    @classmethod
    def of(cls, now_ms: float, decode: list[SessionView], patience_ms: float) -> Self:
        count = len(decode)
        idle = now_ms - np.fromiter(map(_ARRIVED, decode), np.float64, count)
        slack = np.fromiter(map(_DEADLINE, decode), np.float64, count) - now_ms
        lost = np.fromiter(map(_HOPELESS, decode), np.bool_, count)
        return cls._ranked(slack, lost, idle, patience_ms)

    def take(self, places: IntArray, patience_ms: float) -> Urgency:
        """The need of some only."""
        return self._ranked(self.slack[places], self.lost[places], self.idle[places], patience_ms)

    @classmethod
    def _ranked(
        cls, slack: FloatArray, lost: BoolArray, idle: FloatArray, patience_ms: float
    ) -> Self:
        starved = idle > patience_ms
        rank = np.where(lost, math.inf, slack)
        rank[starved] = -math.inf
        return cls(slack, lost, idle, starved, rank)

    def behind(self, step_ms: float) -> FloatArray:
        """How far each (n,) is behind its promise, 0 … 1: not at all with two steps of ``step_ms`` in hand,
        all the way when it is as many late."""
        if step_ms <= 0.0:
            return np.zeros(len(self.slack))
        return np.minimum(np.maximum(0.5 - self.slack / (4.0 * step_ms), 0.0), 1.0)

    def urgency(self, decode: list[SessionView], undrafted_ms: float, step_ms: float) -> FloatArray:
        """How much each (n,) needs the steps to be short, 0 … 1: more, the nearer its next deadline.

        None where steps of ``undrafted_ms``, in which everybody advances by one token, would not keep its
        promise with something to spare, where the promise is lost, and where the session has run well ahead
        of it so far: its next drafts make up for a long step. ``step_ms``: a step with the drafts at hand.
        """
        count = len(decode)
        token_ms = 1000.0 / np.fromiter(map(_SPEED, decode), np.float64, count)
        so_far_ms = token_ms * np.fromiter(map(_COMMITTED, decode), np.float64, count)
        urgent = (token_ms >= _SPARE * undrafted_ms) & ~self.lost & (self.slack < _SAFE * so_far_ms)
        near = (_FAR - self.slack / max(step_ms, 1e-9)) / (_FAR - _NEAR)
        found: FloatArray = urgent * np.minimum(np.maximum(near, 0.0), 1.0) ** 2
        return found

    def first(self, members: BoolArray, most: int) -> BoolArray:
        """At most ``most`` of the members, those who need it most."""
        inside = members.nonzero()[0]
        if len(inside) <= most:
            return members
        kept = np.zeros(len(members), dtype=bool)
        kept[inside[self.rank[inside].argpartition(most - 1)[:most]]] = True
        return kept
