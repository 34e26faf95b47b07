"""Text to tokens and back: chat templates, stop tokens, incremental detokenization, stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from wispprof.errors import WispprofError
from wispprof.openai_api.openai_protocol import ApiError

_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|end_of_turn|>")
_REPLACEMENT = "\ufffd"
_CONTEXT_TOKENS = 6


class ByteTokenizer:
    """One token per byte, for targets with 256 tokens such as the fake engine's."""

    eos_token_id: int | None = None
    chat_template: str | None = None

    def get_vocab(self) -> dict[str, int]:
        return {}

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int], **_: object) -> str:
        return bytes(tokens).decode("utf-8", "replace")


class ChatTokenizer:
    """A Hugging Face tokenizer for prompts and conversations. ``stop_tokens``: ids that end an answer,
    that is its end-of-sequence token and the end-of-turn tokens of common chat templates."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        vocab = tokenizer.get_vocab()
        found = {vocab.get(name) for name in _END_OF_TURN} | {tokenizer.eos_token_id}
        self.stop_tokens = tuple(sorted(int(token) for token in found if token is not None))

    @property
    def has_chat_template(self) -> bool:
        return bool(self.tokenizer.chat_template)

    def encode(self, text: str) -> tuple[int, ...]:
        """Tokens of a prompt. Raises :class:`WispprofError` if there are none."""
        tokens = tuple(int(token) for token in self.tokenizer.encode(text))
        if not tokens:
            raise WispprofError("The prompt is empty.", "Give some text to continue.")
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens)))

    def chat(self, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
        """Tokens of a conversation, by the chat template. A base model without one continues the
        messages as one text. Raises :class:`ApiError` if the template refuses the messages."""
        if not self.has_chat_template:
            return self.encode("\n".join(message["content"] for message in messages))
        try:
            tokens = self.tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except Exception as err:
            # Templates are programs of the model's maker and raise whatever they like.
            raise ApiError(f"The model's chat template refuses this: {err}", param="messages") from err
        return tuple(int(token) for token in tokens)

    def detokenizer(self, prompt: Sequence[int]) -> IncrementalDetokenizer:
        """Text of the tokens that follow ``prompt``."""
        return IncrementalDetokenizer(self.tokenizer, prompt)


class IncrementalDetokenizer:
    """Decodes a growing token sequence piece by piece.

    A byte-level token may end within a character, and some tokenizers decode a token differently at
    the start of a text. So each piece is the difference of two decodings that begin at the same
    earlier token; it is held back while it ends in an unfinished character.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(prompt)
        self._start = max(0, len(prompt) - _CONTEXT_TOKENS)
        self._shown = len(prompt)

    def push(self, tokens: Sequence[int]) -> str:
        """Add tokens; returns the text that is final now."""
        self._tokens.extend(tokens)
        return self._advance(final=False)

    def finish(self) -> str:
        """The text held back, unfinished characters included."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        before = self._decode(self._tokens[self._start : self._shown])
        after = self._decode(self._tokens[self._start :])
        if not final and (after.endswith(_REPLACEMENT) or len(after) <= len(before)):
            return ""
        self._start = max(self._start, self._shown - _CONTEXT_TOKENS)
        self._shown = len(self._tokens)
        return after[len(before) :]

    def _decode(self, tokens: Sequence[int]) -> str:
        text = self._tokenizer.decode(
            list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)


class StopStringFilter:
    """Passes text on up to the first stop string, which is left out. Holds back text that could be
    the beginning of one. ``hit``: the stop string found, or ""."""

    def __init__(self, stop_strings: Sequence[str] = ()) -> None:
        self._stop_strings = [stop for stop in stop_strings if stop]
        self._held = ""
        self.hit = ""

    def push(self, text: str) -> str:
        """Add text; returns what may be shown, nothing after a hit."""
        if self.hit or not self._stop_strings:
            return "" if self.hit else text
        text = self._held + text
        found = [(text.find(stop), stop) for stop in self._stop_strings if stop in text]
        if found:
            end, self.hit = min(found)
            self._held = ""
            return text[:end]
        held = max(
            (n for stop in self._stop_strings for n in range(1, len(stop)) if text.endswith(stop[:n])),
            default=0,
        )
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """The text held back: no stop string came of it."""
        held, self._held = self._held, ""
        return "" if self.hit else held
