"""A drafter of trees for the hash target, which insists on what an engine of trees relies on."""

from __future__ import annotations

from collections.abc import Sequence

from wispprof.backends import Continuations, DraftCandidate, TreeDrafter
from wispprof.testing.fake_engine import FakeDrafter, _mix
from wispprof.token_tree import ROOT, TokenTree
from wispprof.types import DraftFeatures, DraftToken, Sampling

_PROBS = (0.5, 0.2, 0.1, 0.08, 0.05, 0.04)


class FakeTreeDrafter(FakeDrafter, TreeDrafter):
    """The target's own token is the first candidate with probability ``accuracy``, the second with half of
    what is left, and so on. Raises ``ValueError`` for a node whose parent has no KV."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self._expanded: set[tuple[int, ...]] = set()
        self.forwards = 0

    def open(self, tokens: Sequence[int], sampling: Sampling) -> None:
        self._expanded = set()
        super().open(tokens, sampling)

    def draft(self) -> DraftToken:
        self._expanded = set()
        return super().draft()

    def rollback(self, length: int) -> None:
        self._expanded = set()
        super().rollback(length)

    def extend(self, tokens: Sequence[int]) -> None:
        path, known = tuple(tokens), getattr(self, "_expanded", set())
        kept = path in known
        self._expanded = {
            one[len(path) :] for one in known if kept and one[: len(path)] == path and one != path
        }
        super().extend(tokens)

    def expand(self, tree: TokenTree, nodes: Sequence[int], width: int) -> list[Continuations]:
        self.forwards += 1
        found = []
        for node in nodes:
            spelled = tuple([] if node == ROOT else tree.spelled(node))
            if len(spelled) > 1 and spelled[:-1] not in self._expanded:
                raise ValueError(f"The parent of {spelled} was not expanded.")
            found.append(self._after(spelled, width))
        self._expanded.update(tuple(tree.spelled(node)) for node in nodes if node != ROOT)
        return found

    def _after(self, spelled: Sequence[int], width: int) -> Continuations:
        state = self._states[-1]
        for token in spelled:
            state = self._target.feed(state, token)
        right = self._target.choose(state, len(self._tokens) + len(spelled), self._sampling)
        draw, rank, chance = (_mix(state, self._salt) >> 16) % 10_000 / 10_000.0, 0, self._accuracy
        while draw >= chance and rank < len(_PROBS):
            rank, chance = rank + 1, chance + (1.0 - chance) / 2
        tokens = [(right + 1 + number) % self._target.vocab for number in range(len(_PROBS))]
        if rank < len(tokens):
            tokens[rank] = right
        candidates = [DraftCandidate(*pair) for pair in zip(tokens, _PROBS, strict=True)][:width]
        return Continuations(candidates, DraftFeatures(0.6, 1.0, 1.0, 1.0))
