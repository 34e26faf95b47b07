"""Draft steps off the event loop: a model in a thread, or a replayed device on the loop's clock.

A worker keeps a :class:`~wispprof.backends.Drafter` in sync with a sequence. It rolls the drafter back to
the common prefix and appends the rest, so the KV of the prefix is reused.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from queue import SimpleQueue
from threading import Thread
from typing import Any, NamedTuple, Protocol, TypeVar

from wispprof.backends import Continuations, Drafter, TreeDrafter
from wispprof.errors import EngineError
from wispprof.sessions.pending_drafts import common_prefix
from wispprof.sessions.tree_drafting import TreeStep
from wispprof.token_tree import ROOT
from wispprof.types import DraftToken, Sampling

_T = TypeVar("_T")

PIECE = 64
"""Most tokens that a draft model reads in one call. Between calls it hears of commits."""
_READ_WITH_DRAFT = 8
"""Up to so many unread tokens are read together with the draft after them. A draft after more would come
late: the text has grown meanwhile, so the rest is read first."""
_BACK_TO_BACK_S = 0.0005
"""A step requested within this time of the previous one counts as back to back."""


class DraftStep(NamedTuple):
    """One drafted token and the time it took."""

    drafted: DraftToken
    draft_ms: float


class TreeForward(NamedTuple):
    """What one forward found after some nodes of a tree, and the time it took."""

    found: list[Continuations]
    draft_ms: float


class CatchUp(NamedTuple):
    """``tokens`` of the text were read instead of drafting; more may be unread."""

    tokens: int
    read_ms: float


class DraftWorker(Protocol):
    """Runs the drafter of one session, one call at a time. If a call raises, drafting ends.

    A worker whose drafter offers draft trees has a true attribute ``trees``, and a method ``expand``, see
    :class:`ThreadWorker`.
    """

    async def open(self, tokens: Sequence[int], sampling: Sampling) -> None:
        """Prefill these committed tokens."""

    async def step(self, sequence: Sequence[int]) -> DraftStep | CatchUp | None:
        """Sync the drafter with ``sequence`` and draft the next token; ``None``: no proposal."""


class _SyncedDrafter:
    """A drafter and its tokens, :attr:`held`, those of an earlier request at first."""

    def __init__(self, drafter: Drafter, held: Sequence[int] = ()) -> None:
        self.drafter = drafter
        self.held = list(held)
        self._max_context = drafter.max_context

    def open(self, tokens: Sequence[int], sampling: Sampling, piece: int | None = None) -> bool:
        """Start again; reads at most ``piece`` tokens. Returns whether there are more: :meth:`read` them.

        If the prompt exceeds the drafter's context, the session gets no drafts.
        """
        known, self.held = common_prefix(self.held, tokens), []
        if len(tokens) >= self._max_context:
            return False
        first = list(tokens if piece is None else tokens[: known + piece])
        self.drafter.open(first, sampling)
        self.drafter.prefill()
        self.held = first
        return len(first) < len(tokens)

    def read(self, sequence: Sequence[int], piece: int) -> int:
        """Read at most ``piece`` more tokens of ``sequence`` without drafting; returns how many it were."""
        same = common_prefix(self.held, sequence)
        read = self._sync(sequence[: same + piece])
        self.drafter.prefill()
        return read

    def unread(self, sequence: Sequence[int]) -> int:
        """Tokens of ``sequence`` that the drafter does not hold."""
        return len(sequence) - common_prefix(self.held, sequence)

    def draft(self, sequence: Sequence[int]) -> tuple[DraftToken | None, int]:
        """The next token (``None``: no proposal), and the number of tokens that were read."""
        if len(sequence) >= self._max_context:
            return None, 0
        read = self._sync(sequence)
        if not self.drafter.can_draft:
            return None, read
        drafted = self.drafter.draft()
        self.held.append(drafted.token)
        return drafted, read

    @property
    def trees(self) -> bool:
        return isinstance(self.drafter, TreeDrafter)

    def expand(self, sequence: Sequence[int], step: TreeStep) -> tuple[list[Continuations] | None, int]:
        """What follows nodes of a tree after ``sequence`` (``None``: the context is full), and the number of
        tokens that were read."""
        deepest = max((step.tree.depths[node] for node in step.nodes if node != ROOT), default=0)
        if len(sequence) + deepest >= self._max_context:
            return None, 0
        assert isinstance(self.drafter, TreeDrafter)
        read = self._sync(sequence)
        return self.drafter.expand(step.tree, step.nodes, step.width), read

    def _sync(self, sequence: Sequence[int]) -> int:
        """Make the drafter hold ``sequence``; returns the number of tokens it read."""
        held, wanted = self.held, list(sequence)
        same = common_prefix(held, wanted)
        if same < len(held):
            self.drafter.rollback(same)
        if same < len(wanted):
            self.drafter.extend(wanted[same:])
        self.held = wanted
        return len(wanted) - same


class DraftThread(Executor):
    """One daemon thread that runs calls in order. A call that hangs does not keep the process alive."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._thread = Thread(target=self._run, name="draft", daemon=True)
        self._thread.start()

    def submit(self, fn: Callable[..., _T], /, *args: Any, **kwargs: Any) -> Future[_T]:
        future: Future[_T] = Future()
        self._calls.put((future, lambda: fn(*args, **kwargs)))
        return future

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            future, work = call
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(work())
            except BaseException as err:
                future.set_exception(err)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Stop after the calls submitted so far; waits for them at most a second."""
        self._calls.put(None)
        if wait:
            self._thread.join(1.0)


class ThreadWorker:
    """Runs a drafter in ``executor`` and measures its steps there.

    Sessions that share a draft model must share an executor of one thread. Prompts are read in pieces, and
    other sessions get their turn between them. ``held``: what the drafter holds of an earlier request.
    A call that takes longer than ``timeout_ms``, time in the executor's queue included, raises
    :class:`EngineError`. ``stuck``: such a call still runs, so drafter and thread must not be used again.
    """

    def __init__(
        self,
        drafter: Drafter,
        executor: Executor,
        timeout_ms: float = 30_000.0,
        held: Sequence[int] = (),
    ) -> None:
        self._synced = _SyncedDrafter(drafter, held)
        self._executor = executor
        self._timeout_ms = timeout_ms
        self._running = False
        self.stuck = False

    @property
    def held(self) -> list[int]:
        """Tokens that the drafter held after its last step."""
        return self._synced.held

    async def open(self, tokens: Sequence[int], sampling: Sampling) -> None:
        wanted, synced = list(tokens), self._synced
        more = await self._call(lambda: synced.open(wanted, sampling, PIECE))
        while more:
            more = await self._call(lambda: synced.read(wanted, PIECE) > 0 and synced.unread(wanted) > 0)

    async def step(self, sequence: Sequence[int]) -> DraftStep | CatchUp | None:
        wanted = list(sequence)
        return await self._call(lambda: self._step(wanted))

    @property
    def trees(self) -> bool:
        """Whether :meth:`expand` is supported."""
        return self._synced.trees

    async def expand(self, sequence: Sequence[int], step: TreeStep) -> TreeForward | CatchUp | None:
        """Sync the drafter with ``sequence`` and continue nodes of a tree after it; ``None``: no proposal."""
        wanted = list(sequence)
        return await self._call(lambda: self._expand(wanted, step))

    async def _call(self, work: Callable[[], _T]) -> _T:
        def run() -> _T:
            self._running = True
            try:
                return work()
            finally:
                self._running = False

        try:
            async with asyncio.timeout(self._timeout_ms / 1000.0):
                return await asyncio.get_running_loop().run_in_executor(self._executor, run)
        except TimeoutError:
            self.stuck = self._running
            raise EngineError(f"No draft within {self._timeout_ms:,.0f} ms.") from None

    def _catch_up(self, sequence: list[int], begun: float) -> CatchUp | None:
        synced = self._synced
        if synced.unread(sequence) > _READ_WITH_DRAFT and len(sequence) < synced.drafter.max_context:
            read = synced.read(sequence, PIECE)
            return CatchUp(read, (time.perf_counter() - begun) * 1000.0)
        return None

    def _expand(self, sequence: list[int], step: TreeStep) -> TreeForward | CatchUp | None:
        begun = time.perf_counter()
        if (caught_up := self._catch_up(sequence, begun)) is not None:
            return caught_up
        found, _ = self._synced.expand(sequence, step)
        return None if found is None else TreeForward(found, (time.perf_counter() - begun) * 1000.0)

    def _step(self, sequence: list[int]) -> DraftStep | CatchUp | None:
        begun = time.perf_counter()
        if (caught_up := self._catch_up(sequence, begun)) is not None:
            return caught_up
        drafted, _ = self._synced.draft(sequence)
        if drafted is None:
            return None
        return DraftStep(drafted, (time.perf_counter() - begun) * 1000.0)


class TimedWorker:
    """A free drafter (replay, fake) with the step times of a device, spent on the loop's clock.

    ``step_ms(context)``: time of a draft step at a context length. ``read_ms``: extra time per prompt or
    committed token that the draft model reads. ``resuming_ms(rested_ms)``: extra time of a step after an
    idle period. ``node_ms``: of each further node of a tree in one forward.

    If a timer fires late, the next back-to-back step is shortened by the delay. A run of steps then takes the
    device's time.
    """

    def __init__(
        self,
        drafter: Drafter,
        step_ms: Callable[[int], float],
        read_ms: float = 0.0,
        resuming_ms: Callable[[float], float] = lambda rested_ms: 0.0,
        node_ms: float = 0.0,
    ) -> None:
        self._synced = _SyncedDrafter(drafter)
        self._node_ms = node_ms
        self._step_ms = step_ms
        self._read_ms = read_ms
        self._resuming_ms = resuming_ms
        self._ended_s = self._woke_s = -math.inf

    async def open(self, tokens: Sequence[int], sampling: Sampling) -> None:
        self._synced.open(tokens, sampling)
        await self._spend(self._read_ms * len(tokens))

    async def step(self, sequence: Sequence[int]) -> DraftStep | None:
        drafted, read = self._synced.draft(sequence)
        if drafted is None:
            return None
        return DraftStep(drafted, await self._spend_step(self._step_ms(len(sequence)), read))

    @property
    def trees(self) -> bool:
        """Whether :meth:`expand` is supported."""
        return self._synced.trees

    async def expand(self, sequence: Sequence[int], step: TreeStep) -> TreeForward | None:
        """Continue nodes of a tree in the time of a draft step, and ``node_ms`` for each but one."""
        found, read = self._synced.expand(sequence, step)
        if found is None:
            return None
        forward_ms = self._step_ms(len(sequence)) + self._node_ms * (len(step.nodes) - 1)
        return TreeForward(found, await self._spend_step(forward_ms, read))

    async def _spend_step(self, step_ms: float, read: int) -> float:
        # Every step reads one token anyway.
        cost_ms = step_ms + self._read_ms * max(0, read - 1)
        began_s = self._start_s(asyncio.get_running_loop().time())
        cost_ms += self._resuming_ms((began_s - self._ended_s) * 1000.0)
        await self._spend(cost_ms)
        return cost_ms

    async def _spend(self, cost_ms: float) -> None:
        loop = asyncio.get_running_loop()
        requested_s = loop.time()
        self._ended_s = self._start_s(requested_s) + cost_ms / 1000.0
        await asyncio.sleep(max(0.0, self._ended_s - requested_s))
        self._woke_s = loop.time()

    def _start_s(self, requested_s: float) -> float:
        """Loop time at which the device begins the work requested at ``requested_s``."""
        return self._ended_s if requested_s - self._woke_s <= _BACK_TO_BACK_S else requested_s
