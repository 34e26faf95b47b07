"""An open session of the server, and the listener it reports to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from wispprof.server.request_log import DepthCounts
from wispprof.sessions.session_state import CommitResult, SessionState
from wispprof.types import Sampling


class SessionListener(Protocol):
    """The WebSocket connection or HTTP request that opened a session. ``key``: its API key. ``kind``: the
    name that an edge gave at hello, or ``api``.

    Methods run on the event loop and must not block.
    """

    key: str
    kind: str

    def committed(
        self, session: ServerSession, commit: CommitResult, verify_ms: float, load_level: int
    ) -> None: ...

    def failed(self, session: ServerSession, code: str, message: str, retry_ms: float = 0.0) -> None:
        """The server ended the session; nothing of it is left."""


@dataclass(slots=True, eq=False)
class ServerSession:
    """One open session. ``number`` is the listener's name for it, :attr:`name` the engine's.

    ``in_engine``: the engine has opened it (set in the engine's thread), with ``reused`` tokens of a
    cached prefix. ``opened``: the event loop has seen that. ``closing``: reason to close it after the
    step under way. ``planned``: the next step holds it already. ``last_seen_ms``: the latest frame or commit.
    ``depths``: for the request log. ``resumed``: output tokens that it was opened with.
    """

    state: SessionState
    sampling: Sampling
    listener: SessionListener
    number: int
    last_seen_ms: float
    in_engine: bool = False
    opened: bool = False
    closing: str = ""
    planned: bool = False
    reused: int = 0
    last_commit_ms: float = 0.0
    depths: DepthCounts = field(default_factory=DepthCounts)
    resumed: int = 0

    @property
    def name(self) -> str:
        return self.state.session
