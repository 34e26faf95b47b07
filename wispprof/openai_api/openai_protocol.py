"""The OpenAI-compatible API's requests and answers, as the server and the edge both speak it.

Follows https://platform.openai.com/docs/api-reference (chat completions and completions). Fields that the
engine cannot honour are refused rather than ignored where they would change the text (``n`` > 1, tools,
penalties, ``logprobs``); those that cannot are taken and ignored (``user``, ``metadata``).
"""

from __future__ import annotations

import json
import secrets
import time
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from wispprof.errors import WispprofError
from wispprof.types import Sampling

__all__ = [
    "ApiError",
    "ChatAnswer",
    "ChatRequest",
    "CompletionAnswer",
    "CompletionRequest",
    "Message",
    "error_body",
    "event",
    "usage",
]

# --- requests -------------------------------------------------------------------------------------


class ApiError(WispprofError):
    """A request that this API refuses; ``status`` is its HTTP status."""

    def __init__(self, message: str, status: int = 400, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param


def error_body(message: str, kind: str = "invalid_request_error", param: str | None = None) -> Any:
    """An error as OpenAI clients expect it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


class Message(BaseModel):
    """One message of a conversation. Only text content."""

    role: str
    content: str | list[dict[str, Any]] | None = ""

    def text(self) -> str:
        if isinstance(self.content, list):
            kinds = {part.get("type") for part in self.content}
            if kinds - {"text"}:
                raise ApiError("Only text content is supported.", param="messages")
            return "".join(str(part.get("text", "")) for part in self.content)
        return self.content or ""


class StreamOptions(BaseModel):
    include_usage: bool = False


class _Common(BaseModel):
    model_config = ConfigDict(extra="allow")

    model: str = ""
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0.0, le=10.0)
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    top_k: int | None = Field(default=None, ge=0)
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    tools: list[Any] | None = None

    def check(self) -> None:
        """Raise :class:`ApiError` for what would change the text and is not supported."""
        if self.n not in (None, 1):
            raise ApiError("Only n = 1 is supported.", param="n")
        for name in ("presence_penalty", "frequency_penalty", "logit_bias", "tools"):
            if getattr(self, name):
                raise ApiError(f"{name} is not supported.", param=name)
        if (self.model_extra or {}).get("logprobs"):
            raise ApiError("logprobs is not supported.", param="logprobs")

    def sampling(self, seed: int) -> Sampling:
        """OpenAI's defaults: temperature 1, no nucleus. ``seed`` where the request names none."""
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=self.top_k or 0,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=abs(self.seed) if self.seed is not None else seed,
        )

    def stops(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(_Common):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)


class CompletionRequest(_Common):
    prompt: str | list[int] | list[str] | list[list[int]] = ""
    echo: bool = False

    def one_prompt(self) -> str | list[int]:
        """The prompt, as text or tokens; several are refused."""
        given: Any = self.prompt
        if isinstance(given, list) and given and not isinstance(given[0], int):
            if len(given) != 1:
                raise ApiError("One prompt per request.", param="prompt")
            given = given[0]
        return given  # type: ignore[no-any-return]


# --- answers --------------------------------------------------------------------------------------


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

    def whole(
        self, text: str, finished: str, counts: dict[str, Any], **more: Any
    ) -> dict[str, Any]:
        """The answer in one piece; ``more``: fields beside OpenAI's own."""
        choice = self._choice(self._whole(text), finished)
        base = {**self._base, "object": self.whole_kind}
        return {**base, "choices": [choice], "usage": counts, **more}

    def first(self) -> str:
        """What a stream begins with: the echo, or the role."""
        return self.piece(self._echo) if self._echo else ""

    def piece(self, text: str) -> str:
        return self._event([self._choice(self._piece(text), None)])

    def last(self, finished: str, **more: Any) -> str:
        return self._event([self._choice(self._nothing(), finished)], **more)

    def counted(self, counts: dict[str, Any]) -> str:
        """The piece that ``stream_options.include_usage`` asks for."""
        return self._event([], usage=counts)

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> str:
        return event({**self._base, "object": self.piece_kind, "choices": choices, **more})

    def _whole(self, text: str) -> dict[str, Any]:
        return {"text": self._echo + text}

    def _piece(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _nothing(self) -> dict[str, Any]:
        return {"text": ""}

    @staticmethod
    def _choice(content: dict[str, Any], finished: str | None) -> dict[str, Any]:
        return {"index": 0, **content, "logprobs": None, "finish_reason": finished}


class ChatAnswer(CompletionAnswer):
    """``/v1/chat/completions``."""

    prefix, whole_kind, piece_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def first(self) -> str:
        return self._event([self._choice({"delta": {"role": "assistant", "content": ""}}, None)])

    def _whole(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}

    def _piece(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text}}

    def _nothing(self) -> dict[str, Any]:
        return {"delta": {}}


def usage(prompt: int, completion: int, reused: int | None = None) -> dict[str, Any]:
    """Token counts; ``reused``: prompt tokens whose KV was there already, where that is known."""
    counts: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }
    if reused is not None:
        counts["prompt_tokens_details"] = {"cached_tokens": reused}
    return counts


def event(body: Any) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(body)}\n\n"
