"""The target's tokenizer on the device: bytes of its tokens, tokens of bytes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from wispprof.engines.byte_level import BYTE_OF_CHAR

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenText:
    """Translates between ids and bytes exactly, special tokens included.

    ``prefix``: what the tokenizer itself puts before a text, such as the space of SentencePiece.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added = {int(i): str(token) for i, token in tokenizer.added_tokens_decoder.items()}
        self.end: int | None = tokenizer.eos_token_id
        probe = self.bytes_of(self._encode("a"))
        self.prefix = probe[:-1] if probe.endswith(b"a") else b""

    @cached_property
    def _texts(self) -> dict[int, str]:
        return {int(number): str(text) for text, number in self._tokenizer.get_vocab().items()}

    @cached_property
    def _byte_level(self) -> bool:
        return sum(text.startswith("Ġ") for text in self._texts.values()) > len(self._texts) // 100

    def piece(self, token: int) -> bytes:
        """The bytes of one token; nothing for an id without a token."""
        if (added := self._added.get(token)) is not None:
            return added.encode()
        text = self._texts.get(token, "")
        if self._byte_level:
            return bytes(BYTE_OF_CHAR[letter] for letter in text if letter in BYTE_OF_CHAR)
        if match := _BYTE_TOKEN.fullmatch(text):
            return bytes([int(match[1], 16)])
        return text.replace("▁", " ").encode()

    def bytes_of(self, tokens: Sequence[int]) -> bytes:
        """The bytes of a sequence of tokens."""
        return b"".join(map(self.piece, tokens))

    def encode(self, text: bytes) -> list[int] | None:
        """Tokens whose bytes are ``text``; ``None`` if the tokenizer has none (a torn character, say)."""
        if not text.startswith(self.prefix):
            return None
        try:
            tokens = self._encode(text[len(self.prefix) :].decode())
        except UnicodeDecodeError:
            return None
        return tokens if self.bytes_of(tokens) == text else None

    def _encode(self, text: str) -> list[int]:
        return [int(t) for t in self._tokenizer(text, add_special_tokens=False)["input_ids"]]
