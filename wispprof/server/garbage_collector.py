"""Garbage collection of a serving process: what is loaded is left out, the rest is visited once a minute.

A full collection stops the process while it visits every live object: 15 to 30 ms with 200 sessions, 150 ms
if models and libraries are among them, and Python would begin one every second. Young objects are collected
as always.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from contextlib import contextmanager

FULL_EVERY_S = 60.0
_NEVER = 1 << 30


@contextmanager
def calm_garbage_collector() -> Iterator[None]:
    """Use it on the event loop once everything is loaded: models and libraries are half a million objects
    that stay to the end."""
    gc.collect()
    gc.freeze()
    before = gc.get_threshold()
    gc.set_threshold(*before[:2], _NEVER)
    collecting = asyncio.create_task(_collect(), name="garbage collection")
    try:
        yield
    finally:
        collecting.cancel()
        gc.set_threshold(*before)
        gc.unfreeze()


async def _collect() -> None:
    while True:
        await asyncio.sleep(FULL_EVERY_S)
        gc.collect()
