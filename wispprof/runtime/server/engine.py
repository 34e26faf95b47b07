"""What the server needs of a verifier engine. ``wispprof.lm.engine.VerifierEngine`` is one, and
:class:`~wispprof.runtime.server.double.HashEngine` is another that needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from wispprof.core import Feed, Outcome, Sampling

__all__ = ["Engine", "ServedModel"]


class Engine(Protocol):
    """Holds the KV of many sessions and decides their next tokens, one batch at a time.

    Called from one thread only. Names of sessions are the caller's; they are never used twice.
    """

    @property
    def sessions(self) -> Sequence[str]:
        """Names of all open sessions."""

    @property
    def kv_free(self) -> int:
        """Cache tokens that can still be taken."""

    def open(self, session: str, sampling: Sampling) -> None:
        """A new session with nothing cached."""

    def fork(self, session: str, child: str, length: int, sampling: Sampling) -> None:
        """Open ``child`` with the first ``length`` cached tokens of ``session``."""

    def step(self, feeds: Sequence[Feed]) -> list[Outcome]:
        """One forward pass over all feeds; outcomes in their order.

        Raises :class:`~wispprof.errors.OutOfKvMemory` before anything was changed.
        """

    def rollback(self, session: str, length: int) -> None:
        """Keep the first ``length`` cached tokens."""

    def close(self, session: str) -> None:
        """Release everything the session holds."""

    def cached(self, session: str) -> int: ...

    def check_integrity(self, session: str | None = None) -> object:
        """Check the books, and the cache of one session or all against its tokens.

        Raises :class:`~wispprof.errors.EngineError` where they do not agree.
        """


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What edges must agree with. ``tokenizer``: hash; empty where the model has none."""

    id: str
    tokenizer: str
    vocab_size: int
    max_context: int
