"""One generation on the edge: draft, send, take in commits, until the server says it is finished.

Each pass sends what is due, starts a draft step if one may run, and sleeps until the step ends or a commit
arrives. A commit takes effect when it arrives, even during a draft step: its tokens go to the user at once.
:class:`~wispprof.sessions.edge_session.EdgeSession` decides what to draft and when to send. A fault of the
draft model ends the drafting, never the answer.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, Coroutine, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from wispprof import protocol
from wispprof.edge import server_frames
from wispprof.edge.client import EdgeClient
from wispprof.edge.connection import Traffic
from wispprof.edge.draft_results import StepResult, is_foreign, take_step
from wispprof.edge.draft_worker import CatchUp, DraftWorker
from wispprof.edge.reopening import Reopening
from wispprof.edge.request_stats import RequestStats
from wispprof.edge.round_record import RoundWatch, held_by
from wispprof.errors import RuntimeFault, ServerUnreachable
from wispprof.policies.interface import Controller
from wispprof.sessions.draft_buffer import DraftBuffer
from wispprof.sessions.edge_session import EdgeSession
from wispprof.sessions.tree_drafting import TreeStep
from wispprof.settings.edge_settings import DraftingSettings
from wispprof.token_tree import MAX_NODES
from wispprof.types import GenerationRequest, TokenChunk

log = logging.getLogger("wispprof.edge")

_LAST_STEP_S = 1.0
"""How long the end of an answer waits for the draft step under way."""

_T = TypeVar("_T")


class Generation:
    """One request. Without ``worker`` and ``controller`` the session is undrafted (server-only).

    ``fallback``: if no server can be reached any more, continue with the draft model alone and mark its
    tokens; otherwise the error is raised. ``watch`` reports the rounds. Run it once, by :meth:`run` or by
    iterating :meth:`stream`.
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
        watch: RoundWatch | None = None,
    ) -> None:
        if (worker is None) != (controller is None):
            raise ValueError("A drafting session needs both a worker and a controller.")
        server_frames.check_request(request)
        self.request = request
        self.traffic = Traffic()
        self.stats = RequestStats(drafting=worker is not None)
        self._client = client
        self._worker = worker
        self._controller = controller
        self._watch = watch
        self._undrafted = worker is None
        self._settings = settings = settings or DraftingSettings()
        self._fallback = fallback and worker is not None
        most = MAX_NODES
        if client.welcome is not None:
            most = min(most, client.welcome.max_drafts)
            settings = replace(settings, draft_ahead=min(settings.draft_ahead, most))
        self._session = EdgeSession(
            request.tokens,
            request.max_new,
            request.slo,
            settings,
            controller,
            stop=request.stop_tokens,
            stream=self._stream_mode(),
            trees=self._trees,
            max_drafts=most,
        )
        self._number = -1
        self._finished = ""
        self._err: RuntimeFault | None = None
        self._wake = asyncio.Event()
        self._chunks: asyncio.Queue[TokenChunk | None] = asyncio.Queue()
        self._reopening = Reopening(client, self.failed)

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
        session, worker, request = self._session, self._worker, self.request
        self.stats.begun_ms = begun_ms = _now_ms()
        step: asyncio.Task[StepResult] | None = None
        prefill: asyncio.Task[None] | None = None
        try:
            self._number = self._client.open(self)
            if worker is not None:
                # The drafter masks the same tokens as the target.
                sampling = replace(request.sampling, stop_tokens=request.stop_tokens)
                prefill = self._spawn(worker.open(request.tokens, sampling))
            while not self._finished and self._err is None:
                self._wake.clear()
                session.rtt_ms = self._client.rtt.mean_ms
                session.load_level = self._client.load_level
                if prefill is not None and prefill.done():
                    self._end_prefill(prefill)
                    prefill = None
                if step is not None and step.done():
                    self._end_step(step, begun_ms)
                    step = None
                if worker is not None and not self._undrafted:
                    self._send_due()
                    now_ms = _now_ms()
                    if step is None and prefill is None and session.may_draft(now_ms):
                        begun_ms = now_ms
                        # Both now: a commit may come before the task runs.
                        tree_step, sequence = session.begin_step(), self.buffer.sequence()
                        step = self._spawn(self._draft(worker, tree_step, sequence))
                await self._wake.wait()
            alone = self._fallback and isinstance(self._err, ServerUnreachable) and not self._undrafted
            running = {task for task in (prefill, step) if task is not None}
            if running:  # the device should be free for the next request
                done, _ = await asyncio.wait(running, timeout=None if alone else _LAST_STEP_S)
                self.stats.late += step is not None
                for err in (task.exception() for task in done):
                    if err is not None:
                        self._stop_drafting(err)
            if self._err is not None and not (alone and await self._draft_alone()):
                raise self._err
        finally:
            for task in (prefill, step):
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
        self._reopening.cancel()
        self._client.close(self._number, tell=not self._finished)
        stats = self.stats
        stats.finished = self._finished
        stats.declined = self._session.scheduler.declined
        stats.rtt_ms = self._client.rtt.mean_ms
        stats.up_bytes, stats.down_bytes = self.traffic.up_bytes, self.traffic.down_bytes
        row = getattr(self._controller, "row", None)
        stats.plan_row = "" if row is None else row.cell
        stats.drafted += self.buffer.new_nodes()
        dropped, dropped_ms = self.buffer.undecided
        stats.dropped += dropped
        stats.dropped_ms += dropped_ms
        self._chunks.put_nowait(None)

    # --- drafting ---

    def _end_prefill(self, prefill: asyncio.Task[None]) -> None:
        if (err := prefill.exception()) is not None:
            self._stop_drafting(err)
        else:
            self.stats.prefill_ms = _now_ms() - self.stats.begun_ms

    async def _draft(
        self, worker: DraftWorker, tree_step: TreeStep | None, sequence: Sequence[int]
    ) -> StepResult:
        if tree_step is None:
            return await worker.step(sequence)
        return await worker.expand(sequence, tree_step)  # type: ignore[attr-defined, no-any-return]

    def _end_step(self, task: asyncio.Task[StepResult], begun_ms: float) -> None:
        if (err := task.exception()) is not None:
            self._stop_drafting(err)
            return
        take_step(self._session, self.stats, task.result(), _now_ms() - begun_ms, self._vocab_size)
        self.stats.drafted += self.buffer.new_nodes()

    def _stop_drafting(self, err: BaseException) -> None:
        """The draft model failed: the server continues without drafts."""
        if self._undrafted:
            return
        self.stats.draft_fault = f"{type(err).__name__}: {err}"[:300]
        log.warning("a request continues without drafts: %s", self.stats.draft_fault)
        self._undrafted = True
        self._session.scheduler.stop()
        if not self._finished:
            self._client.reopen(self._number)

    def set_drafting(self, on: bool) -> None:
        """Stop drafting, or go on with it. The session is opened again from its committed tokens: without
        drafts the server advances it by itself. Changes nothing without a draft model that works."""
        if self._worker is None or self.stats.draft_fault or on is not self._undrafted:
            return
        self._undrafted = not on
        self.stats.drafting = on or self._number >= 0
        if on:
            assert self._controller is not None
            self._session.scheduler.resume(self._controller)
        else:
            self._session.scheduler.stop()
        if self._number >= 0 and not self._finished:
            self._client.reopen(self._number)
        self._wake.set()

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
            protocol.parent_bytes(frame.parents),
        )
        if self._client.draft(message):
            self.stats.sent += len(frame.tokens)
            self.stats.trees += bool(frame.parents)

    async def _draft_alone(self) -> bool:
        """Without a server, continue with the draft model, unverified. Returns whether that worked."""
        assert self._worker is not None
        sequence = list(self.buffer.committed)
        stats, stop = self.stats, frozenset(self.request.stop_tokens)
        while stats.tokens + stats.draft_only < self.request.max_new:
            try:
                step = await self._worker.step(sequence)
            except Exception as err:
                self._stop_drafting(err)
                return False
            if isinstance(step, CatchUp):
                continue
            if step is None or is_foreign(stats, step.drafted.token, self._vocab_size):
                break
            sequence.append(step.drafted.token)
            stats.drafted += 1
            stats.draft_ms += step.draft_ms
            stats.draft_only += 1
            if self._watch is not None:
                self._watch.unverified(_now_ms() - stats.begun_ms, stats)
            self._chunks.put_nowait(TokenChunk((step.drafted.token,), verified=False))
            if step.drafted.token in stop:
                self._finished = "stop"
                return True
        self._finished = "length"
        return True

    # --- calls of the client (wispprof.edge.client.GenerationListener) ---

    def opening(self) -> protocol.Open:
        self._reopening.opening()
        return protocol.open_frame(self.request, self.buffer.committed, self._undrafted)

    def committed(self, commit: protocol.Commit) -> None:
        """Take in a commit. Raises :class:`ProtocolError` if no correct server sends it."""
        if self._finished:
            return
        end = len(self.request.tokens) + self.request.max_new
        server_frames.check_commit(commit, end, self._vocab_size)
        now_ms, server_ms = _now_ms(), commit.queue_ms + commit.verify_ms
        held = held_by(self.buffer) if self._watch is not None else ()
        effect = self._session.on_commit(
            now_ms, commit.committed_len, commit.tokens, commit.accepted, commit.drafted, server_ms
        )
        if effect is None:
            self._client.reopen(self._number)
            return
        if effect.tokens:
            self._reopening.answered()
            stats = self.stats
            stats.commit(effect, now_ms, commit.drafted)
            stats.queue_ms += commit.queue_ms
            stats.verify_ms += commit.verify_ms
            stats.dropped += effect.dropped_tokens
            stats.dropped_ms += effect.dropped_ms
            if self._watch is not None:
                rtt_ms, drafting = self._client.rtt.mean_ms, not self._undrafted
                self._watch.committed(effect, held, commit, stats, rtt_ms, drafting)
            known = len(commit.tokens) - len(effect.tokens)
            self._chunks.put_nowait(TokenChunk(effect.tokens, tuple(commit.logprobs[known:])))
        if commit.finished or self.buffer.committed_len == end:
            self._finished = commit.finished or "length"
        self._wake.set()

    def refused(self, problem: protocol.Problem) -> None:
        self._reopening.refused(self._number, problem)

    def reopened(self) -> None:
        self._reopening.reopened()
        self.stats.reopened = self._reopening.openings - 1
        dropped, dropped_ms = self._session.reopened(self._stream_mode(), self._trees)
        self.stats.dropped += dropped
        self.stats.dropped_ms += dropped_ms
        self._wake.set()

    def lost(self) -> None:
        self._reopening.lost(self._number)
        self._wake.set()

    def failed(self, err: RuntimeFault) -> None:
        if not self._finished:
            self._err = err
        self._wake.set()

    @property
    def _vocab_size(self) -> int:
        """The target's, 0 if unknown."""
        target = self._client.target
        return target.vocab_size if target is not None else 0

    @property
    def _trees(self) -> bool:
        """Whether drafts may be trees: by the settings, the draft model and the server."""
        welcome = self._client.welcome
        able = getattr(self._worker, "trees", False) and welcome is not None and welcome.trees
        return able and self._settings.tree_nodes != 0

    def _stream_mode(self) -> bool:
        chosen = self._settings.stream
        welcome = self._client.welcome
        return chosen if chosen is not None else bool(welcome and welcome.stream)


def _now_ms() -> float:
    return asyncio.get_running_loop().time() * 1000.0
