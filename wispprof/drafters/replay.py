"""Replay an acceptance trace: propose what the recorded draft model proposed.

It runs no model and takes no time; :class:`~wispprof.edge.draft_worker.TimedWorker` makes it as slow as a
device. A session must start from a prompt of the trace, and the target must follow the recorded path.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from itertools import islice

from wispprof.artifacts.rows import AcceptanceTrace, TracePath
from wispprof.backends import Continuations, DraftCandidate, Drafter, TreeDrafter
from wispprof.errors import ProfileError
from wispprof.token_tree import ROOT, TokenTree
from wispprof.types import DraftFeatures, DraftToken, Sampling


def replay_drafter(trace: AcceptanceTrace | Sequence[TracePath]) -> ReplayDrafter:
    """A replay that can draft trees if every path has the candidates of its positions."""
    paths = trace.paths if isinstance(trace, AcceptanceTrace) else trace
    trees = all(path.target_ranks is not None for path in paths)
    return ReplayTreeDrafter(paths) if trees else ReplayDrafter(paths)


class ReplayDrafter(Drafter):
    """Drafts along one path of a trace.

    Row ``i`` of the trace holds the proposals of the draft model given the path up to ``i``. While the
    tokens held equal the path, the next proposal is the first of the next row. Behind a wrong token, the
    row that proposed it continues; beyond its depth its last proposal repeats. Raises :class:`ProfileError`
    for text that the trace does not contain.
    """

    def __init__(self, trace: AcceptanceTrace | Sequence[TracePath]) -> None:
        paths = trace.paths if isinstance(trace, AcceptanceTrace) else trace
        self._by_prompt = {path.prompt: path for path in paths}
        self._path: TracePath | None = None
        self._held: list[int] = []
        self._row = 0

    @property
    def length(self) -> int:
        return (len(self._path.prompt) if self._path else 0) + len(self._held)

    @property
    def can_draft(self) -> bool:
        """Whether the path goes on after the tokens held."""
        return self._path is not None and len(self._held) < len(self._path.path)

    def open(self, tokens: Sequence[int], sampling: Sampling) -> None:
        """Start from a prompt of the trace, with or without tokens of its path."""
        sequence = tuple(tokens)
        for size in {len(prompt) for prompt in self._by_prompt}:
            path = self._by_prompt.get(sequence[:size])
            if path is not None:
                break
        else:
            raise ProfileError(
                "The trace holds no path for this prompt.", "Replay prompts of the trace only."
            )
        self._path = path
        self._held, self._row = [], 0
        self.extend(sequence[len(path.prompt) :])

    def draft(self) -> DraftToken:
        path, held = self._opened(), self._held
        position = len(held)
        if position >= len(path.path):
            raise ProfileError(f"The trace path ends after {len(path.path)} tokens.", "Ask for fewer tokens.")
        right = self._right_length()
        if right == position:
            row, depth = position, 0
        else:
            # The row that proposed the wrong token.
            row = right
            depth = min(position - right, path.depth - 1)
        token = int(path.drafts[row, depth])
        features: DraftFeatures = path.features_at(row, depth)
        held.append(token)
        return DraftToken(token, features)

    def rollback(self, length: int) -> None:
        keep = length - len(self._opened().prompt)
        if not 0 <= keep <= len(self._held):
            raise ValueError(f"cannot roll back {self.length} tokens to {length}")
        del self._held[keep:]
        self._row = min(self._row, keep)

    def extend(self, tokens: Sequence[int]) -> None:
        path = self._opened()
        first = len(self._held)
        expected = path.path[first : first + len(tokens)]
        if tuple(tokens[: len(expected)]) != expected:
            raise ProfileError(
                f"The target left the trace's path at token {first} or after it.",
                "Take a trace with the target that the server runs, or serve the trace's target.",
            )
        self._held.extend(tokens)

    def _opened(self) -> TracePath:
        if self._path is None:
            raise ProfileError("The replay drafter was not opened.", "Call open() first.")
        return self._path

    def _right_length(self) -> int:
        """Number of leading tokens held that equal the path; cached between drafts."""
        path, held = self._opened().path, self._held
        while self._row < len(held) and held[self._row] == path[self._row]:
            self._row += 1
        return self._row


class ReplayTreeDrafter(ReplayDrafter, TreeDrafter):
    """Replays draft trees, from a trace with ``target_ranks`` and ``candidate_probs``.

    On the path the target's token stands at its recorded rank, and probabilities are the recorded ones. A
    trace names only the draft's first choice beside it: the other candidates are invented, always the same
    after the same text. After a wrong token the recorded draft goes on, or an invented one, with the
    probabilities and features of the path there. Raises :class:`ProfileError` for a trace without ranks.
    """

    def __init__(self, trace: AcceptanceTrace | Sequence[TracePath]) -> None:
        super().__init__(trace)
        if any(path.target_ranks is None for path in self._by_prompt.values()):
            raise ProfileError(
                "The trace does not record the draft's candidates.",
                "Take it anew with a draft model on PyTorch.",
            )

    def expand(self, tree: TokenTree, nodes: Sequence[int], width: int) -> list[Continuations]:
        """See :class:`~wispprof.backends.TreeDrafter`; no candidates after the end of the path."""
        return [self._after([] if node == ROOT else tree.spelled(node), width) for node in nodes]

    def _after(self, spelled: list[int], width: int) -> Continuations:
        path, text = self._opened(), self._held + spelled
        position, truth = len(text), path.path
        right = next(
            (i for i, pair in enumerate(zip(text, truth, strict=False)) if pair[0] != pair[1]), position
        )
        row = min(right, len(truth) - 1)
        depth = min(position - right, path.depth - 1)
        features = path.features_at(row, depth)
        if position >= len(truth):
            return Continuations([], features)
        assert path.target_ranks is not None
        assert path.candidate_probs is not None
        probs = path.candidate_probs[position].tolist()
        tokens: list[int] = []
        excluded = {truth[position]}
        recorded = path.drafts[right].tolist()
        if text[right : right + path.depth] == recorded[: position - right]:
            tokens.append(recorded[depth])
            excluded.add(tokens[0])
        tokens += islice(_invented(text, path, excluded), len(probs))
        if right == position:
            rank = int(path.target_ranks[position])
            tokens = [token for token in tokens if token != truth[position]]
            if rank < len(probs):
                tokens.insert(rank, truth[position])
        pairs = zip(tokens, probs[:width], strict=False)
        return Continuations([DraftCandidate(token, prob) for token, prob in pairs], features)


def _invented(text: Sequence[int], path: TracePath, excluded: set[int]) -> Iterator[int]:
    """Token ids of the path's own range that follow from ``text``, none twice and none of ``excluded``."""
    size = 1 + max(*path.prompt, *path.path, int(path.drafts.max()))
    first = zlib.crc32(repr(text).encode())
    return (token for offset in range(size) if (token := (first + offset) % size) not in excluded)
