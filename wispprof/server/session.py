"""A session while the server holds it, and what its owner hears of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from wispprof.sessions.commit_result import CommitResult
from wispprof.sessions.session_state import SessionState
from wispprof.types import Sampling, Slo

__all__ = ["ServerSession", "SessionListener", "SessionRequest"]


@dataclass(frozen=True, slots=True)
class SessionRequest:
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


class SessionListener(Protocol):
    """Whoever opened a session: a WebSocket connection or an HTTP request. Called on the event loop
    and must not block."""

    key: str

    def committed(
        self, session: ServerSession, commit: CommitResult, verify_ms: float, load_level: int
    ) -> None: ...

    def failed(
        self, session: ServerSession, code: str, message: str, retry_ms: float = 0.0
    ) -> None:
        """The session ended without its owner's wish; nothing of it is left."""


@dataclass(slots=True, eq=False)
class ServerSession:
    """One open session. ``number`` is the owner's name for it, ``state.session`` the engine's.

    ``last_seen_ms``: last sign of life from either side; ``last_commit_ms``: its last commit. ``in_engine``: the engine
    has opened it (set in its thread), with ``reused`` tokens of another session's cache; ``opened``: the
    event loop knows that. ``closing``: why its
    owner left while a step was under way.
    """

    state: SessionState
    sampling: Sampling
    listener: SessionListener
    number: int
    last_seen_ms: float
    in_engine: bool = False
    opened: bool = False
    closing: str = ""
    reused: int = 0
    last_commit_ms: float = 0.0

    @property
    def name(self) -> str:
        return self.state.session
