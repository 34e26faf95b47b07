"""A bare edge for tests: real WebSocket, raw frames, a drafter with a known accuracy."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from websockets.asyncio.client import ClientConnection, connect

from wispprof.core import Drafter, Sampling
from wispprof.runtime import wire
from wispprof.sessions.path import EdgePath

GREEDY = Sampling()


class Edge:
    """One connection; sessions run as tasks over it."""

    def __init__(self, socket: ClientConnection, welcome: wire.Welcome) -> None:
        self.socket = socket
        self.welcome = welcome
        self.inbox: dict[int, asyncio.Queue[wire.ServerFrame]] = {}
        self.stray: list[wire.ServerFrame] = []
        self._task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for data in self.socket:
            frame = wire.decode_server(data)
            number = getattr(frame, "session", -1)
            if number in self.inbox:
                self.inbox[number].put_nowait(frame)
            else:
                self.stray.append(frame)

    async def send(self, frame: wire.EdgeFrame) -> None:
        await self.socket.send(wire.encode(frame))

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
        frame = await self.run(
            number, prompt, max_new, k=k, drafter=drafter, sampling=sampling, **more
        )
        if isinstance(frame, wire.Problem):
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
    ) -> list[int] | wire.Problem:
        self.inbox[number] = asyncio.Queue()
        undrafted = drafter is None or (k == 0 and not more.get("rounds", False))
        more.pop("rounds", None)
        await self.send(
            wire.Open(
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
        path = EdgePath(prompt, stream=self.welcome.stream, lead_limit=k, end=len(prompt) + max_new)
        if drafter is not None:
            drafter.open(prompt, sampling)
        while True:
            frame = await self.inbox[number].get()
            if isinstance(frame, wire.Problem):
                return frame
            assert isinstance(frame, wire.Commit)
            effect = path.on_commit(frame.frontier, frame.tokens, frame.accepted)
            if frame.finished:
                return list(path.committed[len(prompt) :])
            if drafter is None or undrafted:
                continue
            if effect.rollback_to is not None:
                drafter.rollback(effect.rollback_to)
            drafter.extend(effect.extend)
            while path.room:
                path.propose(drafter.draft().token, 0.7, 1.0)
            out = path.take()
            if out is not None:
                survival = bytes(wire.survival_byte(p) for p in out.survival)
                await self.send(
                    wire.Draft(
                        number, out.epoch, out.base, list(out.tokens), survival, out.draft_ms, 500.0
                    )
                )


@asynccontextmanager
async def edge(url: str, **hello: Any) -> AsyncIterator[Edge]:
    """A connected edge; raises AssertionError with the problem where hello is refused."""
    async with connect(url, compression=None, max_size=None) as socket:
        first = wire.Hello(wire.PROTOCOL_VERSION, "")
        await socket.send(wire.encode(msgspec.structs.replace(first, **hello)))
        answer = wire.decode_server(await socket.recv(decode=False))
        if not isinstance(answer, wire.Welcome):
            raise AssertionError(f"refused: {answer}")
        one = Edge(socket, answer)
        try:
            yield one
        finally:
            one._task.cancel()
            await asyncio.gather(one._task, return_exceptions=True)
