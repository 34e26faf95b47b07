"""A verification server in one process, on the running loop's clock: for tests and emulation.

It uses the real server's session state, batching policies and frames, but no threads, sockets or admission. A
function of the batch shape gives the time of a step. On a virtual-time loop, edge, link and server are exact and
repeatable.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from wispprof import protocol
from wispprof.edge.connection import Connection, LinkLost
from wispprof.policies.interface import BatchPolicy, Limits, ScheduledItem
from wispprof.policies.load_level import load_level, slowdown
from wispprof.sessions.session_state import SessionState
from wispprof.types import BatchShape, Sampling, Slo, StepInput, StepTimeEstimator, VerifyResult

__all__ = ["InProcessServer"]

_OVERHEAD_MS = 0.05
"""Time between two steps, as the real engine loop needs."""
_LIMITS = Limits(max_items=64, max_tokens=2048, prefill_chunk=512, kv_free=1 << 20)


class InProcessServer:
    """Serves ``engine`` with ``policy``; each step takes ``step_ms(shape)`` of the loop's time.

    Of the engine, only ``open``, ``step``, ``rollback`` and ``close`` are used. An edge connects with
    :attr:`connect`. While :attr:`refuse` is true, new connections fail.

    >>> from wispprof.edge import EdgeClient, Generation, GenerationRequest
    >>> from wispprof.policies import make_batch_policy
    >>> from wispprof.testing import FakeEngine, FakeEstimator, run_virtual
    >>> async def main():
    ...     estimator = FakeEstimator()
    ...     policy = make_batch_policy("fcfs")
    ...     server = InProcessServer(FakeEngine(), policy, estimator, estimator.step_ms)
    ...     async with server, EdgeClient(server.connect) as client:
    ...         generation = Generation(client, GenerationRequest(tokens=(1, 2, 3), max_new=4))
    ...         await generation.run()
    ...         return generation.output
    >>> run_virtual(main()) == tuple(FakeEngine().target.generate((1, 2, 3), 4))
    True
    """

    def __init__(
        self,
        engine: Engine,
        policy: BatchPolicy,
        estimator: StepTimeEstimator,
        step_ms: Callable[[BatchShape], float],
        *,
        limits: Limits = _LIMITS,
        max_context: int = 1 << 16,
        max_drafts: int = 32,
        target: str = "",
        tokenizer: str = "",
    ) -> None:
        self.engine = engine
        self.policy = policy
        self.estimator = estimator
        self.step_ms = step_ms
        self.limits = limits
        self.max_context = max_context
        self.max_drafts = max_drafts
        self.target = target
        self.tokenizer = tokenizer
        self.steps = 0
        self.refuse = False
        self._sessions: dict[str, _Served] = {}
        self._connections: list[_InProcessConnection] = []
        self._opened = 0
        self._level = 0
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> InProcessServer:
        self._task = asyncio.create_task(self._loop(), name="in-process server")
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cut()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def connect(self) -> Connection:
        """Make a connection; an edge client takes this method as its connection factory."""
        if self.refuse:
            raise LinkLost("The in-process server refuses connections.")
        link = _InProcessConnection(self)
        self._connections.append(link)
        return link

    def cut(self) -> None:
        """Break every connection and forget all sessions, as ``kill -9`` does."""
        for link in self._connections:
            link.cut()
        self._connections.clear()
        for name in list(self._sessions):
            self._drop(name)

    def _drop(self, name: str) -> None:
        entry = self._sessions.pop(name, None)
        if entry is not None and not entry[2].in_flight:
            self.engine.close(name)

    # --- frames ---

    def take(self, link: _InProcessConnection, data: bytes) -> None:
        frame = protocol.decode_edge(data)
        now_ms = asyncio.get_running_loop().time() * 1000.0
        if isinstance(frame, protocol.Hello):
            link.reply(
                protocol.Welcome(
                    protocol.PROTOCOL_VERSION,
                    self.target,
                    self.tokenizer,
                    self.max_context,
                    self.max_drafts,
                    self.policy.stream,
                )
            )
        elif isinstance(frame, protocol.Ping):
            link.reply(protocol.Pong(frame.number, bytes(frame.reply_bytes)))
        elif isinstance(frame, protocol.Open):
            self._open(link, frame, now_ms)
        elif isinstance(frame, protocol.Draft):
            entry = self._sessions.get(link.names.get(frame.session, ""))
            if entry is not None:
                odds = [byte / 255.0 for byte in frame.acceptance_prob]
                entry[2].merge(
                    frame.epoch,
                    frame.base,
                    frame.tokens,
                    odds,
                    now_ms,
                    frame.slack_ms,
                    frame.draft_ms,
                )
        elif isinstance(frame, protocol.Close):
            self._drop(link.names.pop(frame.session, ""))
        self._wake.set()

    def _open(self, link: _InProcessConnection, frame: protocol.Open, now_ms: float) -> None:
        self._drop(link.names.get(frame.session, ""))
        name = f"p{self._opened}"
        self._opened += 1
        session = SessionState(
            name,
            frame.tokens,
            slo=Slo(frame.tokens_per_s, frame.ttft_ms),
            max_new=frame.max_new,
            max_context=self.max_context,
            now_ms=now_ms,
            generated=frame.generated,
            stop=frame.stop,
            stream=self.policy.stream and not frame.undrafted,
            undrafted=frame.undrafted,
            max_pending_drafts=self.max_drafts,
        )
        sampling = Sampling(frame.temperature, frame.top_k, frame.top_p, frame.seed)
        self.engine.open(name, sampling, frame.tokens)
        link.names[frame.session] = name
        self._sessions[name] = (link, frame.session, session)

    # --- steps ---

    async def _loop(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._wake.clear()
            now_ms = loop.time() * 1000.0
            views = [
                entry[2].view(now_ms) for entry in self._sessions.values() if not entry[2].finished
            ]
            plan = self.policy.plan(now_ms, views, self.estimator, self.limits)
            if plan.items:
                await self._step(plan.items)
                continue
            wait_s = None if plan.wake_ms is None else max(0.0, plan.wake_ms / 1000.0 - loop.time())
            try:
                async with asyncio.timeout(wait_s):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def _step(self, members: Sequence[ScheduledItem]) -> None:
        loop = asyncio.get_running_loop()
        begun_ms = loop.time() * 1000.0
        taking = [self._sessions[member.session] for member in members]
        feeds = [
            entry[2].feed(member, begun_ms) for entry, member in zip(taking, members, strict=True)
        ]
        shape = BatchShape.of(
            (len(feed.tokens), entry[2].cached, bool(member.prefill))
            for feed, entry, member in zip(feeds, taking, members, strict=True)
        )
        self._level = load_level(
            slowdown(self.estimator, (e[2].cached for e in self._sessions.values())), self._level
        )
        outcomes = self.engine.step(feeds)
        await asyncio.sleep(self.step_ms(shape) / 1000.0)
        self.steps += 1
        now_ms = loop.time() * 1000.0
        for (link, number, session), outcome in zip(taking, outcomes, strict=True):
            done = session.apply(outcome, now_ms)
            if session.session not in self._sessions:  # its edge left meanwhile
                self.engine.close(session.session)
                continue
            if done.rollback is not None:
                self.engine.rollback(session.session, done.rollback)
            if done.tokens:
                link.reply(
                    protocol.Commit(
                        number,
                        done.epoch,
                        done.committed_len,
                        list(done.tokens),
                        done.accepted,
                        done.drafted,
                        protocol.brief_ms(done.queue_ms),
                        protocol.brief_ms(now_ms - begun_ms),
                        self._level,
                        done.finished,
                    )
                )
            if done.finished:
                self._drop(session.session)
        await asyncio.sleep(_OVERHEAD_MS / 1000.0)


class _InProcessConnection:
    """One connection: frames go straight into the server, answers into a queue."""

    def __init__(self, server: InProcessServer) -> None:
        self.names: dict[int, str] = {}
        self._server = server
        self._down: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._gone = False

    def reply(self, frame: protocol.ServerFrame) -> None:
        if not self._gone:
            self._down.put_nowait(protocol.encode(frame))

    def cut(self) -> None:
        self._gone = True
        self._down.put_nowait(None)

    async def send(self, data: bytes) -> None:
        if self._gone:
            raise LinkLost("The in-process server cut the connection.")
        self._server.take(self, data)

    async def receive(self) -> bytes:
        data = None if self._gone else await self._down.get()
        if data is None:
            raise LinkLost("The in-process server cut the connection.")
        return data

    async def close(self) -> None:
        self._gone = True
        for name in self.names.values():
            self._server._drop(name)
        self.names.clear()
