"""A serving process collects garbage rarely, and gives back what it froze."""

from __future__ import annotations

import asyncio
import gc
import weakref

from wispprof.server import running_server
from wispprof.server.garbage_collector import FULL_EVERY_S, calm_garbage_collector
from wispprof.testing.fake_engine import FakeEngine
from wispprof.testing.virtual_time import run_virtual


class Cycle:
    def __init__(self) -> None:
        self.itself = self


def test_full_collections_come_once_a_minute_and_in_the_end_all_is_as_before() -> None:
    thresholds, seen = gc.get_threshold(), []

    async def serve() -> None:
        with calm_garbage_collector():
            assert gc.get_freeze_count()
            for _ in range(2):
                garbage = Cycle()
                old = weakref.ref(garbage)
                gc.collect(1)  # It lives, and so joins the oldest generation.
                del garbage
                await asyncio.sleep(0.4 * FULL_EVERY_S)
                seen.append(old() is None)
                await asyncio.sleep(0.61 * FULL_EVERY_S)
                seen.append(old() is None)

    run_virtual(serve())
    assert seen == [False, True, False, True]
    assert gc.get_threshold() == thresholds
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
