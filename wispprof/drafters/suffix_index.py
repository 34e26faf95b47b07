"""A sorted suffix array over token sequences: what followed the longest known end of a text."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

DEPTH = 16
"""Tokens by which suffixes are sorted, so also the longest match that is told apart."""
_SAMPLE = 64


class Follower(NamedTuple):
    """The token that most often followed a match of ``length`` tokens, and its ``share`` of them."""

    token: int
    length: int
    share: float


class SuffixIndex:
    """Sequences of token ids, ready to be searched; immutable. A match never spans two sequences."""

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        self._tokens: list[int] = []
        for sequence in sequences:
            self._tokens += [*sequence, -1]
        self._order = _sorted_suffixes(np.asarray(self._tokens, dtype=np.int64))

    def follower(self, text: Sequence[int], shortest: int) -> Follower | None:
        """What followed the longest suffix of ``text`` that occurs, if ``shortest`` tokens of it do."""
        best: tuple[int, int, int] | None = None
        low, high = shortest, min(DEPTH - 1, len(text))
        while low <= high:  # if a suffix occurs, so does every shorter one
            length = (low + high + 1) // 2
            first, last = self._range(text[len(text) - length :])
            if first < last:
                best = (length, first, last)
                low = length + 1
            else:
                high = length - 1
        if best is None:
            return None
        length, first, last = best
        step = max(1, (last - first) // _SAMPLE)
        tokens = self._tokens
        after = Counter(tokens[self._order[place] + length] for place in range(first, last, step))
        after.pop(-1, None)
        if not after:
            return None
        token, count = after.most_common(1)[0]
        return Follower(token, length, count / after.total())

    def _range(self, pattern: Sequence[int]) -> tuple[int, int]:
        wanted, size, tokens = list(pattern), len(pattern), self._tokens

        def start(place: int) -> list[int]:
            return tokens[place : place + size]

        first = bisect_left(self._order, wanted, key=start)
        return first, bisect_right(self._order, wanted, lo=first, key=start)


def _sorted_suffixes(tokens: np.ndarray) -> list[int]:
    """Start of every suffix, sorted by its first :data:`DEPTH` tokens: prefix doubling."""
    if not len(tokens):
        return []
    rank = np.unique(tokens, return_inverse=True)[1].reshape(-1)
    order = np.argsort(rank, kind="stable")
    width = 1
    while width < DEPTH:
        beyond = np.full(len(tokens), -1)
        beyond[: max(0, len(tokens) - width)] = rank[width:]
        order = np.lexsort((beyond, rank))
        pairs = np.stack((rank[order], beyond[order]))
        changed = np.any(pairs[:, 1:] != pairs[:, :-1], axis=0)
        fresh = np.empty_like(rank)
        fresh[order] = np.concatenate(([0], np.cumsum(changed)))
        rank, width = fresh, 2 * width
    return [int(place) for place in order]
