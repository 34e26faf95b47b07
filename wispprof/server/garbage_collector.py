"""Garbage collection of a serving process: what is loaded is left out, the rest is visited once a minute.

A full collection stops the process while it visits every live object: 15 to 30 ms with 200 sessions, and
Python would begin one every second. Young objects are collected as always.
"""

from __future__ import annotations

import asyncio
import atexit
import gc

FULL_EVERY_S = 60.0
_NEVER = 1 << 30


def calm_garbage_collector() -> None:
    """From now on until the process exits. Call it on the event loop once everything is loaded: models and
    libraries are half a million objects that stay to the end."""
    gc.collect()
    gc.freeze()
    # Libraries report what is still frozen then as leaked.
    atexit.register(gc.unfreeze)
    gc.set_threshold(*gc.get_threshold()[:2], _NEVER)
    _schedule(asyncio.get_running_loop())


def _schedule(loop: asyncio.AbstractEventLoop) -> None:
    loop.call_later(FULL_EVERY_S, _collect, loop)


def _collect(loop: asyncio.AbstractEventLoop) -> None:
    gc.collect()
    _schedule(loop)
