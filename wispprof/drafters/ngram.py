"""N-gram lookup: propose what followed the last time the text ended like this.

Prompt lookup decoding (Saxena 2023; transformers' ``prompt_lookup_num_tokens``), as a
:class:`~wispprof.types.Drafter`: it costs microseconds, so a device too weak for a draft model still
gains wherever text repeats itself, and a device with one can ask it first (:class:`LookupFirst`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from wispprof.types import Drafter, DraftFeatures, DraftToken, Sampling

__all__ = ["LookupDrafter", "LookupFirst"]


class LookupDrafter(Drafter):
    """Continues the latest earlier occurrence of the longest suffix of ``longest`` … ``shortest`` tokens.

    Its confidence is learnt while it serves: the share of its proposals, by length of the match, that
    the text went on to contain, starting from ``prior`` (hits, misses). The remaining features are those
    of a two-way choice with that confidence, so a predictor that reads the margin reads the same odds.
    """

    def __init__(
        self, longest: int = 4, shortest: int = 2, prior: tuple[float, float] = (2.0, 2.0)
    ) -> None:
        if not 0 < shortest <= longest:
            raise ValueError(f"need 0 < shortest <= longest, got {shortest} and {longest}")
        self._sizes = range(longest, shortest - 1, -1)
        self._tokens: list[int] = []
        self._places: dict[tuple[int, ...], list[int]] = {}
        self._score = {size: [prior[0], prior[1]] for size in self._sizes}
        self._pending: dict[int, tuple[int, int]] = {}

    @property
    def length(self) -> int:
        return len(self._tokens)

    @property
    def can_draft(self) -> bool:
        """Whether the text so far holds an earlier occurrence of its own end."""
        return self._find() is not None

    def open(self, tokens: Sequence[int], sampling: Sampling) -> None:
        self._tokens = []
        self._places = {}
        self._pending = {}
        self._append(tokens)

    def draft(self) -> DraftToken:
        """Propose; without a match (see :attr:`can_draft`) the last token again, with least confidence."""
        found = self._find()
        if found is None:
            token, confidence = self._tokens[-1], 0.01
        else:
            size, place = found
            token, confidence = self._tokens[place], self.odds()
            self._pending[len(self._tokens)] = (size, token)
        self._append([token])
        return DraftToken(token, _features(confidence))

    def odds(self) -> float:
        """Chance that the next proposal is right, as learnt; 0 without a match."""
        found = self._find()
        if found is None:
            return 0.0
        hits, misses = self._score[found[0]]
        return hits / (hits + misses)

    def follow(self, token: int) -> None:
        """Append a token that another drafter proposed."""
        self._append([token])

    def rollback(self, length: int) -> None:
        if not 0 <= length <= len(self._tokens):
            raise ValueError(f"cannot roll back {len(self._tokens)} tokens to {length}")
        rejected = self._pending.get(length)
        if rejected is not None and length < len(self._tokens):
            # Rolled back exactly here: this proposal was the wrong one, the later ones were never judged.
            self._score[rejected[0]][1] += 1.0
        for position in [p for p in self._pending if p < length]:
            self._score[self._pending.pop(position)[0]][0] += 1.0
        self._pending.clear()
        for end in range(len(self._tokens), length, -1):
            for size in self._sizes:
                if size < end:
                    places = self._places[tuple(self._tokens[end - 1 - size : end - 1])]
                    places.pop()
        del self._tokens[length:]

    def extend(self, tokens: Sequence[int]) -> None:
        for position in list(self._pending):
            # Committed text goes on after these proposals: they were right.
            self._score[self._pending.pop(position)[0]][0] += 1.0
        self._append(tokens)

    def _append(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            end = len(self._tokens)
            for size in self._sizes:
                if size <= end:  # the n-gram before this token is followed by it
                    gram = tuple(self._tokens[end - size : end])
                    self._places.setdefault(gram, []).append(end)
            self._tokens.append(token)

    def _find(self) -> tuple[int, int] | None:
        """(length of the match, place of the token that followed it), the longest and latest."""
        for size in self._sizes:
            places = self._places.get(tuple(self._tokens[-size:]))
            if len(self._tokens) >= size and places:
                return size, places[-1]
        return None


class LookupFirst(Drafter):
    """Ask ``lookup`` first and ``model`` where it is silent or its odds are under ``least``.

    The model only reads what lookup proposed when it is asked again, all of it in one forward.
    """

    def __init__(self, lookup: LookupDrafter, model: Drafter, least: float = 0.6) -> None:
        self._lookup = lookup
        self._model = model
        self._least = least
        self._behind: list[int] = []

    @property
    def length(self) -> int:
        return self._lookup.length

    def open(self, tokens: Sequence[int], sampling: Sampling) -> None:
        self._behind = []
        self._lookup.open(tokens, sampling)
        self._model.open(tokens, sampling)

    def draft(self) -> DraftToken:
        if self._lookup.can_draft and self._lookup.odds() >= self._least:
            drafted = self._lookup.draft()
            self._behind.append(drafted.token)
            return drafted
        if self._behind:
            self._model.extend(self._behind)
            self._behind = []
        drafted = self._model.draft()
        self._lookup.follow(drafted.token)
        return drafted

    def rollback(self, length: int) -> None:
        self._lookup.rollback(length)
        known = self._model.length
        if length < known:
            self._model.rollback(length)
            self._behind = []
        else:
            del self._behind[length - known :]

    def extend(self, tokens: Sequence[int]) -> None:
        self._lookup.extend(tokens)
        self._behind.extend(tokens)


def _features(confidence: float) -> DraftFeatures:
    confidence = min(0.99, max(0.01, confidence))
    other = 1.0 - confidence
    entropy = -confidence * math.log(confidence) - other * math.log(other)
    margin = math.log(confidence / other)
    return DraftFeatures(confidence, entropy, margin, abs(margin) / 2.0)
