"""From a request's body to its choices. Everything here is computation and runs off the event loop."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

from wispprof.errors import WispprofError
from wispprof.openai_api.api_error import ApiError
from wispprof.openai_api.chat_messages import template_messages
from wispprof.openai_api.request_body import ChatCompletionRequest, CompletionRequest, RequestBody, parse_body
from wispprof.openai_api.response_body import ChatCompletionResponse, Choice, CompletionResponse
from wispprof.openai_api.stop_strings import StopStrings
from wispprof.openai_api.text_backend import TextBackend
from wispprof.openai_api.text_generation import TextGeneration, TextOptions
from wispprof.openai_api.tokenizer import ChatTokenizer
from wispprof.types import GenerationRequest

_SEEDS = 1 << 63


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """One prompt. ``echo``: its text, if the response repeats it."""

    tokens: tuple[int, ...]
    echo: str = ""


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A checked request: what each choice generates, and how its tokens become text."""

    body: RequestBody
    response: CompletionResponse
    prompts: tuple[PromptTokens, ...]
    requests: tuple[GenerationRequest, ...]
    options: TextOptions
    tokenizer: ChatTokenizer

    def choices(self, backend: TextBackend, api_key: str) -> list[Choice]:
        """The choices, none of which has begun. Choice ``i`` of a prompt samples with ``seed + i``."""
        made: list[Choice] = []
        for prompt, request in zip(self.prompts, self.requests, strict=True):
            for number in range(self.body.n):
                sampling = replace(request.sampling, seed=(request.sampling.seed + number) % _SEEDS)
                generation = backend.generate(replace(request, sampling=sampling), api_key)
                text = TextGeneration(generation, self.tokenizer, prompt.tokens, self.options)
                offset = len(prompt.echo)
                made.append(
                    Choice(len(made), prompt.tokens, text, prompt.echo, first=not number, offset=offset)
                )
        return made


def prepare(data: bytes, endpoint: str, backend: TextBackend) -> PreparedRequest:
    """Parse, check, template and tokenize. Raises :class:`ApiError`."""
    body = parse_body(data, endpoint)
    if not backend.accepts_model(body.model):
        message = f"The model {body.model[:100]!r} does not exist; the model here is {backend.model!r}."
        raise ApiError(message, 404, param="model", code="model_not_found")
    tokenizer = backend.tokenizer
    reported = {"logprobs": body.top_count is not None, "token_ids": body.return_token_ids}
    prompts: tuple[PromptTokens, ...]
    if isinstance(body, ChatCompletionRequest):
        prompts = (PromptTokens(_conversation(body, tokenizer)),)
        response: CompletionResponse = ChatCompletionResponse(backend.model, tokenizer, **reported)
    else:
        prompts = tuple(_prompt(body, prompt, tokenizer) for prompt in body.prompts)
        response = CompletionResponse(backend.model, tokenizer, **reported)
    options = _text_options(body, tokenizer)
    seed = secrets.randbits(31)
    requests = tuple(
        _generation_request(body, prompt.tokens, options.stop_tokens, seed, backend) for prompt in prompts
    )
    if any(reported.values()):
        tokenizer.token_bytes(0)  # Builds its tables here rather than on the event loop.
    return PreparedRequest(body, response, prompts, requests, options, tokenizer)


def _conversation(body: ChatCompletionRequest, tokenizer: ChatTokenizer) -> tuple[int, ...]:
    messages = template_messages(body.messages)
    try:
        return tokenizer.chat(
            messages,
            tools=body.tools or None,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            variables=body.chat_template_kwargs,
        )
    except ApiError:
        raise
    except WispprofError as err:
        raise ApiError(str(err), param="messages") from err


def _prompt(body: CompletionRequest, prompt: str | list[int], tokenizer: ChatTokenizer) -> PromptTokens:
    if isinstance(prompt, str):
        try:
            tokens = tokenizer.encode(prompt, body.add_special_tokens)
        except WispprofError as err:
            raise ApiError(str(err), param="prompt") from err
        return PromptTokens(tokens, prompt if body.echo else "")
    if min(prompt) < 0 or max(prompt) >= tokenizer.vocab_size:
        raise ApiError(
            f"The prompt holds a token outside the vocabulary of {tokenizer.vocab_size}.", param="prompt"
        )
    return PromptTokens(tuple(prompt), tokenizer.decode(prompt) if body.echo else "")


def _text_options(body: RequestBody, tokenizer: ChatTokenizer) -> TextOptions:
    own = tuple(dict.fromkeys(body.stop_token_ids))
    if own and (min(own) < 0 or max(own) >= tokenizer.vocab_size):
        raise ApiError(f"Token ids are 0 to {tokenizer.vocab_size - 1}.", param="stop_token_ids")
    targets = () if body.ignore_eos else tokenizer.stop_tokens
    return TextOptions(
        stop_tokens=tuple(dict.fromkeys((*targets, *own))),
        reported_stop_tokens=tuple(token for token in own if token not in targets),
        stop_strings=StopStrings(body.stop_strings) if body.stop_strings else None,
        min_tokens=body.min_tokens,
        include_stop=body.include_stop_str_in_output,
        skip_special_tokens=body.skip_special_tokens,
    )


def _generation_request(
    body: RequestBody,
    tokens: tuple[int, ...],
    stop_tokens: Sequence[int],
    seed: int,
    backend: TextBackend,
) -> GenerationRequest:
    remaining = backend.max_context - len(tokens)
    if remaining <= 0:
        raise ApiError(
            f"The prompt has {len(tokens)} tokens; the model's context holds at most "
            f"{backend.max_context}, output included.",
            param="prompt" if isinstance(body, CompletionRequest) else "messages",
            code="context_length_exceeded",
        )
    max_new = min(body.max_new or backend.default_max_tokens, remaining)
    if body.min_tokens > max_new:
        message = f"min_tokens is {body.min_tokens}, but at most {max_new} tokens are generated."
        raise ApiError(message, param="min_tokens")
    sampling = body.sampling(
        backend.defaults,
        seed,
        prompt_tokens=len(tokens),
        stop_tokens=stop_tokens,
        vocab_size=backend.tokenizer.vocab_size,
    )
    slo = body.slo(backend.default_slo)
    return GenerationRequest(tokens, max_new, sampling, slo, tuple(stop_tokens), undrafted=not body.drafting)
