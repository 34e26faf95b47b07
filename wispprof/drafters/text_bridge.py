"""Drafts of a model whose vocabulary is not the target's, by way of the text.

The draft model continues the text in its own tokens. What it wrote is tokenized with the target's tokenizer
from the last certain boundary (the start of a word) and proposed as far as further text rarely changes it.
The target verifies tokens as always, so a wrong boundary costs a rejection and never the text.

The draft model decides greedily: its position noise belongs to other ids than the target's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from wispprof.backends import Drafter
from wispprof.drafters.model_drafter import ModelDrafter
from wispprof.drafters.token_text import TokenText
from wispprof.errors import EngineError
from wispprof.types import DraftFeatures, DraftToken, Sampling

_SPACES = b" \t\n\r"
_LOOKAHEAD = 12
"""Most tokens that the draft model writes for one proposal."""
_UNSPACED = 6
"""After so many tokens without a space, all of the text but its last two tokens counts as certain."""
_ANCHOR = 16


class DraftCodec(Protocol):
    """Text and tokens of the draft model; :class:`~wispprof.drafters.gguf_model.GgufModel` is one."""

    def piece(self, token: int) -> bytes: ...

    def encode(self, text: bytes, *, start: bool = False) -> list[int]: ...

    def is_end(self, token: int) -> bool: ...


class TextBridge(Drafter):
    """Holds a sequence of the target's tokens; ``inner`` holds the same text in its own.

    ``_text`` is the text held, ``_written`` that of ``inner``, which runs ahead of it by what it drafted.
    """

    def __init__(self, inner: ModelDrafter, codec: DraftCodec, target: TokenText) -> None:
        self.max_context = inner.max_context
        self._inner, self._codec, self._target = inner, codec, target
        self._tokens: list[int] = []
        self._text = b""
        self._written = b""
        self._ends: list[int] = []  # of each inner token, in bytes
        self._features: dict[int, DraftFeatures] = {}  # of inner tokens that it drafted
        self._over = False  # inner would end the answer after what it wrote
        self._queue: list[DraftToken] = []
        self._end_token = target.end

    @property
    def length(self) -> int:
        return len(self._tokens)

    @property
    def can_draft(self) -> bool:
        """Whether a token is certain by now; runs the draft model until one is."""
        if self._tokens[-1:] == [self._end_token]:
            return False
        if not self._queue:
            self._fill()
        return bool(self._queue)

    def open(self, tokens: Sequence[int], sampling: Sampling) -> None:
        self._tokens = [int(token) for token in tokens]
        self._queue, self._features, self._over = [], {}, False
        stops = sampling.stop_tokens
        self._end_token = self._target.end
        if stops and self._end_token not in stops:
            self._end_token = stops[0]
        self._text = self._written = self._target.bytes_of(tokens)
        ids = self._codec.encode(self._text, start=True)
        if not ids:
            raise EngineError("The prompt has no text that the draft model could read.")
        self._inner.open(ids, Sampling())
        self._ends = self._ends_of(ids, 0)

    def draft(self) -> DraftToken:
        if not self.can_draft:
            raise EngineError("The draft model has nothing certain to propose.", "Ask can_draft first.")
        drafted = self._queue.pop(0)
        self._append([drafted.token])
        return drafted

    def extend(self, tokens: Sequence[int]) -> None:
        foreseen = [drafted.token for drafted in self._queue[: len(tokens)]]
        self._queue = self._queue[len(tokens) :] if foreseen == list(tokens) else []
        self._append(tokens)

    def rollback(self, length: int) -> None:
        if not 0 <= length <= len(self._tokens):
            raise EngineError(f"Cannot roll back {len(self._tokens)} tokens to {length}.")
        if length < len(self._tokens):
            self._queue = []
            cut = len(self._target.bytes_of(self._tokens[length:]))
            self._text = self._text[: len(self._text) - cut]
            del self._tokens[length:]

    def prefill(self) -> None:
        self._follow()
        self._inner.prefill()

    def _append(self, tokens: Sequence[int]) -> None:
        self._tokens.extend(tokens)
        self._text += self._target.bytes_of(tokens)

    # --- the draft model's side ---

    def _ends_of(self, ids: Sequence[int], start: int) -> list[int]:
        """Where each of ``ids`` ends in the text. The last one ends with it, whatever a codec adds."""
        ends = []
        for token in ids:
            start = min(len(self._written), start + len(self._codec.piece(token)))
            ends.append(start)
        if ends:
            ends[-1] = len(self._written)
        return ends

    def _follow(self) -> None:
        """Make the draft model hold the text, and nothing else than a continuation of it."""
        if self._written.startswith(self._text):
            return
        same = _common(self._written, self._text)
        keep = len(self._ends)
        while keep > 1 and self._ends[keep - 1] > same:
            keep -= 1
        # Back to the start of a word: the tokens of half a word depend on its other half.
        for _ in range(_ANCHOR):
            if keep <= 1 or self._text[self._ends[keep - 1] : self._ends[keep - 1] + 1] in (b" ", b"\n"):
                break
            keep -= 1
        start = self._ends[keep - 1]
        ids = self._codec.encode(self._text[start:])
        self._written = self._text
        self._inner.rollback(keep)
        self._inner.extend(ids)
        del self._ends[keep:]
        self._ends += self._ends_of(ids, start)
        self._features = {place: f for place, f in self._features.items() if place < keep}
        self._over = False

    def _fill(self) -> None:
        self._follow()
        for _ in range(_LOOKAHEAD):
            self._queue = self._certain()
            if self._queue or self._over or self._inner.length + 1 >= self._inner.max_context:
                return
            drafted = self._inner.draft()
            if self._codec.is_end(drafted.token):
                self._inner.rollback(self._inner.length - 1)
                self._over = True
                self._end_features = drafted.features
            else:
                self._features[len(self._ends)] = drafted.features
                self._written += self._codec.piece(drafted.token)
                self._ends.append(len(self._written))

    # --- the target's side ---

    def _certain(self) -> list[DraftToken]:
        """The target's next tokens, as far as what was written decides them."""
        held = len(self._text)
        if len(self._written) == held:
            if self._over and self._end_token is not None:
                return [DraftToken(self._end_token, self._end_features)]
            return []
        limit = self._certain_end(held)
        if limit <= held:
            return []
        first = self._anchor(held)
        known = self._tokens[first:]
        start = held - len(self._target.bytes_of(known))
        tokens = self._target.encode(_whole(self._written[start:]))
        if tokens is None or tokens[: len(known)] != known:
            start, known = held, []
            tokens = self._target.encode(_whole(self._written[held:])) or []
        proposed, end = [], held
        for token in tokens[len(known) :]:
            begin, end = end, end + len(self._target.piece(token))
            if end > limit:
                break
            proposed.append(DraftToken(token, self._features_between(begin, end)))
        return proposed

    def _certain_end(self, held: int) -> int:
        """Up to where further text rarely changes the target's tokens.

        A token that begins a word, or is no letter, counts as the end of a word before the next one is
        written: with Gemma as the draft of SmolLM2 it was one as a rule. Waiting for proof took twice as many
        draft steps for the first proposal of a round, and no more drafts were accepted.
        """
        written = self._written
        if self._over:
            return len(written)
        for place in range(len(written) - 1, held - 1, -1):
            if written[place] in _SPACES and place > 0 and written[place - 1] not in _SPACES:
                if place > held:
                    return place
                break
        newest = written[self._ends[-2] if len(self._ends) > 1 else 0 :]
        if newest.strip() and newest[0] < 0x80 and not newest[:1].isalnum():
            return len(written)
        ahead = [end for end in self._ends if end > held]
        return ahead[-3] if len(ahead) >= _UNSPACED else held

    def _anchor(self, held: int) -> int:
        """Index of the held token from which to tokenize: the last that begins a word."""
        if self._written[held] in _SPACES:
            return len(self._tokens)
        for first in range(len(self._tokens) - 1, max(-1, len(self._tokens) - 1 - _ANCHOR), -1):
            if self._target.piece(self._tokens[first])[:1] in (b" ", b"\n"):
                return first
        return len(self._tokens)

    def _features_between(self, begin: int, end: int) -> DraftFeatures:
        """Features of the least certain draft token that wrote a part of these bytes."""
        found = [
            features
            for place, features in self._features.items()
            if self._ends[place] > begin and (place == 0 or self._ends[place - 1] < end)
        ]
        return min(found, key=lambda features: features.confidence, default=_UNSURE)


_UNSURE = DraftFeatures(0.5, 1.0, 0.0, 1.0)


def _common(one: bytes, other: bytes) -> int:
    size = min(len(one), len(other))
    if one[:size] == other[:size]:
        return size
    return next(i for i in range(size) if one[i] != other[i])


def _whole(text: bytes) -> bytes:
    """``text`` without a character torn at its end."""
    for cut in range(min(4, len(text))):
        part = text[: len(text) - cut]
        try:
            part.decode()
        except UnicodeDecodeError:
            continue
        return part
    return text
