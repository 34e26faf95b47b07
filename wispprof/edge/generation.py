"""One generation on the edge: draft, send, take in commits, until the server says it is finished.

One loop serves both modes. Each pass sends what is due, starts a draft step if one may run, and sleeps
until the step ends or a commit arrives. A commit takes effect when it arrives, even during a draft step:
its tokens go to the user at once. What to draft and when to send is
:class:`~wispprof.sessions.edge_session.EdgeSession`'s decision.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Coroutine
from dataclasses import replace
from typing import Any, TypeVar

from wispprof import protocol
from wispprof.edge.client import EdgeClient
from wispprof.edge.connection import Traffic
from wispprof.edge.draft_worker import DraftStep, DraftWorker
from wispprof.edge.request_stats import RequestStats
from wispprof.errors import ProtocolError, RuntimeFault, ServerBusy, ServerUnreachable
from wispprof.policies.interface import Controller
from wispprof.sessions.draft_buffer import DraftBuffer
from wispprof.sessions.edge_session import EdgeSession
from wispprof.settings.edge_settings import DraftingSettings
from wispprof.types import GenerationRequest, TokenChunk

_REOPEN_MS = {"busy": 200.0, "draining": 500.0, "session": 0.0, "internal": 200.0}
_MAX_INTERNAL_ERRORS = 3
_T = TypeVar("_T")


class Generation:
    """One request. Without ``worker`` and ``controller`` the session is undrafted (server-only).

    ``fallback``: if no server can be reached any more, continue with the draft model alone and mark its
    tokens; otherwise the error is raised. Run it once, by :meth:`run` or by iterating :meth:`stream`.
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
            raise ValueError("A drafting session needs both a worker and a controller.")
        self.request = request
        self.traffic = Traffic()
        self.stats = RequestStats()
        self._client = client
        self._worker = worker
        self._settings = settings = settings or DraftingSettings()
        self._fallback = fallback and worker is not None
        if client.welcome is not None:
            draft_ahead = min(settings.draft_ahead, client.welcome.max_drafts)
            settings = replace(settings, draft_ahead=draft_ahead)
        self._session = EdgeSession(
            request.tokens,
            request.max_new,
            request.slo,
            settings,
            controller,
            stop=request.stop_tokens,
            stream=self._stream_mode(),
        )
        self._number = -1
        self._finished = ""
        self._err: RuntimeFault | None = None
        self._wake = asyncio.Event()
        self._chunks: asyncio.Queue[TokenChunk | None] = asyncio.Queue()
        self._reopening: asyncio.TimerHandle | None = None
        self._openings = 0
        self._internal_errors = 0

    @property
    def buffer(self) -> DraftBuffer:
        return self._session.buffer

    @property
    def output(self) -> tuple[int, ...]:
        """Committed tokens beyond the prompt."""
        return self.buffer.committed[len(self.request.tokens) :]

    # --- running ---

    async def run(self) -> RequestStats:
        """Generate to the end; raises what ended it early."""
        session, worker = self._session, self._worker
        self.stats.begun_ms = _now_ms()
        step: asyncio.Task[DraftStep | None] | None = None
        opening: asyncio.Task[None] | None = None
        try:
            try:
                self._number = self._client.open(self)
            except ServerUnreachable as err:
                self._err = err
            if worker is not None:
                opening = self._spawn(worker.open(self.request.tokens, self.request.sampling))
            begun_ms = 0.0
            while not self._finished and self._err is None:
                self._wake.clear()
                session.rtt_ms = self._client.rtt.mean_ms
                session.load_level = self._client.load_level
                if opening is not None and opening.done():
                    opening = opening.result()
                if step is not None and step.done():
                    self._end_step(step.result(), begun_ms)
                    step = None
                if worker is not None:
                    self._send_due()
                    now_ms = _now_ms()
                    if step is None and opening is None and session.may_draft(now_ms):
                        begun_ms = now_ms
                        session.begin_step()
                        step = self._spawn(worker.step(self.buffer.sequence()))
                await self._wake.wait()
            running = {task for task in (opening, step) if task is not None}
            if running:  # a worker must not be left in the middle of a step
                await asyncio.wait(running)
            if self._err is not None:
                if not (self._fallback and isinstance(self._err, ServerUnreachable)):
                    raise self._err
                await self._draft_alone()
        finally:
            for task in (opening, step):
                if task is not None:
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)
            self._end()
        return self.stats

    async def stream(self) -> AsyncGenerator[TokenChunk]:
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
        left = self.buffer.drafts
        stats.dropped += len(left)
        stats.dropped_ms += sum(held.draft_ms for held in left)
        self._chunks.put_nowait(None)

    # --- drafting ---

    def _end_step(self, step: DraftStep | None, begun_ms: float) -> None:
        if step is None:
            self._session.scheduler.nothing_to_draft()
            return
        stats = self.stats
        stats.drafted += 1
        stats.draft_ms += step.draft_ms
        waited_ms = max(0.0, _now_ms() - begun_ms - step.draft_ms)
        wasted_ms = self._session.end_step(lambda: step.drafted, step.draft_ms, waited_ms)
        if wasted_ms is not None:
            stats.dropped += 1
            stats.dropped_ms += step.draft_ms
            stats.wasted_ms += wasted_ms

    def _send_due(self) -> None:
        now_ms = _now_ms()
        frame = self._session.next_frame(now_ms) if self._client.up else None
        if frame is None:
            return
        message = protocol.Draft(
            self._number,
            frame.epoch,
            frame.base,
            list(frame.tokens),
            bytes(protocol.acceptance_byte(p) for p in frame.acceptance_prob),
            round(frame.draft_ms),
            math.floor(self._session.sent(frame, now_ms)),
        )
        if self._client.draft(message):
            self.stats.sent += len(frame.tokens)

    async def _draft_alone(self) -> None:
        """Without a server, continue with the draft model; every token is marked unverified."""
        assert self._worker is not None
        sequence = list(self.buffer.committed)
        stop = frozenset(self.request.stop_tokens)
        while self.stats.tokens + self.stats.draft_only < self.request.max_new:
            step = await self._worker.step(sequence)
            if step is None:
                break
            sequence.append(step.drafted.token)
            self.stats.drafted += 1
            self.stats.draft_ms += step.draft_ms
            self.stats.draft_only += 1
            self._chunks.put_nowait(TokenChunk((step.drafted.token,), verified=False))
            if step.drafted.token in stop:
                self._finished = "stop"
                return
        self._finished = "length"

    # --- calls of the client (wispprof.edge.client.GenerationListener) ---

    def opening(self) -> protocol.Open:
        self._openings += 1
        request, buffer = self.request, self.buffer
        sampling = request.sampling
        return protocol.Open(
            session=0,
            tokens=list(buffer.committed),
            max_new=request.max_new,
            generated=buffer.committed_len - len(request.tokens),
            tokens_per_s=request.slo.tokens_per_s,
            ttft_ms=request.slo.ttft_ms,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            seed=sampling.seed,
            stop=list(request.stop_tokens),
            undrafted=self._worker is None,
        )

    def committed(self, commit: protocol.Commit) -> None:
        now_ms, server_ms = _now_ms(), commit.queue_ms + commit.verify_ms
        try:
            effect = self._session.on_commit(
                now_ms,
                commit.committed_len,
                commit.tokens,
                commit.accepted,
                commit.drafted,
                server_ms,
            )
        except ProtocolError as err:
            self.failed(err)
            return
        if effect is None:
            self._client.reopen(self._number)
            return
        if effect.tokens:
            stats = self.stats
            stats.commit(effect, now_ms, commit.drafted)
            stats.queue_ms += commit.queue_ms
            stats.verify_ms += commit.verify_ms
            stats.dropped += effect.dropped_tokens
            stats.dropped_ms += effect.dropped_ms
            self._chunks.put_nowait(TokenChunk(effect.tokens))
        if commit.finished:
            self._finished = commit.finished
        self._wake.set()

    def refused(self, problem: protocol.Problem) -> None:
        self._internal_errors += problem.code == "internal"
        wait_ms = _REOPEN_MS.get(problem.code)
        if wait_ms is None or self._internal_errors > _MAX_INTERNAL_ERRORS:
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
        self._session.reopened(self._stream_mode())
        self._wake.set()

    def lost(self) -> None:
        self._wake.set()

    def failed(self, err: RuntimeFault) -> None:
        if not self._finished:
            self._err = err
        self._wake.set()

    def _stream_mode(self) -> bool:
        chosen = self._settings.stream
        welcome = self._client.welcome
        return chosen if chosen is not None else bool(welcome and welcome.stream)


def _now_ms() -> float:
    return asyncio.get_running_loop().time() * 1000.0
