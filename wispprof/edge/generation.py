"""One generation on the edge: draft, send, take commits in, until the server says it is finished.

One loop serves both modes. Each turn it sends what is due, starts a draft step if one may be drafted and
none is running, and sleeps until the step ends or a commit arrives. A commit changes the path the moment
it arrives, even while a draft step runs: its tokens go to the user at once, and a step whose place has
meanwhile been decided is thrown away when it ends.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Coroutine
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from wispprof import protocol
from wispprof.edge.client import EdgeClient
from wispprof.edge.connection import Traffic
from wispprof.edge.draft_worker import DraftStep, DraftWorker
from wispprof.edge.request_stats import RequestStats
from wispprof.errors import ProtocolError, RuntimeFault, ServerBusy, ServerUnreachable
from wispprof.policies.api import Controller, RoundContext
from wispprof.sessions.draft_buffer import DraftBuffer, Outgoing
from wispprof.sessions.draft_scheduler import DraftScheduler
from wispprof.sessions.edge_timing import EdgeTiming
from wispprof.settings.edge_settings import DraftingSettings
from wispprof.types import Sampling, Slo

__all__ = ["Chunk", "Generation", "GenerationRequest"]

_REOPEN_MS = {"busy": 200.0, "draining": 500.0, "session": 0.0, "internal": 200.0}
_INTERNAL_FAULTS = 3
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What to generate: at most ``max_new`` tokens after ``tokens``, ended early by a ``stop`` token."""

    tokens: tuple[int, ...]
    max_new: int
    sampling: Sampling = field(default_factory=Sampling)
    slo: Slo = field(default_factory=lambda: Slo(tokens_per_s=1.0))
    stop: tuple[int, ...] = ()


class Chunk(NamedTuple):
    """Tokens for the user. ``verified`` is false where the draft model went on without a server."""

    tokens: tuple[int, ...]
    verified: bool = True


