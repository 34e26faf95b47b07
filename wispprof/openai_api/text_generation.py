"""The text of one generation: detokenized, without its stop token, cut at a stop string."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, NamedTuple

from wispprof.openai_api.stop_strings import StopStringFilter, StopStrings
from wispprof.openai_api.text_backend import TokenGeneration
from wispprof.openai_api.tokenizer import ChatTokenizer
from wispprof.types import TokenChunk, TokenLogprob


@dataclass(frozen=True)
class TextOptions:
    """How tokens become text, and where the text ends. ``reported_stop_tokens``: stop tokens that the request
    itself named, which the response names as the reason. ``min_tokens``: none of the first tokens completes
    a stop string."""

    stop_tokens: tuple[int, ...] = ()
    reported_stop_tokens: tuple[int, ...] = ()
    stop_strings: StopStrings | None = None
    min_tokens: int = 0
    include_stop: bool = False
    skip_special_tokens: bool = True


class TextPiece(NamedTuple):
    """Text that is final now, and the tokens that arrived. Text that may begin a stop string, or that ends
    within a character, comes with a later piece. ``logprobs``: one per token; ``None`` where the target gave
    none, because nobody asked or because a draft model went on alone. ``texts``: what each token made final;
    together, ``text``."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob | None, ...]
    texts: tuple[str, ...] = ()


class TextGeneration:
    """Reads a generation's tokens once, as :meth:`pieces`.

    ``completion_tokens`` counts up to and with the token that completes the stop string or is the stop token,
    however many tokens were committed together. ``stop_reason``: the stop string, or the stop token that the
    request named.
    """

    def __init__(
        self,
        generation: TokenGeneration,
        tokenizer: ChatTokenizer,
        prompt: Sequence[int],
        options: TextOptions,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.generation = generation
        self.completion_tokens = 0
        self.stop_reason: str | int | None = None
        self._options = options
        self._detokenizer = tokenizer.detokenizer(prompt, options.skip_special_tokens)
        self._stop_tokens = frozenset(options.stop_tokens)
        self._filter: StopStringFilter | None = None
        self._hidden: dict[int, str] = {}
        if options.stop_strings is not None:
            self._filter = StopStringFilter(options.stop_strings, include=options.include_stop)
            self._hidden = tokenizer.special_texts if options.skip_special_tokens else {}
        self._clock = clock
        self._begun_s = self._first_s = self._last_s = 0.0
        self._first_tokens = 0

    async def pieces(self) -> AsyncGenerator[TextPiece]:
        """Text as it is committed; closing the iterator ends the generation."""
        generation, stop_filter = self.generation, self._filter
        self._begun_s = self._first_s = self._last_s = self._clock()
        async with aclosing(generation.stream()) as chunks:
            async for chunk in chunks:
                if not chunk.tokens:
                    continue
                self._last_s = self._clock()
                if not self.completion_tokens:
                    self._first_s = self._last_s
                    self._first_tokens = len(chunk.tokens)
                yield self._take(chunk)
                if stop_filter is not None and stop_filter.hit:
                    self.stop_reason = stop_filter.hit
                    generation.finished = "stop"
                    return
        if stop_filter is not None and (rest := stop_filter.finish()):
            yield TextPiece(rest, (), ())

    def _take(self, chunk: TokenChunk) -> TextPiece:
        texts: list[str] = []
        used = 0
        for token in chunk.tokens:
            used += 1
            self.completion_tokens += 1
            is_stop = token in self._stop_tokens
            if is_stop and token in self._options.reported_stop_tokens:
                self.stop_reason = token
            if is_stop and not self._options.include_stop and self._filter is None:
                texts.append("")
                continue
            texts.append(self._text_of(token, visible=self._options.include_stop or not is_stop))
            if self._filter is not None and self._filter.hit:
                break
        logprobs = chunk.logprobs[:used] or (None,) * used
        return TextPiece("".join(texts), chunk.tokens[:used], logprobs, tuple(texts))

    def _text_of(self, token: int, visible: bool) -> str:
        stop_filter = self._filter
        if stop_filter is None:
            return self._detokenizer.step(token)
        stop_filter.active = self.completion_tokens > self._options.min_tokens
        hidden = self._hidden.get(token)
        if hidden is not None:
            return stop_filter.push(hidden, visible=False)
        return stop_filter.push(self._detokenizer.step(token), visible)

    def metrics(self) -> dict[str, Any]:
        """Times and acceptance in the form of vLLM's per-request metrics."""
        ttft_ms = (self._first_s - self._begun_s) * 1000.0
        decode_ms = (self._last_s - self._first_s) * 1000.0
        later = self.completion_tokens - self._first_tokens
        total_s = self._last_s - self._begun_s
        found: dict[str, Any] = {
            "time_to_first_token_ms": ttft_ms,
            "generation_time_ms": decode_ms,
            "mean_itl_ms": decode_ms / later if later > 0 else None,
            "tokens_per_second": self.completion_tokens / total_s if total_s > 0 else None,
        }
        speculative = self.generation.speculative_decoding()
        if speculative is not None:
            found["speculative_decoding"] = speculative
        return found
