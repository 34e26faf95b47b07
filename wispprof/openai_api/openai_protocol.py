"""Requests, responses and errors of the OpenAI API (https://platform.openai.com/docs/api-reference).

Fields that would change the text and are not supported are refused (``n`` > 1, tools, penalties,
``logprobs``). Unknown fields that do not change it are ignored (``user``, ``metadata``).
"""

from __future__ import annotations

import json
import secrets
import time
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from wispprof.errors import WispprofError
from wispprof.types import Sampling


class ApiError(WispprofError):
    """A request that failed. ``status``: its HTTP status; ``retry_ms``: when to try again (429, 503);
    ``details``: further fields of the error object."""

    def __init__(
        self,
        message: str,
        status: int = 400,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_ms: float = 0.0,
        **details: Any,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_ms = retry_ms
        self.details = details

    def body(self) -> dict[str, Any]:
        """The error object that OpenAI clients expect."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        default = "invalid_request_error" if self.status < 500 else "server_error"
        error = {
            "message": str(self),
            "type": kinds.get(self.status, default),
            "param": self.param,
            "code": self.code,
        }
        return {"error": {**error, **self.details}}


# --- requests -------------------------------------------------------------------------------------


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


class _Request(BaseModel):
    model_config = ConfigDict(extra="ignore")

    model: str = ""
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0.0, le=10.0)
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    top_k: int | None = Field(default=None, ge=0)
    seed: int | None = Field(default=None, gt=-(1 << 63), lt=1 << 63)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    tools: list[Any] | None = None
    logprobs: bool | int | None = None
    tokens_per_s: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    ttft_ms: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    ignore_eos: bool = False

    @property
    def max_new(self) -> int | None:
        """Most output tokens, if the request limits them."""
        return self.max_tokens

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def check(self) -> None:
        """Raise :class:`ApiError` for what would change the text and is not supported."""
        if self.n not in (None, 1):
            raise ApiError("Only n = 1 is supported.", param="n")
        for name in ("presence_penalty", "frequency_penalty", "logit_bias", "tools", "logprobs"):
            if getattr(self, name):
                raise ApiError(f"{name} is not supported.", param=name)

    def sampling(self, seed: int) -> Sampling:
        """Sampling with OpenAI's defaults (temperature 1, no nucleus); ``seed`` if the request sets none."""
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=self.top_k or 0,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=abs(self.seed) if self.seed is not None else seed,
        )


class ChatCompletionRequest(_Request):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)

    @property
    def max_new(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(_Request):
    prompt: str | list[int] | list[str] | list[list[int]] = ""
    echo: bool = False

    def single_prompt(self) -> str | list[int]:
        """The prompt, as text or tokens. Raises :class:`ApiError` for several prompts."""
        given: Any = self.prompt
        if isinstance(given, list) and given and not isinstance(given[0], int):
            if len(given) != 1:
                raise ApiError("One prompt per request.", param="prompt")
            given = given[0]
        return given  # type: ignore[no-any-return]


# --- responses ------------------------------------------------------------------------------------


class CompletionResponse:
    """``/v1/completions``: one object, or chunks. ``echo``: the prompt's text, if it is to be repeated."""

    id_prefix, full_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, echo: str = "") -> None:
        self._echo = echo
        self._base = {
            "id": f"{self.id_prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    def full(self, text: str, finished: str, counts: dict[str, Any], **extra: Any) -> dict[str, Any]:
        """The whole response; ``extra``: fields beside OpenAI's own."""
        choice = _choice(self._full_content(text), finished)
        base = {**self._base, "object": self.full_object}
        return {**base, "choices": [choice], "usage": counts, **extra}

    def opening_chunk(self) -> str:
        """What a stream begins with: the echo, or the role."""
        return self.chunk(self._echo) if self._echo else ""

    def chunk(self, text: str) -> str:
        return self._event([_choice(self._chunk_content(text))])

    def final_chunk(self, finished: str, **extra: Any) -> str:
        return self._event([_choice(self._chunk_content(""), finished)], **extra)

    def usage_chunk(self, counts: dict[str, Any]) -> str:
        """The chunk that ``stream_options.include_usage`` asks for."""
        return self._event([], usage=counts)

    def _event(self, choices: list[dict[str, Any]], **extra: Any) -> str:
        return event({**self._base, "object": self.chunk_object, "choices": choices, **extra})

    def _full_content(self, text: str) -> dict[str, Any]:
        return {"text": self._echo + text}

    def _chunk_content(self, text: str) -> dict[str, Any]:
        return {"text": text}


class ChatCompletionResponse(CompletionResponse):
    """``/v1/chat/completions``."""

    id_prefix, full_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening_chunk(self) -> str:
        return self._event([_choice({"delta": {"role": "assistant", "content": ""}})])

    def _full_content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}

    def _chunk_content(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}


def _choice(content: dict[str, Any], finished: str = "") -> dict[str, Any]:
    """OpenAI counts a full context as ``length``."""
    reason = None if not finished else "stop" if finished == "stop" else "length"
    return {"index": 0, **content, "logprobs": None, "finish_reason": reason}


def usage(prompt: int, completion: int, cached: int | None = None) -> dict[str, Any]:
    """Token counts; ``cached``: prompt tokens served from a prefix cache, if known."""
    counts: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }
    if cached is not None:
        counts["prompt_tokens_details"] = {"cached_tokens": cached}
    return counts


def event(body: Any) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(body)}\n\n"
