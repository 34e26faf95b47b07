"""Text and tokens at the HTTP door, for a Hugging Face tokenizer or for bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from wispprof.runtime.openai_shapes import ApiError

__all__ = ["ByteTokenizer", "TextSide"]


class ByteTokenizer:
    """Every byte a token. Enough for a server whose target has 256 tokens, such as the hash double."""

    eos_token_id: int | None = None
    chat_template: str | None = None

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int], **_: object) -> str:
        return bytes(tokens).decode("utf-8", "replace")


class TextSide:
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
        except Exception as fault:
            # Templates are programs of the model's maker; what they refuse is the request's fault.
            raise ApiError(
                f"The model's chat template refuses this: {fault}", param="messages"
            ) from (fault)
        return tuple(int(token) for token in tokens)
