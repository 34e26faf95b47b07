"""Requests of the OpenAI routes, parsed and checked. All of it may run in a thread."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

import pydantic_core
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema

from wispprof.openai_api.api_error import ApiError
from wispprof.openai_api.request_fields import CHAT, honoured_fields
from wispprof.types import GenerationDefaults, Sampling, Slo

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKENS = 128
MAX_LOGPROBS = 20
MAX_N = 8
MAX_CHOICES = 128
_MIN_TEMPERATURE = 0.01
_INT64 = 1 << 63


def _whole(value: Any) -> Any:
    """JSON has one kind of number: 2.0 is an integer, true is not."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Positive = Annotated[int, Field(ge=1), BeforeValidator(_whole)]
NonNegative = Annotated[int, Field(ge=0), BeforeValidator(_whole)]
TopK = Annotated[int, Field(ge=-1, lt=_INT64), BeforeValidator(_whole)]
Seed = Annotated[int, Field(ge=-_INT64, lt=_INT64), BeforeValidator(_whole)]
ChoiceCount = Annotated[int, Field(ge=1, le=MAX_N), BeforeValidator(_whole)]
TopCount = Annotated[int, Field(ge=0, le=MAX_LOGPROBS), BeforeValidator(_whole)]
Speed = Annotated[float, Field(ge=1e-3, le=1e6)]
Milliseconds = Annotated[float, Field(ge=1e-3, le=1e9)]
Prompt = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}},
                {"type": "array", "minItems": 1, "items": {"type": "string", "minLength": 1}},
                {
                    "type": "array",
                    "minItems": 1,
                    "items": {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}},
                },
            ]
        }
    ),
]


class RequestBody(BaseModel, ABC):
    """The honoured fields that both routes share. See :mod:`wispprof.openai_api.request_fields`."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str = ""
    max_tokens: Positive | None = None
    min_tokens: NonNegative = 0
    temperature: float | None = Field(None, ge=0.0, le=2.0)
    top_p: float | None = Field(None, gt=0.0, le=1.0)
    top_k: TopK | None = None
    min_p: float | None = Field(None, ge=0.0, le=1.0)
    seed: Seed | None = None
    n: ChoiceCount = 1
    stop: str | list[str] = []
    stop_token_ids: list[NonNegative] = Field([], max_length=MAX_STOP_TOKENS)
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    return_token_ids: bool = False
    stream: bool = False
    stream_options: dict[str, Any] = {}
    tokens_per_s: Speed | None = None
    ttft_ms: Milliseconds | None = None
    drafting: bool = True

    @property
    def max_new(self) -> int | None:
        """Most output tokens, if the request limits them."""
        return self.max_tokens

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    @abstractmethod
    def top_count(self) -> int | None:
        """How many alternatives to report beside each token's log-probability; ``None``: report nothing."""

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options.get("include_usage"))

    @property
    def continuous_usage(self) -> bool:
        return bool(self.stream_options.get("continuous_usage_stats"))

    def check(self) -> None:
        """Raise :class:`ApiError` for values that do not fit together."""
        stops = self.stop_strings
        if len(stops) > MAX_STOP_STRINGS:
            raise ApiError(f"stop takes at most {MAX_STOP_STRINGS} strings.", param="stop")
        if any(not 0 < len(stop) <= MAX_STOP_CHARS for stop in stops):
            raise ApiError(f"A stop string has 1 to {MAX_STOP_CHARS} characters.", param="stop")
        if self.stream_options and not self.stream:
            raise ApiError("stream_options needs stream: true.", param="stream_options")
        known = ("include_usage", "continuous_usage_stats", "include_obfuscation")
        for name, value in self.stream_options.items():
            if name not in known or not isinstance(value, bool | None):
                raise ApiError(f"stream_options.{name[:100]} is not supported.", param="stream_options")

    def slo(self, default: Slo) -> Slo:
        """The SLO asked for; what is not given is as in ``default``."""
        ttft_ms = default.ttft_ms if self.ttft_ms is None else self.ttft_ms
        if self.tokens_per_s is None:
            return replace(default, ttft_ms=ttft_ms)
        return Slo(self.tokens_per_s, ttft_ms)

    def sampling(
        self,
        defaults: GenerationDefaults,
        random_seed: int,
        *,
        prompt_tokens: int,
        stop_tokens: Sequence[int],
        vocab_size: int,
    ) -> Sampling:
        """How to sample the first choice. ``defaults``: the target's; ``random_seed``: if none is given."""
        top_k = defaults.top_k if self.top_k is None else self.top_k
        temperature = defaults.temperature if self.temperature is None else self.temperature
        return Sampling(
            # Below, the scaled logits overflow; vLLM draws the same line.
            temperature=max(_MIN_TEMPERATURE, temperature) if temperature else 0.0,
            top_k=top_k if 0 < top_k < vocab_size else 0,
            top_p=defaults.top_p if self.top_p is None else self.top_p,
            seed=random_seed if self.seed is None else abs(self.seed) % _INT64,
            min_p=defaults.min_p if self.min_p is None else self.min_p,
            min_length=prompt_tokens + self.min_tokens if self.min_tokens else 0,
            stop_tokens=tuple(stop_tokens) if self.min_tokens else (),
            logprobs=self.top_count,
        )


