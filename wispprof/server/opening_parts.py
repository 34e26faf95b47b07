"""Openings that come in several frames: their leading tokens, until the opening frame itself."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from wispprof.errors import ProtocolError
from wispprof.server.admission import Refused

MAX_UNFINISHED = 64
"""Sessions of one connection whose openings may be under way at a time."""


class OpeningParts:
    """Of one connection. All its parts together hold at most ``2 * max_prompt`` tokens, four bytes each.

    After a part was refused, the rest of that opening is dropped, its opening frame included.
    """

    def __init__(self, max_prompt: int, vocab_size: int) -> None:
        self._max_prompt = max_prompt
        self._vocab_size = vocab_size
        self._parts: dict[int, array[int] | None] = {}
        self.tokens = 0

    def add(self, number: int, tokens: Sequence[int]) -> None:
        """Append leading tokens of a session. Raises :class:`ProtocolError` or :class:`Refused`, once per
        opening."""
        held = self._parts.setdefault(number, array("i"))
        if held is None:
            return
        try:
            self._check(len(held), tokens)
        except (ProtocolError, Refused):
            self.discard(number)
            if len(self._parts) < MAX_UNFINISHED:
                self._parts[number] = None
            raise
        held.extend(tokens)
        self.tokens += len(tokens)

    def _check(self, held: int, tokens: Sequence[int]) -> None:
        if not tokens or min(tokens) < 0 or max(tokens) >= self._vocab_size:
            raise ProtocolError(
                f"A part of an opening needs tokens of the vocabulary of {self._vocab_size}.",
                "Use this model's tokenizer.",
            )
        if held + len(tokens) > self._max_prompt:
            raise Refused(
                "limit",
                f"The prompt has more than {self._max_prompt} tokens, which is this server's maximum.",
                "Shorten it.",
            )
        if self.tokens + len(tokens) > 2 * self._max_prompt or len(self._parts) > MAX_UNFINISHED:
            raise Refused(
                "busy",
                f"This connection has {len(self._parts)} unfinished openings.",
                "Finish one opening before the next.",
                retry_ms=100.0,
            )

    def take(self, number: int, tokens: Sequence[int]) -> tuple[int, ...] | None:
        """All tokens of a session whose opening ends with ``tokens``; ``None`` if a part was refused."""
        if number not in self._parts:
            return tuple(tokens)
        held = self._parts[number]
        self.discard(number)
        return None if held is None else (*held, *tokens)

    def discard(self, number: int) -> None:
        """The session will not be opened, or has been."""
        held = self._parts.pop(number, None)
        self.tokens -= len(held) if held is not None else 0
