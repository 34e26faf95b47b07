"""Text to tokens and back, with the target's chat template and stop tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from wispprof.engines.byte_level import BYTE_OF_CHAR
from wispprof.errors import WispprofError
from wispprof.openai_api.api_error import ApiError
from wispprof.openai_api.detokenizer import Decode, IncrementalDetokenizer
from wispprof.types import ServedModel

_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|end_of_turn|>")
_REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_TEMPLATE_ARGUMENTS = frozenset(
    {"conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt"}
    | {"continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors"}
    | {"return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"}
)


class ByteTokenizer:
    """One token per byte, for targets with 256 tokens such as the fake engine's."""

    eos_token_id: int | None = None
    chat_template: str | None = None
    is_fast = False
    added_tokens_decoder: Mapping[int, Any] = {}

    def get_vocab(self) -> dict[str, int]:
        return {f"<0x{byte:02X}>": byte for byte in range(256)}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int], **_: object) -> str:
        return bytes(tokens).decode("utf-8", "replace")


class ChatTokenizer:
    """A Hugging Face tokenizer for prompts and conversations.

    ``stop_tokens``: ids that end an answer; by default the tokenizer's end-of-sequence token and the
    end-of-turn tokens of common chat templates. ``chat_template``: by default the tokenizer's own; empty if
    there is none.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        stop_tokens: Sequence[int] | None = None,
        chat_template: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        if stop_tokens is None:
            vocab = tokenizer.get_vocab()
            found = {vocab.get(name) for name in _END_OF_TURN} | {tokenizer.eos_token_id}
            stop_tokens = [int(token) for token in found if token is not None]
        self.stop_tokens = tuple(sorted(stop_tokens))
        self.chat_template = _own_template(tokenizer) if chat_template is None else chat_template
        # transformers' own decode costs seven times as much, and is the same without its clean-up.
        self._fast = tokenizer.backend_tokenizer if tokenizer.is_fast else None

    def for_target(self, model: ServedModel) -> ChatTokenizer:
        """The same vocabulary with the stop tokens and the chat template of ``model``."""
        return ChatTokenizer(self.tokenizer, stop_tokens=model.stop_tokens, chat_template=model.chat_template)

    @property
    def has_chat_template(self) -> bool:
        return bool(self.chat_template)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return 1 + max(int(token) for token in self.tokenizer.get_vocab().values())

    @cached_property
    def special_texts(self) -> dict[int, str]:
        """Texts of the special tokens, which answers leave out."""
        added = self.tokenizer.added_tokens_decoder
        return {int(number): str(token.content) for number, token in added.items() if token.special}

    def encode(self, text: str, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Tokens of a prompt. Raises :class:`WispprofError` if there are none."""
        found = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        tokens = tuple(int(token) for token in found)
        if not tokens:
            raise WispprofError("The prompt is empty.", "Give some text to continue.")
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        return self._decoder(skip_special_tokens=False)(list(tokens))

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> tuple[int, ...]:
        """Tokens of a conversation, by the chat template. ``variables`` are the template's own.

        A base model without a template continues the messages as one text. Raises :class:`ApiError` if the
        template refuses the messages.
        """
        if taken := _TEMPLATE_ARGUMENTS.intersection(variables or ()):
            raise ApiError(f"{min(taken)} is no variable of a chat template.", param="chat_template_kwargs")
        if add_generation_prompt and continue_final_message:
            raise ApiError(
                "A final message can be continued only with add_generation_prompt: false.",
                param="continue_final_message",
            )
        if not self.has_chat_template:
            if tools or variables or not add_generation_prompt:
                field = "tools" if tools else "chat_template_kwargs" if variables else "add_generation_prompt"
                raise ApiError(f"The model has no chat template, which {field} needs.", param=field)
            return self.encode("\n".join(message["content"] for message in messages))
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) if tools else None,
                chat_template=self.chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=False,
                **(variables or {}),
            )
        except Exception as err:
            # Templates are programs of the model's maker and raise whatever they like.
            message = f"The model's chat template refuses this: {err!s:.300}"
            raise ApiError(message, param="messages") from err
        return self.encode(text, add_special_tokens=False)

    def detokenizer(self, prompt: Sequence[int], skip_special_tokens: bool = True) -> IncrementalDetokenizer:
        """Text of the tokens that follow ``prompt``."""
        return IncrementalDetokenizer(self._decoder(skip_special_tokens), prompt)

    def _decoder(self, skip_special_tokens: bool) -> Decode:
        if self._fast is not None:
            decode = self._fast.decode
            return lambda tokens: str(decode(tokens, skip_special_tokens=skip_special_tokens))
        decode = self.tokenizer.decode
        return lambda tokens: str(
            decode(tokens, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
        )

    # --- single tokens, for log-probabilities ---

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for, even if they end within a character."""
        known = self._token_bytes.get(token)
        if known is None:
            known = self._token_bytes[token] = self._bytes_of(token)
        return known

    @cached_property
    def _token_bytes(self) -> dict[int, bytes]:
        return {}

    @cached_property
    def _pieces(self) -> dict[int, str]:
        return {int(number): str(piece) for piece, number in self.tokenizer.get_vocab().items()}

    def _bytes_of(self, token: int) -> bytes:
        text = self._decoder(skip_special_tokens=False)([token])
        piece = self._pieces.get(token, text)
        if found := _BYTE_TOKEN.fullmatch(piece):
            return bytes([int(found[1], 16)])
        if _REPLACEMENT in text and all(char in BYTE_OF_CHAR for char in piece):
            return bytes(BYTE_OF_CHAR[char] for char in piece)
        if piece.startswith("\u2581") and not text.startswith(" "):
            text = " " + text
        return text.encode("utf-8", "replace")


def _own_template(tokenizer: Any) -> str:
    """A tokenizer's chat template; of several, the one that is called ``default``."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default") or next(iter(template.values()), "")
    return str(template or "")
