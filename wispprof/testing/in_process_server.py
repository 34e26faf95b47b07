"""A verification server in one process, on the running loop's clock: for tests and emulation.

It uses the real server's session state, batching policies and frames, but no threads, sockets or admission. A
function of the batch shape gives the time of a step. On a virtual-time loop, edge, link and server are exact
and repeatable.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import NamedTuple

from wispprof import protocol
from wispprof.backends import Engine
from wispprof.edge.connection import Connection, LinkLost
from wispprof.policies.cost_model import load_level, slowdown
from wispprof.policies.interface import BatchPolicy, Limits, ScheduledItem
from wispprof.sessions.session_state import SessionState
from wispprof.types import BatchShape, Sampling, Slo, StepTimeEstimator

_OVERHEAD_MS = 0.05
"""Time between two steps, as the real engine loop needs."""
_LIMITS = Limits(max_items=64, max_tokens=2048, prefill_chunk=512, kv_free=1 << 20)
_MAX_CONTEXT, _MAX_DRAFTS = 1 << 16, 32


class _ConnectedSession(NamedTuple):
    """A session and where its commits go: the edge knows it by ``number``."""

    connection: _InProcessConnection
    number: int
    state: SessionState


class InProcessServer:
    """Serves ``engine`` with ``policy``; a step takes ``step_ms(shape)``, by default the estimator's median.

    Edges connect with :attr:`connect`; while :attr:`refuse` is true, that fails. Set :attr:`identity`
    and :attr:`vocab_size` to tell the edges those of the target. Of the engine, only ``capabilities``,
    ``open``, ``step``, ``rollback`` and ``close`` are used.

    >>> from wispprof.edge import EdgeClient, Generation, GenerationRequest
    >>> from wispprof.policies import make_batch_policy
    >>> from wispprof.policies.linear_cost import LinearCost
    >>> from wispprof.testing import FakeEngine, run_virtual
    >>> async def main():
    ...     server = InProcessServer(FakeEngine(), make_batch_policy("fcfs"), LinearCost(fixed_ms=8.0))
    ...     async with server, EdgeClient(server.connect) as client:
    ...         generation = Generation(client, GenerationRequest(tokens=(1, 2, 3), max_new=4))
    ...         await generation.run()
    ...         return list(generation.output)
    >>> run_virtual(main()) == FakeEngine().target.generate((1, 2, 3), 4)
    True
    """

    def __init__(
        self,
        engine: Engine,
        policy: BatchPolicy,
        estimator: StepTimeEstimator,
        step_ms: Callable[[BatchShape], float] | None = None,
    ) -> None:
        self.engine = engine
        self.policy = policy
        self.estimator = estimator
        self.step_ms = step_ms or (lambda shape: estimator.predict(shape)[0])
        self.steps = 0
        self.refuse = False
        self.identity = ""
        self.vocab_size = 0
        self._sessions: dict[str, _ConnectedSession] = {}
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
        """Make a connection; this method is the connection factory of an edge client."""
        if self.refuse:
            raise LinkLost("The in-process server refuses connections.")
        connection = _InProcessConnection(self)
        self._connections.append(connection)
        return connection

    def cut(self) -> None:
        """Break every connection and forget all sessions, as ``kill -9`` does."""
        for connection in self._connections:
            connection.cut()
        self._connections.clear()
        for name in list(self._sessions):
            self.close_session(name)

    def close_session(self, name: str) -> None:
        """Forget a session; if a step is running on it, its engine session closes after the step."""
        session = self._sessions.pop(name, None)
        if session is not None and not session.state.in_flight:
            self.engine.close(name)

    # --- frames ---

    def receive(self, connection: _InProcessConnection, data: bytes) -> None:
        """Handle a frame of an edge."""
        frame = protocol.decode_edge(data)
        now_ms = asyncio.get_running_loop().time() * 1000.0
        match frame:
            case protocol.Hello() if frame.identity and frame.identity != self.identity:
                message = f"This server's target is {self.identity!r}, not {frame.identity!r}."
                connection.reply(protocol.Problem(-1, "model", message))
            case protocol.Hello():
                connection.reply(
                    protocol.Welcome(
                        protocol.PROTOCOL_VERSION,
                        "",
                        "",
                        _MAX_CONTEXT,
                        _MAX_DRAFTS,
                        self.policy.stream,
                        identity=self.identity,
                        vocab_size=self.vocab_size,
                        trees=self.engine.capabilities.trees,
                    )
                )
            case protocol.Ping():
                connection.reply(protocol.Pong(frame.number, bytes(frame.reply_bytes)))
            case protocol.OpenPart():
                connection.parts.setdefault(frame.session, []).extend(frame.tokens)
            case protocol.Open():
                self._open(connection, frame, now_ms)
            case protocol.Draft():
                session = self._sessions.get(connection.names.get(frame.session, ""))
                if session is not None:
                    session.state.merge(
                        frame.epoch,
                        frame.base,
                        frame.tokens,
                        [byte / 255.0 for byte in frame.acceptance_prob],
                        now_ms,
                        frame.slack_ms,
                        frame.draft_ms,
                        protocol.parents_of(frame),
                    )
            case protocol.Close():
                self.close_session(connection.names.pop(frame.session, ""))
        self._wake.set()

    def _open(self, connection: _InProcessConnection, frame: protocol.Open, now_ms: float) -> None:
        self.close_session(connection.names.get(frame.session, ""))
        name = f"p{self._opened}"
        self._opened += 1
        tokens = [*connection.parts.pop(frame.session, ()), *frame.tokens]
        state = SessionState(
            name,
            tokens,
            slo=Slo.of(frame.tokens_per_s, frame.ttft_ms),
            max_new=frame.max_new,
            max_context=_MAX_CONTEXT,
            now_ms=now_ms,
            generated=frame.generated,
            stop=frame.stop,
            stream=self.policy.stream and not frame.undrafted,
            undrafted=frame.undrafted,
            max_pending_drafts=_MAX_DRAFTS,
        )
        sampling = Sampling(
            frame.temperature,
            frame.top_k,
            frame.top_p,
            frame.seed,
            frame.min_p,
            len(tokens) - frame.generated + frame.min_new if frame.min_new else 0,
            tuple(frame.stop),
            frame.logprobs,
        )
        self.engine.open(name, sampling, tokens)
        connection.names[frame.session] = name
        self._sessions[name] = _ConnectedSession(connection, frame.session, state)

    # --- steps ---

    async def _loop(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._wake.clear()
            now_ms = loop.time() * 1000.0
            states = [session.state for session in self._sessions.values()]
            views = [state.view(now_ms) for state in states if not state.finished]
            plan = self.policy.plan(now_ms, views, self.estimator, _LIMITS)
            if plan.items:
                await self._step(plan.items)
                continue
            wait_s = None if plan.wake_ms is None else max(0.0, plan.wake_ms / 1000.0 - loop.time())
            try:
                async with asyncio.timeout(wait_s):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def _step(self, items: Sequence[ScheduledItem]) -> None:
        loop = asyncio.get_running_loop()
        begun_ms = loop.time() * 1000.0
        sessions = [self._sessions[item.session] for item in items]
        states = [session.state for session in sessions]
        inputs = [state.step_input(item, begun_ms) for state, item in zip(states, items, strict=True)]
        shape = BatchShape.of(
            (len(given.tokens), state.cached, bool(item.prefill))
            for given, state, item in zip(inputs, states, items, strict=True)
        )
        cached = (session.state.cached for session in self._sessions.values())
        self._level = load_level(slowdown(self.estimator, cached), self._level)
        results = self.engine.step(inputs)
        await asyncio.sleep(self.step_ms(shape) / 1000.0)
        self.steps += 1
        now_ms = loop.time() * 1000.0
        for (connection, number, state), result in zip(sessions, results, strict=True):
            commit = state.apply(result, now_ms)
            if state.session not in self._sessions:  # its edge left during the step
                self.engine.close(state.session)
                continue
            if commit.rollback is not None:
                self.engine.rollback(state.session, commit.rollback)
            if commit.tokens:
                connection.reply(protocol.commit_frame(number, commit, now_ms - begun_ms, self._level))
            if commit.finished:
                self.close_session(state.session)
        await asyncio.sleep(_OVERHEAD_MS / 1000.0)


class _InProcessConnection:
    """One connection: frames go straight to the server, answers into a queue."""

    def __init__(self, server: InProcessServer) -> None:
        self.names: dict[int, str] = {}
        self.parts: dict[int, list[int]] = {}
        self._server = server
        self._answers: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._closed = False

    def reply(self, frame: protocol.ServerFrame) -> None:
        if not self._closed:
            self._answers.put_nowait(protocol.encode(frame))

    def cut(self) -> None:
        self._closed = True
        self._answers.put_nowait(None)

    async def send(self, data: bytes) -> None:
        if self._closed:
            raise LinkLost("The in-process server cut the connection.")
        self._server.receive(self, data)

    async def receive(self) -> bytes:
        data = None if self._closed else await self._answers.get()
        if data is None:
            raise LinkLost("The in-process server cut the connection.")
        return data

    async def close(self) -> None:
        self._closed = True
        for name in self.names.values():
            self._server.close_session(name)
        self.names.clear()
