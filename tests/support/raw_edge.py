"""A bare edge for tests: real WebSocket, raw frames, a drafter with a known accuracy."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from websockets.asyncio.client import ClientConnection, connect

from wispprof import protocol
from wispprof.backends import Drafter
from wispprof.sessions.draft_buffer import DraftBuffer
from wispprof.types import Sampling

GREEDY = Sampling()


class Edge:
    """One connection; sessions run as tasks over it."""

    def __init__(self, socket: ClientConnection, welcome: protocol.Welcome) -> None:
        self.socket = socket
        self.welcome = welcome
        self.inbox: dict[int, asyncio.Queue[protocol.ServerFrame]] = {}
        self.stray: list[protocol.ServerFrame] = []
        self._task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for data in self.socket:
            frame = protocol.decode_server(data)
            number = getattr(frame, "session", -1)
            if number in self.inbox:
                self.inbox[number].put_nowait(frame)
            else:
                self.stray.append(frame)

    async def send(self, frame: protocol.EdgeFrame) -> None:
        await self.socket.send(protocol.encode(frame))

    async def generate(
        self,
        number: int,
        prompt: list[int],
        max_new: int,
        *,
        k: int = 4,
        drafter: Drafter | None = None,
        sampling: Sampling = GREEDY,
        **more: Any,
    ) -> list[int]:
        """Run one session to its end with rounds of ``k`` drafts; returns the output."""
        frame = await self.run(number, prompt, max_new, k=k, drafter=drafter, sampling=sampling, **more)
        if isinstance(frame, protocol.Problem):
            raise AssertionError(f"refused: {frame}")
        return frame

    async def run(
        self,
        number: int,
        prompt: list[int],
        max_new: int,
        *,
        k: int,
        drafter: Drafter | None,
        sampling: Sampling,
        **more: Any,
    ) -> list[int] | protocol.Problem:
        self.inbox[number] = asyncio.Queue()
        undrafted = drafter is None or (k == 0 and not more.get("rounds", False))
        more.pop("rounds", None)
        await self.send(
            protocol.Open(
                number,
                prompt,
                max_new,
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                seed=sampling.seed,
                undrafted=undrafted,
                **more,
            )
        )
        path = DraftBuffer(prompt, stream=self.welcome.stream, draft_ahead_limit=k, end=len(prompt) + max_new)
        if drafter is not None:
            drafter.open(prompt, sampling)
        while True:
            frame = await self.inbox[number].get()
            if isinstance(frame, protocol.Problem):
                return frame
            assert isinstance(frame, protocol.Commit)
            effect = path.on_commit(frame.committed_len, frame.tokens, frame.accepted)
            if frame.finished:
                return list(path.committed[len(prompt) :])
            if drafter is None or undrafted:
                continue
            if effect.rollback_to is not None:
                drafter.rollback(effect.rollback_to)
            drafter.extend(effect.extend)
            while path.capacity_left:
                path.propose(drafter.draft().token, 0.7, 1.0)
            out = path.take()
            if out is not None:
                acceptance_prob = bytes(protocol.acceptance_byte(p) for p in out.acceptance_prob)
                await self.send(
                    protocol.Draft(
                        number,
                        out.epoch,
                        out.base,
                        list(out.tokens),
                        acceptance_prob,
                        out.draft_ms,
                        500.0,
                    )
                )


@asynccontextmanager
async def edge(url: str, **hello: Any) -> AsyncIterator[Edge]:
    """A connected edge; raises AssertionError with the problem if the server refuses hello."""
    async with connect(url, compression=None, max_size=None) as socket:
        first = protocol.Hello(protocol.PROTOCOL_VERSION, "")
        await socket.send(protocol.encode(msgspec.structs.replace(first, **hello)))
        answer = protocol.decode_server(await socket.recv(decode=False))
        if not isinstance(answer, protocol.Welcome):
            raise AssertionError(f"refused: {answer}")
        one = Edge(socket, answer)
        try:
            yield one
        finally:
            one._task.cancel()
            await asyncio.gather(one._task, return_exceptions=True)
