"""The OpenAI-compatible API of an edge: the forms of requests and answers.

Follows https://platform.openai.com/docs/api-reference (chat completions and completions). Fields that the
engine cannot honour are refused rather than ignored where they would change the text (``n`` > 1, tools,
penalties, ``logprobs``); those that cannot are taken and ignored (``user``, ``metadata``).
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from wispprof.core import Sampling
from wispprof.errors import WispprofError

__all__ = ["ApiError", "ChatRequest", "CompletionRequest", "Message", "error_body"]


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
