"""The output of one simulated generation: the target's tokens, and what the draft model proposes.

While all drafts equal the target's path, the proposal at a position depends on the position alone. From
the first difference on, the draft model follows a wrong path.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from wispprof.types import DraftToken, RejectionPredictor, Sampling

PROMPT_TOKEN = 7
"""Only the length of a prompt matters: every prompt token is this one."""


class SimulatedOutput:
    """A drafter of recorded or drawn proposals. Positions count from the start of the prompt.

    ``path``: output tokens of the target. ``proposals[i]``: the draft for output position ``i`` after
    the true prefix. ``off_path[i]``: the drafts after a wrong proposal at ``i``; the last one repeats.
    """

    __slots__ = (
        "_length",
        "_off_path",
        "_wrong_drafts",
        "_wrong_from",
        "path",
        "prompt_tokens",
        "proposals",
    )

    def __init__(
        self,
        prompt_tokens: int,
        path: Sequence[int],
        proposals: Sequence[DraftToken],
        off_path: Sequence[Sequence[DraftToken]],
    ) -> None:
        self.prompt_tokens = prompt_tokens
        self.path = path
        self.proposals = proposals
        self._off_path = off_path
        self._length = prompt_tokens
        self._wrong_from = -1
        self._wrong_drafts: Sequence[DraftToken] = ()

    @property
    def prompt(self) -> list[int]:
        return [PROMPT_TOKEN] * self.prompt_tokens

    @property
    def length(self) -> int:
        """Tokens held, committed and drafted."""
        return self._length

    @property
    def on_path(self) -> bool:
        """Whether all tokens held equal the target's."""
        return self._wrong_from < 0

    def open(self, tokens: Sequence[int], sampling: Sampling) -> None:
        """Start over from committed tokens, which are on the path."""
        self._length = len(tokens)
        self._wrong_from = -1

    def draft(self) -> DraftToken:
        """Propose the next token and hold it."""
        place = self._length - self.prompt_tokens
        self._length += 1
        wrong = self._wrong_from
        if wrong < 0:
            proposal = self.proposals[place]
            if proposal.token != self.path[place]:
                self._wrong_from = place
                self._wrong_drafts = self._off_path[place]
            return proposal
        drafts = self._wrong_drafts
        depth = place - wrong - 1
        return drafts[depth] if depth < len(drafts) else drafts[-1]

    def rollback(self, length: int) -> None:
        """Hold only the first ``length`` tokens."""
        if length > self._length:
            raise ValueError(f"Cannot roll {self._length} tokens back to {length}.")
        self._length = length
        if length - self.prompt_tokens <= self._wrong_from:
            self._wrong_from = -1

    def extend(self, tokens: Sequence[int]) -> None:
        """Append committed tokens."""
        self._length += len(tokens)

    def ahead(self, most: int) -> int:
        """How many proposals from here on the target will accept, at most ``most`` (clairvoyant)."""
        if self._wrong_from >= 0:
            return 0
        start = self._length - self.prompt_tokens
        proposals, path = self.proposals, self.path
        last = min(len(path), start + most)
        place = start
        while place < last and proposals[place].token == path[place]:
            place += 1
        return place - start


class AcceptanceSource(Protocol):
    """Makes simulated outputs. ``predictor`` reads the features of their drafts."""

    @property
    def predictor(self) -> RejectionPredictor: ...

    def output(self, seed: Sequence[int], prompt_tokens: int, output_tokens: int) -> SimulatedOutput:
        """A generation's output; equal arguments give equal outputs."""


def mix(seed: Sequence[int]) -> int:
    """One integer from several, distinct for distinct small ones."""
    value = 0
    for part in seed:
        value = (value * 1_000_003 + part + 1) & 0xFFFFFFFFFFFFFFFF
    return value
