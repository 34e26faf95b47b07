"""Log-probabilities in the form of the two routes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from wispprof.openai_api.tokenizer import ChatTokenizer
from wispprof.types import TokenLogprob

_LEAST = -9999.0
"""JSON has no infinity."""


def chat_logprobs(
    tokenizer: ChatTokenizer, tokens: Sequence[int], logprobs: Sequence[TokenLogprob]
) -> dict[str, Any]:
    """The ``logprobs`` object of a chat choice: one entry per completion token."""
    content = [
        {
            **_entry(tokenizer, token, found.logprob),
            "top_logprobs": [_entry(tokenizer, other, value) for other, value in found.top],
        }
        for token, found in zip(tokens, logprobs, strict=True)
    ]
    return {"content": content, "refusal": None}


def _entry(tokenizer: ChatTokenizer, token: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.token_bytes(token)
    return {
        "token": data.decode("utf-8", "replace"),
        "logprob": max(_LEAST, logprob),
        "bytes": list(data),
    }


def completion_logprobs(
    tokenizer: ChatTokenizer,
    tokens: Sequence[int],
    logprobs: Sequence[TokenLogprob],
    text_offset: int,
) -> tuple[dict[str, Any], int]:
    """The ``logprobs`` object of a completion choice, and the text offset after these tokens.

    ``top_logprobs`` holds the alternatives and always the token itself. Offsets add up the lengths of the
    tokens' own texts.
    """
    texts: list[str] = []
    offsets: list[int] = []
    top: list[dict[str, float]] = []
    for token, found in zip(tokens, logprobs, strict=True):
        offsets.append(text_offset)
        texts.append(_token_text(tokenizer, token))
        text_offset += len(texts[-1])
        alternatives = {_token_text(tokenizer, other): max(_LEAST, value) for other, value in found.top}
        top.append({texts[-1]: max(_LEAST, found.logprob), **alternatives})
    return {
        "tokens": texts,
        "token_logprobs": [max(_LEAST, found.logprob) for found in logprobs],
        "top_logprobs": top,
        "text_offset": offsets,
    }, text_offset


def _token_text(tokenizer: ChatTokenizer, token: int) -> str:
    return tokenizer.token_bytes(token).decode("utf-8", "replace")
