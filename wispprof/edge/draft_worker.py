"""Draft steps off the event loop: a torch model in a thread, a replayed device on the loop's clock.

A worker keeps a :class:`~wispprof.backends.Drafter` in step with a path. It remembers what the drafter
holds, so that catching up with whatever was committed or rolled back is one call, :meth:`follow`, with
the sequence the drafter should hold; the common prefix stays, KV and all.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import NamedTuple, Protocol

from wispprof.backends import Drafter
from wispprof.sessions.pending_drafts import common_prefix
from wispprof.types import DraftToken, Sampling

_AT_ONCE_S = 0.0005
"""A step asked for this soon after the one before it follows at once: nothing else was waited for."""


class DraftStep(NamedTuple):
    """One drafted token and the time it took."""

    drafted: DraftToken
    draft_ms: float


class DraftWorker(Protocol):
    """Steps of one session's drafter. One call at a time."""

    async def open(self, tokens: Sequence[int], sampling: Sampling) -> None:
        """Start from these committed tokens (the draft's own prefill)."""

    async def step(self, sequence: Sequence[int]) -> DraftStep | None:
        """Bring the drafter to hold exactly ``sequence``, then draft the token after it.

        ``None``: the drafter has nothing to propose here.
        """


class _Follower:
    """A drafter, and what it holds in :attr:`held`. Runs in whatever thread calls it."""

    def __init__(self, drafter: Drafter) -> None:
        self.drafter = drafter
        self.held: list[int] = []
        self._most = drafter.max_context

    def open(self, tokens: Sequence[int], sampling: Sampling) -> None:
        """Start anew; a prompt beyond the drafter's context leaves it out of this session."""
        self.held = []
        if len(tokens) >= self._most:
            return
        self.drafter.open(tokens, sampling)
        self.held = list(tokens)
        self.drafter.prefill()

    def draft(self, sequence: Sequence[int]) -> tuple[DraftToken | None, int]:
        """The token after ``sequence`` (``None``: nothing to propose), and how many had to be read."""
        if len(sequence) >= self._most:
            return None, 0
        read = self.follow(sequence)
        return self.step(), read

    def follow(self, sequence: Sequence[int]) -> int:
        """Make the drafter hold ``sequence``; returns the number of tokens it had to read anew."""
        held, wanted = self.held, list(sequence)
        same = common_prefix(held, wanted)
        if same < len(held):
            self.drafter.rollback(same)
        if same < len(wanted):
            self.drafter.extend(wanted[same:])
        self.held = wanted
        return len(wanted) - same

    def step(self) -> DraftToken | None:
        if not self.drafter.can_draft:
            return None
        drafted = self.drafter.draft()
        self.held.append(drafted.token)
        return drafted


class ThreadWorker:
    """Runs a real drafter in ``executor``, one step per hop, timed where it runs.

    Sessions that share a draft model must share an executor of one thread: a device has one engine.
    """

    def __init__(self, drafter: Drafter, executor: Executor) -> None:
        self._follower = _Follower(drafter)
        self._executor = executor

    @property
    def held(self) -> list[int]:
        """Tokens the drafter held after its last step."""
        return self._follower.held

    async def open(self, tokens: Sequence[int], sampling: Sampling) -> None:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._executor, self._follower.open, list(tokens), sampling)

    async def step(self, sequence: Sequence[int]) -> DraftStep | None:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, self._step, list(sequence))

    def _step(self, sequence: list[int]) -> DraftStep | None:
        begun = time.perf_counter()
        drafted, _ = self._follower.draft(sequence)
        if drafted is None:
            return None
        return DraftStep(drafted, (time.perf_counter() - begun) * 1000.0)


class TimedWorker:
    """A drafter that costs nothing made to cost what a device would: the loop's clock pays.

    ``step_ms(context)``: one draft step over that many tokens. ``read_ms``: per prompt or committed
    token that the device's draft model has to read besides. ``resuming_ms(rested_ms)``: what a step takes
    longer after the device did nothing for so long.

    A timer that fires late is this process's fault and not the device's: the lateness of one step is taken
    off the next where that follows at once, so that a run of steps takes what the device would take.
    """

    def __init__(
        self,
        drafter: Drafter,
        step_ms: Callable[[int], float],
        read_ms: float = 0.0,
        resuming_ms: Callable[[float], float] = lambda rested_ms: 0.0,
    ) -> None:
        self._follower = _Follower(drafter)
        self._step_ms = step_ms
        self._read_ms = read_ms
        self._resuming_ms = resuming_ms
        self._ended_s = self._woke_s = -math.inf

    async def open(self, tokens: Sequence[int], sampling: Sampling) -> None:
        self._follower.open(tokens, sampling)
        await self._spend(self._read_ms * len(tokens))

    async def step(self, sequence: Sequence[int]) -> DraftStep | None:
        drafted, read = self._follower.draft(sequence)
        if drafted is None:
            return None
        # One token is read by every step anyway: the last one it holds.
        cost_ms = self._step_ms(len(sequence)) + self._read_ms * max(0, read - 1)
        began_s = self._begins_s(asyncio.get_running_loop().time())
        cost_ms += self._resuming_ms((began_s - self._ended_s) * 1000.0)
        await self._spend(cost_ms)
        return DraftStep(drafted, cost_ms)

    async def _spend(self, cost_ms: float) -> None:
        loop = asyncio.get_running_loop()
        asked_s = loop.time()
        self._ended_s = self._begins_s(asked_s) + cost_ms / 1000.0
        await asyncio.sleep(max(0.0, self._ended_s - asked_s))
        self._woke_s = loop.time()

    def _begins_s(self, asked_s: float) -> float:
        """When the device begins what is asked of it now."""
        return self._ended_s if asked_s - self._woke_s <= _AT_ONCE_S else asked_s
