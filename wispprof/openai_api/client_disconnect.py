"""HTTP clients that hang up before their answer is whole."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.requests import Request

__all__ = ["unless_gone"]


async def unless_gone(request: Request, pieces: AsyncGenerator[str]) -> str | None:
    """The whole text, or ``None`` if the client hung up meanwhile: nobody pays for its answer then."""

    async def collect() -> str:
        async with aclosing(pieces):
            return "".join([piece async for piece in pieces])

    async def hung_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work = asyncio.create_task(collect(), name="completion")
    watch = asyncio.create_task(hung_up(), name="disconnect watch")
    try:
        await asyncio.wait([work, watch], return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else None
    finally:
        for task in (work, watch):
            task.cancel()
        await asyncio.gather(work, watch, return_exceptions=True)
