"""When a session that the server refused is opened again, and when asking again ends."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

from wispprof import protocol
from wispprof.edge import server_frames
from wispprof.edge.client import EdgeClient
from wispprof.errors import RuntimeFault

_PAUSE_MS = {"busy": 200.0, "draining": 500.0, "session": 0.0, "internal": 200.0}
_FULL_OR_LEAVING = ("busy", "draining")
_MAX_INTERNAL_ERRORS = 3
_MAX_FRUITLESS = 16
"""Openings in a row without a token in between, after which the request fails."""


class Reopening:
    """The openings of one session. ``fail`` ends its request.

    A refused session is opened again after a pause, the last time ``give_up_ms`` after the first refusal. If
    the link is lost meanwhile, the session waits for the next server for as long.
    """

    def __init__(self, client: EdgeClient, fail: Callable[[RuntimeFault], None]) -> None:
        self.openings = 0
        self._client = client
        self._fail = fail
        self._fruitless = 0
        self._internal_errors = 0
        self._refusal: protocol.Problem | None = None
        self._end_ms = math.inf
        self._planned: asyncio.TimerHandle | None = None

    def opening(self) -> None:
        """An opening frame leaves."""
        self.openings += 1
        self._fruitless += 1

    def reopened(self) -> None:
        """The opening frame was sent again."""
        self.cancel()
        if self._fruitless > _MAX_FRUITLESS:
            self._fail(RuntimeFault(f"The server answered {_MAX_FRUITLESS} openings without a token."))

    def answered(self) -> None:
        """The server committed tokens."""
        self._fruitless = 0
        self._refusal = None

    def refused(self, number: int, problem: protocol.Problem) -> None:
        """Plan the next opening of session ``number``, or fail if another one does not help."""
        if self._refusal is None:
            self._end_ms = _now_ms() + self._client.settings.give_up_ms
        self._refusal = problem
        self._fruitless -= problem.code in _FULL_OR_LEAVING
        self._internal_errors += problem.code == "internal"
        if self._internal_errors > _MAX_INTERNAL_ERRORS:
            self._fail(server_frames.refusal(problem))
        else:
            self._plan(number, problem)

    def lost(self, number: int) -> None:
        """The link is down. Frames of an opening may be lost with it."""
        if self._refusal is not None:
            self._plan(number, self._refusal)

    def cancel(self) -> None:
        """Give the planned opening up."""
        if self._planned is not None:
            self._planned.cancel()

    def _plan(self, number: int, problem: protocol.Problem) -> None:
        self.cancel()
        left_ms, retry_ms = self._end_ms - _now_ms(), server_frames.retry_ms(problem)
        pause_ms = max(_PAUSE_MS.get(problem.code, math.inf), retry_ms)
        if pause_ms == math.inf or left_ms < max(1.0, retry_ms):
            self._fail(server_frames.refusal(problem))
            return
        pause_ms = max(min(pause_ms, left_ms), retry_ms)
        loop = asyncio.get_running_loop()
        self._planned = loop.call_later(pause_ms / 1000.0, self._open, number, problem)

    def _open(self, number: int, problem: protocol.Problem) -> None:
        if problem.code in _FULL_OR_LEAVING and not self._client.up:
            self._plan(number, problem)  # that server has left, and the next one has not come
        else:
            self._client.reopen(number)


def _now_ms() -> float:
    return asyncio.get_running_loop().time() * 1000.0