class Generation:
    """One request. Without ``worker`` and ``controller`` the session is undrafted (server-only).

    ``fallback``: when no server can be reached any more, go on with the draft alone and mark it;
    otherwise the fault is raised. Run it once, by :meth:`run` or by iterating :meth:`stream`.
    """

    def __init__(
        self,
        client: EdgeClient,
        request: GenerationRequest,
        worker: DraftWorker | None = None,
        controller: Controller | None = None,
        settings: DraftingSettings | None = None,
        *,
        fallback: bool = False,
    ) -> None:
        if (worker is None) != (controller is None):
            raise ValueError("a drafting session needs both a worker and a controller")
        self.request = request
        self.traffic = Traffic()
        self.stats = RequestStats()
        self._client = client
        self._worker = worker
        self._settings = settings = settings or DraftingSettings()
        self._fallback = fallback and worker is not None
        welcome = client.welcome
        self._buffer = DraftBuffer(
            request.tokens,
            stream=self._stream_mode(),
            draft_ahead_limit=min(
                settings.draft_ahead, welcome.max_drafts if welcome else settings.draft_ahead
            ),
            end=len(request.tokens) + request.max_new,
        )
        self._timing = EdgeTiming(request.slo, settings.carry)
        self._scheduler = DraftScheduler(self._buffer, controller, settings, request.stop)
        self._number = -1
        self._finished = ""
        self._fault: RuntimeFault | None = None
        self._wake = asyncio.Event()
        self._chunks: asyncio.Queue[Chunk | None] = asyncio.Queue()
        self._reopening: asyncio.TimerHandle | None = None
        self._openings = 0
        self._internal_faults = 0

    @property
    def path(self) -> DraftBuffer:
        return self._buffer

    @property
    def output(self) -> tuple[int, ...]:
        """Committed tokens beyond the prompt."""
        return self._buffer.committed[len(self.request.tokens) :]

    # --- running ---

    async def run(self) -> RequestStats:
        """Generate to the end; raises what ended it early."""
        loop = asyncio.get_running_loop()
        self.stats.begun_ms = loop.time() * 1000.0
        step: asyncio.Task[DraftStep | None] | None = None
        opening: asyncio.Task[None] | None = None
        try:
            try:
                self._number = self._client.open(self)
            except ServerUnreachable as err:
                self._fault = err
            if self._worker is not None:
                opening = self._spawn(self._worker.open(self.request.tokens, self.request.sampling))
            place = (0, 0, 0.0)
            while not self._finished and self._fault is None:
                self._wake.clear()
                if opening is not None and opening.done():
                    opening = opening.result()
                if step is not None and step.done():
                    self._absorb(step.result(), *place)
                    step = None
                self._send_due()
                if step is None and opening is None and self._worker and self._may_draft():
                    place = (self._buffer.length, self._buffer.epoch, loop.time() * 1000.0)
                    step = self._spawn(self._worker.step(self._buffer.sequence()))
                await self._wake.wait()
            running = {task for task in (opening, step) if task is not None}
            if running:  # a worker must not be left in the middle of a step
                await asyncio.wait(running)
            if self._fault is not None:
                if not (self._fallback and isinstance(self._fault, ServerUnreachable)):
                    raise self._fault
                await self._draft_alone()
        finally:
            for task in (opening, step):
                if task is not None:
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)
            self._end()
        return self.stats

    async def stream(self) -> AsyncGenerator[Chunk]:
        """Generate, handing out tokens as they are committed."""
        task = asyncio.create_task(self.run(), name="generation")
        try:
            while (chunk := await self._chunks.get()) is not None:
                yield chunk
            await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def _spawn(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        task = asyncio.create_task(work)
        task.add_done_callback(lambda _: self._wake.set())
        return task

    def _end(self) -> None:
        if self._reopening is not None:
            self._reopening.cancel()
        self._client.close(self._number, tell=not self._finished)
        stats = self.stats
        stats.finished = self._finished
        stats.rtt_ms = self._client.rtt.mean_ms
        stats.up_bytes, stats.down_bytes = self.traffic.up_bytes, self.traffic.down_bytes
        left = self._buffer.drafts
        stats.dropped += len(left)
        stats.dropped_ms += sum(held.draft_ms for held in left)
        self._chunks.put_nowait(None)

    # --- drafting ---

    def _absorb(self, step: DraftStep | None, position: int, epoch: int, begun_ms: float) -> None:
        """Take a finished draft step in, unless its place has been decided meanwhile."""
        if step is None:
            self._scheduler.nothing_to_draft()
            return
        stats, path = self.stats, self._buffer
        stats.drafted += 1
        stats.draft_ms += step.draft_ms
        took_ms = asyncio.get_running_loop().time() * 1000.0 - begun_ms
        self._timing.drafted(step.draft_ms, max(0.0, took_ms - step.draft_ms))
        if path.epoch != epoch or path.length != position:
            stats.dropped += 1
            stats.dropped_ms += step.draft_ms
            if path.epoch != epoch:
                stats.wasted_ms += step.draft_ms
            return
        path.propose(step.drafted.token, 1.0, step.draft_ms)
        self._scheduler.drafted(step.drafted)

    def _may_draft(self) -> bool:
        now_ms = asyncio.get_running_loop().time() * 1000.0
        left_ms = self._timing.left_ms(now_ms, self._client.rtt.mean_ms)
        return self._scheduler.may_draft(left_ms, self._timing.draft_ms)

    def _send_due(self) -> None:
        """Send whatever the mode and the controller say is due now."""
        if self._worker is None or not self._client.up:
            return
        now_ms = asyncio.get_running_loop().time() * 1000.0
        hold = self._timing.may_hold(now_ms, self._client.rtt.mean_ms)
        while (out := self._scheduler.due(self._context, hold)) is not None:
            self._send(out)

    def _context(self, draft_ahead: int) -> RoundContext:
        return self._timing.context(self._client.rtt.mean_ms, self._client.load_level, draft_ahead)

    def _send(self, out: Outgoing) -> None:
        now_ms = asyncio.get_running_loop().time() * 1000.0
        slack_ms = 0  # a stream's deadlines are set by its pace
        if not self._buffer.stream:
            left_ms = self._timing.slack_ms(out.acceptance_prob, now_ms, self._client.rtt.mean_ms)
            slack_ms = math.floor(left_ms)
        acceptance_prob = bytes(protocol.acceptance_byte(p) for p in out.acceptance_prob)
        frame = protocol.Draft(
            self._number,
            out.epoch,
            out.base,
            list(out.tokens),
            acceptance_prob,
            round(out.draft_ms),
            slack_ms,
        )
        self._timing.sent(now_ms)
        if self._client.draft(frame):
            self.stats.sent += len(out.tokens)

    async def _draft_alone(self) -> None:
        """No server: the draft model goes on by itself, and every token says so."""
        assert self._worker is not None
        sequence = list(self._buffer.committed)
        stop = frozenset(self.request.stop)
        while self.stats.tokens + self.stats.draft_only < self.request.max_new:
            step = await self._worker.step(sequence)
            if step is None:
                break
            sequence.append(step.drafted.token)
            self.stats.drafted += 1
            self.stats.draft_ms += step.draft_ms
            self.stats.draft_only += 1
            self._chunks.put_nowait(Chunk((step.drafted.token,), verified=False))
            if step.drafted.token in stop:
                self._finished = "stop"
                return
        self._finished = "length"

    # --- what the client tells (wispprof.edge.client.GenerationListener) ---

    def opening(self) -> protocol.Open:
        self._openings += 1
        request, path = self.request, self._buffer
        sampling = request.sampling
        return protocol.Open(
            session=0,
            tokens=list(path.committed),
            max_new=request.max_new,
            generated=path.committed_len - len(request.tokens),
            tokens_per_s=request.slo.tokens_per_s,
            ttft_ms=request.slo.ttft_ms,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            seed=sampling.seed,
            stop=list(request.stop),
            undrafted=self._worker is None,
        )

    def committed(self, commit: protocol.Commit) -> None:
        now_ms = asyncio.get_running_loop().time() * 1000.0
        path, stats = self._buffer, self.stats
        known = path.committed_len
        try:
            effect = path.on_commit(
                commit.committed_len, commit.tokens, commit.accepted, commit.drafted
            )
        except ProtocolError as err:
            if commit.committed_len - len(commit.tokens) > known:
                self._client.reopen(self._number)  # a commit was lost on the way
            else:
                self.failed(err)
            return
        if effect.tokens:
            stats.commit(effect, now_ms, commit.drafted)
            stats.queue_ms += commit.queue_ms
            stats.verify_ms += commit.verify_ms
            if effect.rejected:
                stats.dropped += 1 + effect.wasted_tokens
                stats.dropped_ms += effect.dropped_ms
            self._timing.committed(now_ms, commit.queue_ms + commit.verify_ms, len(effect.tokens))
            self._scheduler.committed(effect, commit.drafted)
            self._chunks.put_nowait(Chunk(effect.tokens))
        if commit.finished:
            self._finished = commit.finished
        self._wake.set()

    def refused(self, problem: protocol.Problem) -> None:
        self._internal_faults += problem.code == "internal"
        wait_ms = _REOPEN_MS.get(problem.code)
        if wait_ms is None or self._internal_faults > _INTERNAL_FAULTS:
            err = RuntimeFault(f"The server refused this request: {problem.message}")
            if problem.code == "slo":
                err = ServerBusy(problem.message, problem.retry_ms, "Ask for less speed, or later.")
            self.failed(err)
            return
        if self._reopening is not None:
            self._reopening.cancel()
        self._reopening = asyncio.get_running_loop().call_later(
            max(wait_ms, problem.retry_ms) / 1000.0, self._client.reopen, self._number
        )

    def reopened(self) -> None:
        self.stats.reopened = self._openings - 1
        self._buffer.stream = self._stream_mode()
        self._buffer.reopened()
        self._scheduler.reset()
        self._wake.set()

    def lost(self) -> None:
        self._wake.set()

    def failed(self, err: RuntimeFault) -> None:
        if not self._finished:
            self._fault = err
        self._wake.set()

    def _stream_mode(self) -> bool:
        chosen = self._settings.stream
        welcome = self._client.welcome
        return chosen if chosen is not None else bool(welcome and welcome.stream)
