"""A serving process collects garbage rarely, and gives back what it froze."""

from __future__ import annotations

import asyncio
import atexit
import gc
import weakref
from collections.abc import Callable

import pytest

from wispprof.server import running_server
from wispprof.server.garbage_collector import FULL_EVERY_S, calm_garbage_collector
from wispprof.testing.fake_engine import FakeEngine
from wispprof.testing.virtual_time import run_virtual


class Cycle:
    def __init__(self) -> None:
        self.itself = self


def test_full_collections_come_once_a_minute_and_what_is_frozen_is_freed_at_exit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    at_exit: list[Callable[[], object]] = []
    monkeypatch.setattr(atexit, "register", at_exit.append)
    thresholds, seen = gc.get_threshold(), []

    async def serve() -> None:
        calm_garbage_collector()
        assert gc.get_freeze_count()
        for _ in range(2):
            garbage = Cycle()
            old = weakref.ref(garbage)
            gc.collect(1)  # It lives, and so joins the oldest generation.
            del garbage
            await asyncio.sleep(0.4 * FULL_EVERY_S)
            seen.append(old() is None)
            await asyncio.sleep(0.6 * FULL_EVERY_S)
            seen.append(old() is None)

    try:
        run_virtual(serve())
    finally:
        gc.set_threshold(*thresholds)
        for function in at_exit:
            function()
    assert seen == [False, True, False, True]
    assert not gc.get_freeze_count()


async def test_an_ended_server_keeps_no_engine_in_memory() -> None:
    """FastAPI remembers the endpoints of past applications, and they know their front."""
    engine = FakeEngine(64)
    kept = weakref.ref(engine)
    async with running_server(engine=engine, model=engine.served):
        pass
    del engine
    gc.collect()
    assert kept() is None
