"""A drafter of your own, verified by a server in this process.

    python examples/custom_drafter.py

A drafter proposes tokens; the target decides. This one proposes the token that followed the last occurrence
of the current token. Its text equals server-only text: drafts never change what the target writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import wispprof
from wispprof.backends import Drafter
from wispprof.types import DraftFeatures, DraftToken

CONFIDENCE = DraftFeatures(confidence=0.6, entropy=1.0, margin=1.0, spread=1.0)


class SuccessorDrafter(Drafter):
    """Proposes what followed the last token when it occurred before. Needs no model."""

    def __init__(self, model: Any = None) -> None:
        self._tokens: list[int] = []

    @property
    def length(self) -> int:
        return len(self._tokens)

    @property
    def can_draft(self) -> bool:
        return self._successor() is not None

    def open(self, tokens: Sequence[int], sampling: wispprof.Sampling) -> None:
        self._tokens = list(tokens)

    def draft(self) -> DraftToken:
        token = self._successor()
        assert token is not None, "the edge asks only if can_draft is true"
        self._tokens.append(token)
        return DraftToken(token, CONFIDENCE)

    def rollback(self, length: int) -> None:
        del self._tokens[length:]

    def extend(self, tokens: Sequence[int]) -> None:
        self._tokens += tokens

    def _successor(self) -> int | None:
        last = self._tokens[-1]
        for position in range(len(self._tokens) - 2, -1, -1):
            if self._tokens[position] == last:
                return self._tokens[position + 1]
        return None


def main() -> tuple[str, str]:
    prompt = "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n"
    own = wispprof.EdgeSettings(
        drafter="examples.custom_drafter:SuccessorDrafter", controller="sled", max_tokens=48
    )
    drafted = wispprof.generate(prompt, own)
    alone = wispprof.generate(prompt, wispprof.EdgeSettings(drafter="none", max_tokens=48))
    print(prompt + drafted)
    print("equal to server-only text:", drafted == alone)
    return drafted, alone


if __name__ == "__main__":
    main()