class ChatCompletionRequest(RequestBody):
    """Body of ``/v1/chat/completions``."""

    messages: list[Any] = Field(min_length=1, json_schema_extra={"items": {"type": "object"}})
    max_completion_tokens: Positive | None = None
    logprobs: bool = False
    top_logprobs: TopCount = 0
    tools: list[Any] = []
    tool_choice: Any = None
    chat_template_kwargs: dict[str, Any] = {}
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    @property
    def max_new(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def top_count(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    def check(self) -> None:
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise ApiError("top_logprobs needs logprobs: true.", param="top_logprobs")
        if self.tool_choice not in (None, "none"):
            raise ApiError(
                'Tools are not called here. Send tool_choice: "none".',
                param="tool_choice",
                code="unsupported_parameter",
            )
        if self.tools and self.tool_choice is None:
            raise ApiError(
                'Tools are not called here. Send tool_choice: "none" to show them to the model.',
                param="tools",
                code="unsupported_parameter",
            )


class CompletionRequest(RequestBody):
    """Body of ``/v1/completions``."""

    prompt: Prompt
    echo: bool = False
    add_special_tokens: bool = True
    logprobs: TopCount | None = None

    @property
    def top_count(self) -> int | None:
        return self.logprobs

    def check(self) -> None:
        super().check()
        if self.echo and self.logprobs is not None:
            raise ApiError(
                "echo with logprobs is not supported: prompts have no log-probabilities here.",
                param="echo",
                code="unsupported_parameter",
            )
        if len(self.prompts) * self.n > MAX_CHOICES:
            raise ApiError(f"A request makes at most {MAX_CHOICES} choices.", param="prompt")

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or tokens. Raises :class:`ApiError` for anything else."""
        given = self.prompt
        if isinstance(given, str) or _are_tokens(given):
            return [given]
        if isinstance(given, list) and given and all(isinstance(p, str) or _are_tokens(p) for p in given):
            return given
        raise ApiError(
            "prompt must be text, a list of token ids, or a list of either, and not empty.", param="prompt"
        )


def _are_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def parse_body(data: bytes, endpoint: str) -> ChatCompletionRequest | CompletionRequest:
    """The request in ``data``. Raises :class:`ApiError` with the field at fault."""
    try:
        body = pydantic_core.from_json(data, allow_inf_nan=False, cache_strings=False)
    except ValueError as err:
        raise ApiError(f"The body is not valid JSON: {err}.", code="invalid_json") from None
    if not isinstance(body, dict):
        raise ApiError("The body must be a JSON object.", code="invalid_json")
    fields = honoured_fields(endpoint, body)
    model = ChatCompletionRequest if endpoint == CHAT else CompletionRequest
    try:
        request = model.model_validate(fields)
    except ValidationError as err:
        first = err.errors(include_url=False, include_context=False, include_input=False)[0]
        where = [str(part) for part in first["loc"]]
        raise ApiError(
            f"{where[0] if where else 'body'}: {first['msg']}.",
            param=where[0] if where else None,
            code="invalid_value",
        ) from None
    request.check()
    return request
