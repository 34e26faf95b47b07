"""Responses of the OpenAI routes: one object, or server-sent events."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from wispprof.openai_api.logprobs import chat_logprobs, completion_logprobs
from wispprof.openai_api.text_generation import TextGeneration, TextPiece
from wispprof.openai_api.tokenizer import ChatTokenizer
from wispprof.types import TokenLogprob

HEARTBEAT = ": no token yet\n\n"
DONE = "data: [DONE]\n\n"


@dataclass(eq=False)
class Choice:
    """One choice of a response. ``echo``: the prompt's text, if it is to be repeated. ``first``: it is the
    first choice of its prompt, with which the usage counts that prompt. ``completion_tokens``, ``offset``:
    tokens and length of the text read so far."""

    index: int
    prompt: tuple[int, ...]
    text: TextGeneration
    echo: str = ""
    first: bool = True
    pieces: list[TextPiece] = field(default_factory=list)
    completion_tokens: int = 0
    offset: int = 0

    @property
    def finish_reason(self) -> str:
        """OpenAI counts a full context as ``length``."""
        return "stop" if self.text.generation.finished == "stop" else "length"


class CompletionResponse:
    """``/v1/completions``: one object, or chunks. ``logprobs``, ``token_ids``: what each choice reports."""

    id_prefix, full_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(
        self, model: str, tokenizer: ChatTokenizer, *, logprobs: bool = False, token_ids: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._token_ids = token_ids
        self._base = {
            "id": f"{self.id_prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    @property
    def id(self) -> str:
        """The ``id`` of the response and of each of its chunks."""
        return str(self._base["id"])

    # --- the whole response -----------------------------------------------------------------------

    def full(self, choices: Sequence[Choice]) -> dict[str, Any]:
        base = {**self._base, "object": self.full_object}
        done = [self._full_choice(choice) for choice in choices]
        extra = _statistics(choices[0]) if len(choices) == 1 else {}
        if len(choices) > 1:
            done = [{**one, **_statistics(choice)} for one, choice in zip(done, choices, strict=True)]
        return {**base, "choices": done, "usage": usage(choices), **extra}

    def _full_choice(self, choice: Choice) -> dict[str, Any]:
        text = choice.echo + "".join(piece.text for piece in choice.pieces)
        tokens = [token for piece in choice.pieces for token in piece.tokens]
        logprobs = [one for piece in choice.pieces for one in piece.logprobs]
        return self._choice(choice, self._full_content(text), tokens, logprobs, finished=True, begin=True)

    # --- a stream ---------------------------------------------------------------------------------

    def opening_chunk(self, choice: Choice) -> str:
        """What the stream of a choice begins with: the echo, or the role."""
        if not (choice.echo or self._token_ids):
            return ""
        made = self._choice(choice, self._chunk_content(choice.echo), [], [], begin=True)
        return self._event([made])

    def chunk(self, choice: Choice, piece: TextPiece, counts: dict[str, Any] | None = None) -> str:
        """An event, or "" if the piece holds nothing that the client asked for."""
        if not (piece.text or (piece.tokens and (self._logprobs or self._token_ids))):
            return ""
        made = self._choice(choice, self._chunk_content(piece.text), piece.tokens, piece.logprobs)
        return self._event([made], **({"usage": counts} if counts else {}))

    def final_chunk(self, choice: Choice, counts: dict[str, Any] | None = None) -> str:
        made = self._choice(choice, self._chunk_content(""), [], [], finished=True)
        return self._event([made], **_statistics(choice), **({"usage": counts} if counts else {}))

    def usage_chunk(self, choices: Sequence[Choice]) -> str:
        """The chunk that ``stream_options.include_usage`` asks for."""
        extra = {"metrics": choices[0].text.metrics()} if len(choices) == 1 else {}
        return self._event([], usage=usage(choices), **extra)

    def _event(self, choices: list[dict[str, Any]], **extra: Any) -> str:
        return event({**self._base, "object": self.chunk_object, "choices": choices, **extra})

    def _choice(
        self,
        choice: Choice,
        content: dict[str, Any],
        tokens: Sequence[int],
        logprobs: Sequence[TokenLogprob | None],
        *,
        finished: bool = False,
        begin: bool = False,
    ) -> dict[str, Any]:
        made: dict[str, Any] = {
            "index": choice.index,
            **content,
            "logprobs": self._logprobs_of(choice, tokens, logprobs) if self._logprobs and tokens else None,
            "finish_reason": choice.finish_reason if finished else None,
        }
        if finished:
            made["stop_reason"] = choice.text.stop_reason
        if self._token_ids:
            made["token_ids"] = list(tokens)
            if begin:
                made["prompt_token_ids"] = list(choice.prompt)
        return made

    def _logprobs_of(
        self, choice: Choice, tokens: Sequence[int], logprobs: Sequence[TokenLogprob | None]
    ) -> dict[str, Any]:
        made, choice.offset = completion_logprobs(self._tokenizer, tokens, logprobs, choice.offset)
        return made

    def _full_content(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _chunk_content(self, text: str) -> dict[str, Any]:
        return {"text": text}


class ChatCompletionResponse(CompletionResponse):
    """``/v1/chat/completions``."""

    id_prefix, full_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening_chunk(self, choice: Choice) -> str:
        content = {"delta": {"role": "assistant", "content": ""}}
        return self._event([self._choice(choice, content, [], [], begin=True)])

    def _logprobs_of(
        self, choice: Choice, tokens: Sequence[int], logprobs: Sequence[TokenLogprob | None]
    ) -> dict[str, Any]:
        return chat_logprobs(self._tokenizer, tokens, logprobs)

    def _full_content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}

    def _chunk_content(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}


def _statistics(choice: Choice) -> dict[str, Any]:
    """Fields beside OpenAI's own: this project's, and vLLM's ``metrics``."""
    return {**choice.text.generation.statistics(), "metrics": choice.text.metrics()}


def usage(choices: Sequence[Choice]) -> dict[str, Any]:
    """Token counts of all choices; each prompt counts once. Cached tokens, if they are known."""
    prompts = [choice for choice in choices if choice.first]
    prompt = sum(len(choice.prompt) for choice in prompts)
    completion = sum(choice.completion_tokens for choice in choices)
    counts: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }
    cached = [choice.text.generation.cached_tokens for choice in prompts]
    known = [count for count in cached if count is not None]
    if len(known) == len(cached):
        counts["prompt_tokens_details"] = {"cached_tokens": sum(known)}
    return counts


def event(body: Any) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(body)}\n\n"
