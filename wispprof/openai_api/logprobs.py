"""Log-probabilities in the form of the two routes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from wispprof.openai_api.tokenizer import ChatTokenizer
from wispprof.types import TokenLogprob

_LEAST = -9999.0
"""JSON has no infinity."""


def chat_logprobs(
    tokenizer: ChatTokenizer, tokens: Sequence[int], logprobs: Sequence[TokenLogprob | None]
) -> dict[str, Any]:
    """The ``logprobs`` object of a chat choice: one entry per completion token. An unknown log-probability is
    -9999, as in vLLM."""
    content = [
        {
            **_entry(tokenizer, token, found.logprob if found else _LEAST),
            "top_logprobs": [
                _entry(tokenizer, other, value) for other, value in (found.top if found else ())
            ],
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
    logprobs: Sequence[TokenLogprob | None],
    text_offset: int,
) -> tuple[dict[str, Any], int]:
    """The ``logprobs`` object of a completion choice, and the text offset after these tokens.

    ``top_logprobs`` holds the alternatives and always the token itself. Offsets add up the lengths of the
    tokens' own texts. An unknown log-probability is null.
    """
    texts: list[str] = []
    offsets: list[int] = []
    chosen: list[float | None] = []
    top: list[dict[str, float] | None] = []
    for token, found in zip(tokens, logprobs, strict=True):
        offsets.append(text_offset)
        texts.append(_token_text(tokenizer, token))
        text_offset += len(texts[-1])
        chosen.append(None if found is None else max(_LEAST, found.logprob))
        top.append(None if found is None else _alternatives(tokenizer, texts[-1], found))
    return {
        "tokens": texts,
        "token_logprobs": chosen,
        "top_logprobs": top,
        "text_offset": offsets,
    }, text_offset


def _alternatives(tokenizer: ChatTokenizer, text: str, found: TokenLogprob) -> dict[str, float]:
    others = {_token_text(tokenizer, other): max(_LEAST, value) for other, value in found.top}
    return {text: max(_LEAST, found.logprob), **others}


def _token_text(tokenizer: ChatTokenizer, token: int) -> str:
    return tokenizer.token_bytes(token).decode("utf-8", "replace")
