"""The output of one simulated generation: the target's tokens, and what the draft model proposes.

While all drafts equal the target's path, the proposal at a position depends on the position alone. From
the first difference on, the draft model follows a wrong path.

For draft trees an output also knows the draft's candidates by rank: which of them the target takes at each
position, and how probable each is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from wispprof.sessions.edge_tree import RatedCandidates
from wispprof.token_tree import ROOT, TokenTree
from wispprof.types import DraftToken, RejectionPredictor, Sampling, StepInput, VerifyResult

PROMPT_TOKEN = 7
"""Only the length of a prompt matters: every prompt token is this one."""
WRONG_TOKEN = 1 << 24
"""A wrong candidate of rank r is the token ``WRONG_TOKEN + r``."""


@dataclass(slots=True, eq=False)
class SimulatedOutput:
    """A drafter of recorded or drawn proposals. Positions count from the start of the prompt.

    ``path``: output tokens of the target. ``proposals[i]``: the draft for output position ``i`` after
    the true prefix. ``off_path[i]``: the drafts after a wrong proposal at ``i``; the last one repeats.

    For trees, else empty: ``ranks[i]``, rank of the target's token among the draft's candidates at output
    position ``i`` (a number beyond them if it is none of them), and ``candidates[i]``, P(the target takes
    rank 0, 1, …). Off the path, a node has the candidates of its position on it.
    """

    prompt_tokens: int
    path: Sequence[int]
    proposals: Sequence[DraftToken]
    off_path: Sequence[Sequence[DraftToken]]
    ranks: Sequence[int] = ()
    candidates: Sequence[Sequence[float]] = ()
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

    def expand(
        self, tree: TokenTree, nodes: Sequence[int], width: int, committed_len: int
    ) -> list[RatedCandidates]:
        """One forward over nodes of a tree that hangs at the first ``committed_len`` tokens."""
        found = []
        start, last = committed_len - self.prompt_tokens, len(self.path) - 1
        for node in nodes:
            place = min(last, start + (0 if node == ROOT else tree.depths[node]))
            probs = self.candidates[place]
            tokens = list(range(WRONG_TOKEN, WRONG_TOKEN + min(width, len(probs))))
            rank = self.ranks[place]
            if rank < len(tokens) and self._right(tree, node, start):
                tokens[rank] = self.path[place]
            found.append(RatedCandidates(tokens, probs))
        return found

    def _right(self, tree: TokenTree, node: int, start: int) -> bool:
        """Whether a node spells the path from output position ``start`` on."""
        path, last = self.path, len(self.path)
        while node != ROOT:
            place = start + tree.depths[node] - 1
            if place >= last or tree.tokens[node] != path[place]:
                return False
            node = tree.parents[node]
        return True

    def verify(self, step_input: StepInput, committed_len: int) -> VerifyResult:
        """The target's decision after ``committed_len`` tokens: drafts that agree with its path, and one
        token more."""
        if not step_input.needs_logits:
            return VerifyResult(step_input.session, 0, ())
        path, place = self.path, committed_len - self.prompt_tokens
        accepted, drafts = 0, step_input.drafts
        if step_input.parents:
            child = {
                (parent, token): node
                for node, (parent, token) in enumerate(
                    zip(step_input.parents, step_input.tokens[len(step_input.tokens) - drafts :], strict=True)
                )
            }
            node: int | None = ROOT
            while place + accepted < len(path):
                node = child.get((node, path[place + accepted]))  # type: ignore[arg-type]
                if node is None:
                    break
                accepted += 1
            accepted = min(accepted, len(path) - place - 1)
        elif drafts:
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
