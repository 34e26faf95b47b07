"""A session while the server holds it, and what its owner hears of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from wispprof.sessions.commit_result import Committed
from wispprof.sessions.session_state import ServerSession
from wispprof.types import Sampling, Slo

__all__ = ["GenerationRequest", "LiveSession", "Owner"]


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What a client asks for, whichever door it came through.

    ``tokens``: prompt and what was committed before, the last ``generated`` of them output.
    """

    tokens: tuple[int, ...]
    max_new: int
    slo: Slo
    sampling: Sampling = field(default_factory=Sampling)
    generated: int = 0
    stop: tuple[int, ...] = ()
    undrafted: bool = False


class Owner(Protocol):
    """Whoever opened a session: a WebSocket connection or an HTTP request. Called on the event loop
    and must not block."""

    key: str

    def committed(
        self, live: LiveSession, commit: Committed, verify_ms: float, load_level: int
    ) -> None: ...

    def failed(self, live: LiveSession, code: str, message: str, retry_ms: float = 0.0) -> None:
        """The session ended without its owner's wish; nothing of it is left."""


@dataclass(slots=True, eq=False)
class LiveSession:
    """One open session. ``number`` is the owner's name for it, ``ledger.session`` the engine's.

    ``heard_ms``: last sign of life from either side; ``told_ms``: its last commit. ``held``: the engine
    has opened it (set in its thread), with ``reused`` tokens of another session's cache; ``opened``: the
    event loop knows that. ``closing``: why its
    owner left while a step was under way.
    """

    ledger: ServerSession
    sampling: Sampling
    owner: Owner
    number: int
    heard_ms: float
    held: bool = False
    opened: bool = False
    closing: str = ""
    reused: int = 0
    told_ms: float = 0.0

    @property
    def name(self) -> str:
        return self.ledger.session
