"""Prompt lookup: propose the tokens that followed an earlier occurrence of the text's last n-gram.

Source: prompt lookup decoding (Saxena 2023; transformers' ``prompt_lookup_num_tokens``). A proposal takes
microseconds, so it needs no draft model; :class:`LookupFirst` combines it with one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from wispprof.backends import Drafter
from wispprof.types import DraftFeatures, DraftToken, Sampling


class LookupDrafter(Drafter):
    """Continues the latest earlier occurrence of the longest suffix of ``longest`` … ``shortest`` tokens.

    The confidence of a proposal is the share of earlier proposals with the same match length that were
    committed, starting from ``prior`` (hits, misses). The other features are those of a two-way choice with
    that confidence.
    """

    def __init__(self, longest: int = 4, shortest: int = 2, prior: tuple[float, float] = (2.0, 2.0)) -> None:
        if not 0 < shortest <= longest:
            raise ValueError(f"need 0 < shortest <= longest, got {shortest} and {longest}")
        self._sizes = range(longest, shortest - 1, -1)
        self._tokens: list[int] = []
        self._followers: dict[tuple[int, ...], list[int]] = {}
        self._counts = {size: [prior[0], prior[1]] for size in self._sizes}
        self._pending: dict[int, tuple[int, int]] = {}

    @property
    def length(self) -> int:
        return len(self._tokens)

    @property
    def can_draft(self) -> bool:
        """Whether the text's end occurred before."""
        return self._find() is not None

    def open(self, tokens: Sequence[int], sampling: Sampling) -> None:
        self._tokens = []
        self._followers = {}
        self._pending = {}
        self._append(tokens)

    def draft(self) -> DraftToken:
        """Propose; without a match, repeat the last token with the lowest confidence."""
        found = self._find()
        if found is None:
            token, confidence = self._tokens[-1], 0.01
        else:
            size, place = found
            token, confidence = self._tokens[place], self.confidence()
            self._pending[len(self._tokens)] = (size, token)
        self._append([token])
        return DraftToken(token, _features(confidence))

    def confidence(self) -> float:
        """Estimated probability that the next proposal is right; 0 without a match."""
        found = self._find()
        if found is None:
            return 0.0
        hits, misses = self._counts[found[0]]
        return hits / (hits + misses)

    def append(self, token: int) -> None:
        """Append a token that another drafter proposed."""
        self._append([token])

    def rollback(self, length: int) -> None:
        if not 0 <= length <= len(self._tokens):
            raise ValueError(f"cannot roll back {len(self._tokens)} tokens to {length}")
        rejected = self._pending.get(length)
        if rejected is not None and length < len(self._tokens):
            # The first token removed is the rejected one; the target did not judge the later ones.
            self._counts[rejected[0]][1] += 1.0
        for position in [p for p in self._pending if p < length]:
            self._counts[self._pending.pop(position)[0]][0] += 1.0
        self._pending.clear()
        for end in range(len(self._tokens), length, -1):
            for size in self._sizes:
                if size < end:
                    places = self._followers[tuple(self._tokens[end - 1 - size : end - 1])]
                    places.pop()
        del self._tokens[length:]

    def extend(self, tokens: Sequence[int]) -> None:
        for position in list(self._pending):
            # Committed text follows these proposals, so they were right.
            self._counts[self._pending.pop(position)[0]][0] += 1.0
        self._append(tokens)

    def _append(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            end = len(self._tokens)
            for size in self._sizes:
                if size <= end:  # the n-gram before this token is followed by it
                    gram = tuple(self._tokens[end - size : end])
                    self._followers.setdefault(gram, []).append(end)
            self._tokens.append(token)

    def _find(self) -> tuple[int, int] | None:
        """(length of the match, position of the token after it), for the longest and latest match."""
        for size in self._sizes:
            places = self._followers.get(tuple(self._tokens[-size:]))
            if len(self._tokens) >= size and places:
                return size, places[-1]
        return None


class LookupFirst(Drafter):
    """Drafts by ``lookup`` if its confidence is at least ``min_confidence``, else by ``model``.

    The model reads the tokens that lookup proposed when it drafts next, all in one forward.
    """

    def __init__(self, lookup: LookupDrafter, model: Drafter, min_confidence: float = 0.6) -> None:
        self.max_context = model.max_context
        self._lookup = lookup
        self._model = model
        self._min_confidence = min_confidence
        self._unread: list[int] = []

    @property
    def length(self) -> int:
        return self._lookup.length

    def open(self, tokens: Sequence[int], sampling: Sampling) -> None:
        self._unread = []
        self._lookup.open(tokens, sampling)
        self._model.open(tokens, sampling)

    def draft(self) -> DraftToken:
        if self._lookup.can_draft and self._lookup.confidence() >= self._min_confidence:
            drafted = self._lookup.draft()
            self._unread.append(drafted.token)
            return drafted
        if self._unread:
            self._model.extend(self._unread)
            self._unread = []
        drafted = self._model.draft()
        self._lookup.append(drafted.token)
        return drafted

    def rollback(self, length: int) -> None:
        self._lookup.rollback(length)
        known = self._model.length
        if length < known:
            self._model.rollback(length)
            self._unread = []
        else:
            del self._unread[length - known :]

    def extend(self, tokens: Sequence[int]) -> None:
        self._lookup.extend(tokens)
        self._unread.extend(tokens)


def _features(confidence: float) -> DraftFeatures:
    confidence = min(0.99, max(0.01, confidence))
    other = 1.0 - confidence
    entropy = -confidence * math.log(confidence) - other * math.log(other)
    margin = math.log(confidence / other)
    return DraftFeatures(confidence, entropy, margin, abs(margin) / 2.0)
