"""Operations on sessions that run in the engine's thread."""

from __future__ import annotations

import contextlib

from wispprof.backends import Engine
from wispprof.errors import OutOfKvMemory
from wispprof.server.session import ServerSession
from wispprof.types import Sampling, StepInput


def open_in_engine(engine: Engine, session: ServerSession, owner: str) -> None:
    """Open a session; ``owner``: whose prefixes it may share."""
    engine.open(session.name, session.sampling, session.state.tokens, owner)
    session.in_engine = True


def fork_in_engine(
    engine: Engine, session: ServerSession, owner: str, parent: str, length: int, take_over: bool
) -> None:
    """Open a session with the KV of ``parent``'s first ``length`` tokens, or without if memory is short."""
    try:
        engine.fork(parent, session.name, length, session.sampling)
        session.reused = length
        session.in_engine = True
    except OutOfKvMemory:
        open_in_engine(engine, session, owner)
    finally:
        if take_over:
            engine.close(parent)


def audit_engine(engine: Engine, expected: dict[str, int], checked: str | None) -> None:
    """Compare the engine with the lengths it should hold; ``checked``: see ``Engine.check_integrity``."""
    engine.check_integrity(checked)
    engine.audit(expected)


def probe_engine(engine: Engine, name: str) -> None:
    """Compute one token of a new session, if there is memory for it."""
    engine.open(name, Sampling(), [0])
    with contextlib.suppress(OutOfKvMemory):
        engine.step([StepInput(name, [0])])
    engine.close(name)
