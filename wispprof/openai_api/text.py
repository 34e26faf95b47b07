"""Text and tokens at the HTTP door, for a Hugging Face tokenizer or for bytes.

Tokens to text while they arrive: whole characters only, cut at stop strings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from wispprof.openai_api.openai_protocol import ApiError

__all__ = [
    "ByteTokenizer",
    "ChatTokenizer",
    "StopScanner",
    "TextStream",
]


class ByteTokenizer:
    """Every byte a token. Enough for a server whose target has 256 tokens, such as the hash double."""

    eos_token_id: int | None = None
    chat_template: str | None = None

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int], **_: object) -> str:
        return bytes(tokens).decode("utf-8", "replace")


class ChatTokenizer:
    """Encodes prompts and conversations; knows the tokens that end an answer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        eos = tokenizer.eos_token_id
        self.stop_tokens: tuple[int, ...] = () if eos is None else (int(eos),)

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(int(token) for token in self.tokenizer.encode(text))

    def chat(self, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
        """By the tokenizer's template; a base model without one continues what was said."""
        if not getattr(self.tokenizer, "chat_template", None):
            return self.encode("\n".join(message["content"] for message in messages))
        try:
            tokens = self.tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except Exception as err:
            # Templates are programs of the model's maker; what they refuse is the request's fault.
            raise ApiError(
                f"The model's chat template refuses this: {err}", param="messages"
            ) from (err)
        return tuple(int(token) for token in tokens)


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
