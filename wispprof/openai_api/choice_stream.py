"""The choices of one request, generated side by side and read as one stream."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from typing import NamedTuple

from wispprof.openai_api.response_body import Choice
from wispprof.openai_api.text_generation import TextPiece

AT_ONCE = 8
"""Choices of one request that are generated at the same time; others wait, so no list of prompts takes the
whole server."""


class ChoicePiece(NamedTuple):
    """A piece of a choice's text; ``None``: the choice is complete."""

    choice: Choice
    piece: TextPiece | None


class ChoiceStream:
    """Starts with the first :meth:`next`; :meth:`close` ends what is still being generated."""

    def __init__(self, choices: Sequence[Choice], at_once: int = AT_ONCE) -> None:
        self._choices = choices
        self._at_once = asyncio.Semaphore(at_once)
        self._pieces: asyncio.Queue[ChoicePiece | Exception] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self._left = len(choices)

    async def next(self, timeout_s: float | None = None) -> ChoicePiece | None:
        """The next piece; ``None`` after the last choice is complete. Raises the error that ended a choice,
        and ``TimeoutError``."""
        if not self._tasks:
            self._tasks = [asyncio.create_task(self._generate(one), name="choice") for one in self._choices]
        if not self._left:
            return None
        if self._pieces.empty():
            async with asyncio.timeout(timeout_s):
                found = await self._pieces.get()
        else:
            found = self._pieces.get_nowait()
        if isinstance(found, Exception):
            raise found
        if found.piece is None:
            self._left -= 1
        else:
            found.choice.completion_tokens += len(found.piece.tokens)
        return found

    async def _generate(self, choice: Choice) -> None:
        try:
            async with self._at_once, aclosing(choice.text.pieces()) as pieces:
                async for piece in pieces:
                    self._pieces.put_nowait(ChoicePiece(choice, piece))
            self._pieces.put_nowait(ChoicePiece(choice, None))
        except Exception as err:
            self._pieces.put_nowait(err)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
