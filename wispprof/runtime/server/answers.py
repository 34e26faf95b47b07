"""How completions look, whole and in pieces (https://platform.openai.com/docs/api-reference)."""

from __future__ import annotations

import json
import secrets
import time
from typing import Any

__all__ = ["ChatAnswer", "CompletionAnswer", "event", "usage"]


class CompletionAnswer:
    """``/v1/completions``. ``echo``: the prompt's text, where the request wants it repeated."""

    prefix, whole_kind, piece_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, echo: str = "") -> None:
        self._echo = echo
        self._base = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, text: str, finished: str, counts: dict[str, Any]) -> dict[str, Any]:
        choice = self._choice(self._whole(text), finished)
        return {**self._base, "object": self.whole_kind, "choices": [choice], "usage": counts}

    def first(self) -> str:
        """What a stream begins with: the echo, or the role."""
        return self.piece(self._echo) if self._echo else ""

    def piece(self, text: str) -> str:
        return self._event([self._choice(self._piece(text), None)])

    def last(self, finished: str) -> str:
        return self._event([self._choice(self._piece(""), finished)])

    def counted(self, counts: dict[str, Any]) -> str:
        """The piece that ``stream_options.include_usage`` asks for."""
        return self._event([], usage=counts)

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> str:
        return event({**self._base, "object": self.piece_kind, "choices": choices, **more})

    def _whole(self, text: str) -> dict[str, Any]:
        return {"text": self._echo + text}

    def _piece(self, text: str) -> dict[str, Any]:
        return {"text": text}

    @staticmethod
    def _choice(content: dict[str, Any], finished: str | None) -> dict[str, Any]:
        return {"index": 0, **content, "logprobs": None, "finish_reason": finished}


class ChatAnswer(CompletionAnswer):
    """``/v1/chat/completions``."""

    prefix, whole_kind, piece_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def first(self) -> str:
        return self._event([self._choice({"delta": {"role": "assistant", "content": ""}}, None)])

    def last(self, finished: str) -> str:
        return self._event([self._choice({"delta": {}}, finished)])

    def _whole(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}

    def _piece(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text}}


def usage(prompt: int, completion: int, reused: int) -> dict[str, Any]:
    """Token counts; ``reused``: prompt tokens whose KV was there already."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": reused},
    }


def event(body: Any) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(body)}\n\n"
