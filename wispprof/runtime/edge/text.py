"""Tokens to text while they arrive: whole characters only, cut at stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["StopScanner", "TextStream"]

_UNFINISHED = "\ufffd"


class TextStream:
    """Decodes a growing token sequence piece by piece.

    A byte-level token may end in the middle of a character, and some tokenizers decode a token
    differently at the start of a text; so each piece is the difference of two decodings that begin at
    the same earlier token, and is held back while it ends in an unfinished character.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(prompt)
        self._start = max(0, len(prompt) - 6)
        self._shown = len(prompt)

    def push(self, tokens: Sequence[int]) -> str:
        """Take in tokens; returns the text that is certain now."""
        self._tokens.extend(tokens)
        return self._advance(final=False)

    def finish(self) -> str:
        """What was held back, unfinished characters included."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        before = self._decode(self._tokens[self._start : self._shown])
        after = self._decode(self._tokens[self._start :])
        if not final and after.endswith(_UNFINISHED):
            return ""
        if len(after) <= len(before) and not final:
            return ""
        self._start = max(self._start, self._shown - 6)
        self._shown = len(self._tokens)
        return after[len(before) :]

    def _decode(self, tokens: Sequence[int]) -> str:
        text = self._tokenizer.decode(
            list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)


class StopScanner:
    """Passes text on up to the first of some stop strings, which is left out.

    Text that could be the beginning of a stop string is held back until it is decided.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.hit = ""

    def push(self, text: str) -> str:
        """Take in text; returns what may be shown. After a hit (:attr:`hit`) nothing more."""
        if self.hit or not self._stops:
            return "" if self.hit else text
        text = self._held + text
        found = [(text.find(stop), stop) for stop in self._stops if stop in text]
        if found:
            place, self.hit = min(found)
            self._held = ""
            return text[:place]
        keep = max(
            (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])),
            default=0,
        )
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back: no stop string came of it."""
        held, self._held = self._held, ""
        return "" if self.hit else held
