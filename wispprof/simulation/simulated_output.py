"""The output of one simulated generation: the target's tokens, and what the draft model proposes.

While all drafts equal the target's path, the proposal at a position depends on the position alone. From
the first difference on, the draft model follows a wrong path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from wispprof.types import DraftToken, RejectionPredictor, Sampling, StepInput, VerifyResult

PROMPT_TOKEN = 7
"""Only the length of a prompt matters: every prompt token is this one."""


@dataclass(slots=True, eq=False)
class SimulatedOutput:
    """A drafter of recorded or drawn proposals. Positions count from the start of the prompt.

    ``path``: output tokens of the target. ``proposals[i]``: the draft for output position ``i`` after
    the true prefix. ``off_path[i]``: the drafts after a wrong proposal at ``i``; the last one repeats.
    """

    prompt_tokens: int
    path: Sequence[int]
    proposals: Sequence[DraftToken]
    off_path: Sequence[Sequence[DraftToken]]
    length: int = field(init=False)
    """Tokens held, committed and drafted."""
    _wrong_from: int = field(default=-1, init=False)
    _wrong_drafts: Sequence[DraftToken] = field(default=(), init=False)

    def __post_init__(self) -> None:
        self.length = self.prompt_tokens

    @property
    def prompt(self) -> list[int]:
        return [PROMPT_TOKEN] * self.prompt_tokens

    def open(self, tokens: Sequence[int], sampling: Sampling) -> None:
        """Start over from committed tokens, which are on the path."""
        self.length = len(tokens)
        self._wrong_from = -1

    def draft(self) -> DraftToken:
        """Propose the next token and hold it."""
        place = self.length - self.prompt_tokens
        self.length += 1
        wrong = self._wrong_from
        if wrong < 0:
            proposal = self.proposals[place]
            if proposal.token != self.path[place]:
                self._wrong_from = place
                self._wrong_drafts = self.off_path[place]
            return proposal
        drafts = self._wrong_drafts
        depth = place - wrong - 1
        return drafts[depth] if depth < len(drafts) else drafts[-1]

    def proposes_nothing(self) -> bool:
        """Whether the recorded drafter had nothing to propose here (token -1)."""
        if self._wrong_from < 0:
            return self.proposals[self.length - self.prompt_tokens].token < 0
        drafts, depth = self._wrong_drafts, self.length - self.prompt_tokens - self._wrong_from - 1
        return (drafts[depth] if depth < len(drafts) else drafts[-1]).token < 0

    def rollback(self, length: int) -> None:
        """Hold only the first ``length`` tokens."""
        if length > self.length:
            raise ValueError(f"Cannot roll {self.length} tokens back to {length}.")
        self.length = length
        if length - self.prompt_tokens <= self._wrong_from:
            self._wrong_from = -1

    def extend(self, tokens: Sequence[int]) -> None:
        """Append committed tokens."""
        self.length += len(tokens)

    def ahead(self, most: int) -> int:
        """How many proposals from here on the target will accept, at most ``most`` (clairvoyant)."""
        if self._wrong_from >= 0:
            return 0
        start = self.length - self.prompt_tokens
        proposals, path = self.proposals, self.path
        last = min(len(path), start + most)
        place = start
        while place < last and proposals[place].token == path[place]:
            place += 1
        return place - start

    def verify(self, step_input: StepInput, committed_len: int) -> VerifyResult:
        """The target's decision after ``committed_len`` tokens: drafts that agree with its path, and one
        token more."""
        if not step_input.needs_logits:
            return VerifyResult(step_input.session, 0, ())
        path, place = self.path, committed_len - self.prompt_tokens
        accepted, drafts = 0, step_input.drafts
        if drafts:
            tokens = step_input.tokens
            first = len(tokens) - drafts
            while accepted < drafts and tokens[first + accepted] == path[place + accepted]:
                accepted += 1
        return VerifyResult(step_input.session, accepted, tuple(path[place : place + accepted + 1]))


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
