"""Text of a growing token sequence, token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_REPLACEMENT = "\ufffd"
_CONTEXT_TOKENS = 6
_WINDOW_TOKENS = 12
_MAX_HELD_TOKENS = 32

Decode = Callable[[list[int]], str]


class IncrementalDetokenizer:
    """Decodes token by token, so the text does not depend on how many tokens come at once.

    A byte-level token may end within a character, and some tokenizers decode a token differently at
    the start of a text. So each piece is the difference of two decodings that begin at the same
    earlier token, which begins a character. A piece is held back while it ends in an unfinished character;
    a text that ends there ends without it.
    """

    def __init__(self, decode: Decode, prompt: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window = self._prompt_window(prompt)
        self._shown = len(self._window)
        self._before = decode(self._window).rstrip(_REPLACEMENT)

    def _prompt_window(self, prompt: Sequence[int]) -> list[int]:
        window: list[int] = []
        for count in range(min(_CONTEXT_TOKENS, len(prompt)), min(_WINDOW_TOKENS, len(prompt)) + 1):
            window = list(prompt[len(prompt) - count :])
            if not self._decode(window).startswith(_REPLACEMENT):
                break
        return window

    def step(self, token: int) -> str:
        """Add a token; returns the text that is final now."""
        window = self._window
        window.append(token)
        after = self._decode(window)
        held = len(window) - self._shown
        if len(after) <= len(self._before) or (after.endswith(_REPLACEMENT) and held < _MAX_HELD_TOKENS):
            return ""
        piece = after[len(self._before) :]
        self._before = after
        if len(window) > _WINDOW_TOKENS:
            del window[: self._shown]
            self._before = self._decode(window)
        self._shown = len(window)
        return piece

    def push(self, tokens: Sequence[int]) -> str:
        """Add tokens; returns the text that is final now."""
        return "".join([self.step(token) for token in tokens])
