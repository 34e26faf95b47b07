"""N-gram lookup and a draft model together: at every position the one that is right more often there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from wispprof.backends import Drafter
from wispprof.drafters.ngram import Kind, LookupDrafter
from wispprof.types import DraftToken, Sampling

_PRIOR = 4.0
"""Proposals that a first guess weighs."""
_BEFORE = 6.0
"""Proposals of this answer that all earlier ones weigh."""
_LONGEST = 200.0
_MARGIN = 1.0
"""Standard errors by which lookup must be better: of two shares that are equal, the larger one is luck."""


class _Share:
    """Share of proposals that were right; those of this answer weigh more."""

    def __init__(self, guess: float) -> None:
        self._right, self._judged = _PRIOR * guess, _PRIOR
        self._right_now = self.judged_now = 0.0

    def count(self, right: bool) -> None:
        self._right += right
        self._judged += 1.0
        self._right_now += right
        self.judged_now += 1.0

    def begin(self) -> None:
        """A new answer."""
        self._right_now = self.judged_now = 0.0
        if self._judged > _LONGEST:
            self._right, self._judged = self._right / 2.0, self._judged / 2.0

    @property
    def rate(self) -> float:
        before = self._right / self._judged
        return (self._right_now + _BEFORE * before) / (self.judged_now + _BEFORE)

    @property
    def variance(self) -> float:
        """Of :attr:`rate`, as if the proposals that it rests on were independent."""
        return self.rate * (1.0 - self.rate) / (self.judged_now + min(_BEFORE, self._judged))


class _Tried(NamedTuple):
    """What was proposed at a position: by lookup, and by the model unless lookup drafted."""

    kind: Kind | None
    lookup: int
    model: int | None


class LookupFirst(Drafter):
    """Drafts by ``lookup`` or by ``model``, whichever was right more often where lookup had a proposal of the
    same kind (its source, and how long its match is).

    A text that repeats itself is easy for a model, too. So the model is not judged by all its drafts but by
    those at such positions, and lookup's proposals are judged there although the model drafts: they cost
    nothing. ``min_confidence``: the model's share until it is known. The model reads the tokens that lookup
    proposed when it drafts next, all in one forward.
    """

    def __init__(self, lookup: LookupDrafter, model: Drafter, min_confidence: float = 0.6) -> None:
        self.max_context = model.max_context
        self._lookup = lookup
        self._model = model
        self._overall = _Share(min_confidence)
        self._of_lookup: dict[Kind, _Share] = {}
        self._of_model: dict[Kind, _Share] = {}
        self._tried: dict[int, _Tried] = {}
        self._rejected: tuple[int, _Tried] | None = None
        self._unread: list[int] = []

    @property
    def length(self) -> int:
        return self._lookup.length

    @property
    def can_draft(self) -> bool:
        if self._prefers_lookup():
            return True
        self._read()
        return self._model.can_draft

    def open(self, tokens: Sequence[int], sampling: Sampling) -> None:
        self._unread, self._rejected = [], None
        self._tried.clear()
        for share in (self._overall, *self._of_lookup.values(), *self._of_model.values()):
            share.begin()
        self._lookup.open(tokens, sampling)
        self._model.open(tokens, sampling)

    def draft(self) -> DraftToken:
        found, place = self._lookup.proposal(), self._lookup.length
        if found is not None and self._prefers_lookup():
            drafted = self._lookup.draft()
            self._tried[place] = _Tried(found.kind, found.token, None)
            self._unread.append(drafted.token)
            return drafted
        self._read()
        drafted = self._model.draft()
        kind, token = (found.kind, found.token) if found is not None else (None, -1)
        self._tried[place] = _Tried(kind, token, drafted.token)
        self._lookup.append(drafted.token)
        return drafted

    def rollback(self, length: int) -> None:
        self._accepted_before(length)
        tried = self._tried.get(length)
        self._rejected = (length, tried) if tried is not None and length < self._lookup.length else None
        self._tried.clear()
        self._lookup.rollback(length)
        known = self._model.length
        if length < known:
            self._model.rollback(length)
            self._unread = []
        else:
            del self._unread[length - known :]

    def extend(self, tokens: Sequence[int]) -> None:
        self._accepted_before(self._lookup.length)
        if self._rejected is not None and tokens:
            place, tried = self._rejected
            if place == self._lookup.length:
                self._judge(tried, tokens[0])
        self._rejected = None
        self._lookup.extend(tokens)
        self._unread.extend(tokens)

    def prefill(self) -> None:
        self._read()
        self._model.prefill()

    def _prefers_lookup(self) -> bool:
        found = self._lookup.proposal()
        if found is None:
            return False
        lookup, model = self._shares(found.kind)
        unsure = math.sqrt(lookup.variance + model.variance)
        return lookup.rate - model.rate >= _MARGIN * unsure

    def _shares(self, kind: Kind) -> tuple[_Share, _Share]:
        if kind not in self._of_lookup:
            self._of_lookup[kind], self._of_model[kind] = _Share(0.5), _Share(self._overall.rate)
        return self._of_lookup[kind], self._of_model[kind]

    def _accepted_before(self, length: int) -> None:
        """Drafts before this position are what the target says."""
        for place in [place for place in self._tried if place < length]:
            tried = self._tried.pop(place)
            self._judge(tried, tried.lookup if tried.model is None else tried.model)

    def _judge(self, tried: _Tried, truth: int) -> None:
        if tried.model is not None:
            self._overall.count(tried.model == truth)
        if tried.kind is not None:
            lookup, model = self._shares(tried.kind)
            lookup.count(tried.lookup == truth)
            if tried.model is not None:
                model.count(tried.model == truth)

    def _read(self) -> None:
        if self._unread:
            self._model.extend(self._unread)
            self._unread = []
