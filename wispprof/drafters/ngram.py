"""Prompt lookup that learns: propose what followed an earlier occurrence of the text's last n-gram.

It searches the request's own text, and what :class:`LookupMemory` keeps of earlier answers on this device.
Source: prompt lookup decoding (Saxena 2023; transformers' ``prompt_lookup_num_tokens``). A proposal takes
microseconds, so it needs no draft model; :mod:`~wispprof.drafters.lookup_first` combines it with one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from wispprof.backends import Drafter
from wispprof.drafters.suffix_index import DEPTH, SuffixIndex
from wispprof.types import DraftFeatures, DraftToken, Sampling

_SHORTEST_REMEMBERED = 3
"""Tokens of a match in earlier answers; shorter ones say little about this text."""
_SURE_SHARE = 0.75

Kind = tuple[str, int]
"""Where a proposal comes from and how long its match is (its power of two): what is counted together."""


class Proposal(NamedTuple):
    """A token, and what kind of proposal it is."""

    token: int
    kind: Kind


class LookupMemory:
    """Earlier answers of this process, at most ``limit`` tokens, and how good proposals were.

    ``limit`` 0 keeps no text. A conversation that grows replaces its earlier turns.
    """

    def __init__(self, limit: int = 1 << 16, prior: tuple[float, float] = (2.0, 2.0)) -> None:
        self._limit = limit
        self._prior = prior
        self._sequences: tuple[tuple[int, ...], ...] = ()
        self._index: SuffixIndex | None = None
        self._indexed: tuple[tuple[int, ...], ...] = ()
        self._counts: dict[Kind, list[float]] = {}

    @property
    def tokens(self) -> int:
        """Number of tokens kept."""
        return sum(map(len, self._sequences))

    def remember(self, sequence: Sequence[int]) -> None:
        """Keep prompt and answer of a finished request; the oldest are dropped."""
        new = tuple(sequence[-self._limit :]) if self._limit else ()
        if not new:
            return
        kept = [old for old in self._sequences if new[: len(old)] != old]
        total = len(new) + sum(map(len, kept))
        while total > self._limit:
            total -= len(kept.pop(0))
        self._sequences = (*kept, new)

    def index(self) -> SuffixIndex | None:
        """The index of what is kept now; sorting it anew takes tens of milliseconds."""
        wanted = self._sequences
        if wanted is not self._indexed:
            self._index = SuffixIndex(wanted) if wanted else None
            self._indexed = wanted
        return self._index

    def confidence(self, kind: Kind) -> float:
        """Estimated probability that a proposal of this kind is right."""
        hits, misses = self._counts.get(kind, self._prior)
        return hits / (hits + misses)

    def count(self, kind: Kind, right: bool) -> None:
        """A proposal of this kind was committed, or rejected."""
        self._counts.setdefault(kind, list(self._prior))[0 if right else 1] += 1.0


class LookupDrafter(Drafter):
    """Continues the longest match of the text's end: in the text itself (the latest occurrence), or in
    earlier answers (the most frequent continuation), whichever was right more often.

    Matches in the text have at least ``shortest`` tokens; occurrences are found by at most ``longest`` and
    then followed back. The confidence of a proposal is the share of earlier proposals of its kind that were
    committed. The other features are those of a two-way choice with that confidence.
    """

    def __init__(
        self,
        memory: LookupMemory | None = None,
        longest: int = 4,
        shortest: int = 2,
        prior: tuple[float, float] = (2.0, 2.0),
    ) -> None:
        if not 0 < shortest <= longest:
            raise ValueError(f"need 0 < shortest <= longest, got {shortest} and {longest}")
        self._sizes = range(longest, shortest - 1, -1)
        self._memory = memory if memory is not None else LookupMemory(0, prior)
        self._index: SuffixIndex | None = None
        self._tokens: list[int] = []
        self._followers: dict[tuple[int, ...], list[int]] = {}
        self._pending: dict[int, Kind] = {}
        self._found: tuple[int, Proposal | None] = (-1, None)

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
        self._index = self._memory.index()
        self._append(tokens)

    def draft(self) -> DraftToken:
        """Propose; without a match, repeat the last token with the lowest confidence."""
        found = self._find()
        if found is None:
            token, confidence = self._tokens[-1], 0.01
        else:
            token, confidence = found.token, self._memory.confidence(found.kind)
            self._pending[len(self._tokens)] = found.kind
        self._append([token])
        return DraftToken(token, _features(confidence))

    def confidence(self) -> float:
        """Estimated probability that the next proposal is right; 0 without a match."""
        found = self._find()
        return 0.0 if found is None else self._memory.confidence(found.kind)

    def proposal(self) -> Proposal | None:
        """What would be drafted now; ``None`` without a match."""
        return self._find()

    def append(self, token: int) -> None:
        """Append a token that another drafter proposed."""
        self._append([token])

    def rollback(self, length: int) -> None:
        if not 0 <= length <= len(self._tokens):
            raise ValueError(f"cannot roll back {len(self._tokens)} tokens to {length}")
        rejected = self._pending.get(length)
        if rejected is not None and length < len(self._tokens):
            # The first token removed is the rejected one; the target did not judge the later ones.
            self._memory.count(rejected, False)
        for position in [p for p in self._pending if p < length]:
            self._memory.count(self._pending.pop(position), True)
        self._pending.clear()
        for end in range(len(self._tokens), length, -1):
            for size in self._sizes:
                if size < end:
                    places = self._followers[tuple(self._tokens[end - 1 - size : end - 1])]
                    places.pop()
        del self._tokens[length:]
        self._found = (-1, None)

    def extend(self, tokens: Sequence[int]) -> None:
        for position in list(self._pending):
            # Committed text follows these proposals, so they were right.
            self._memory.count(self._pending.pop(position), True)
        self._append(tokens)

    def _append(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            end = len(self._tokens)
            for size in self._sizes:
                if size <= end:  # the n-gram before this token is followed by it
                    gram = tuple(self._tokens[end - size : end])
                    self._followers.setdefault(gram, []).append(end)
            self._tokens.append(token)

    def _find(self) -> Proposal | None:
        """The best proposal after the text held; remembered until the text changes."""
        length, found = self._found
        if length != len(self._tokens):
            found = self._search()
            self._found = (len(self._tokens), found)
        return found

    def _search(self) -> Proposal | None:
        own, earlier = self._in_text(), self._in_memory()
        if own is None or earlier is None:
            return own or earlier
        ours, theirs = self._memory.confidence(own.kind), self._memory.confidence(earlier.kind)
        return earlier if theirs > ours else own

    def _in_text(self) -> Proposal | None:
        tokens = self._tokens
        for size in self._sizes:
            places = self._followers.get(tuple(tokens[-size:]))
            if len(tokens) >= size and places:
                place, length = places[-1], size
                while length < min(DEPTH, place) and tokens[place - length - 1] == tokens[-length - 1]:
                    length += 1
                return Proposal(tokens[place], ("text", length.bit_length()))
        return None

    def _in_memory(self) -> Proposal | None:
        if self._index is None:
            return None
        found = self._index.follower(self._tokens[-DEPTH:], _SHORTEST_REMEMBERED)
        if found is None:
            return None
        source = "always" if found.share >= _SURE_SHARE else "often"
        return Proposal(found.token, (source, found.length.bit_length()))


def _features(confidence: float) -> DraftFeatures:
    confidence = min(0.99, max(0.01, confidence))
    other = 1.0 - confidence
    entropy = -confidence * math.log(confidence) - other * math.log(other)
    margin = math.log(confidence / other)
    return DraftFeatures(confidence, entropy, margin, abs(margin) / 2.0)
