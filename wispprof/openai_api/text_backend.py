"""What the OpenAI routes need from a token generator, and the text they make of its tokens."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from wispprof.openai_api.tokenizer import ChatTokenizer, StopStringFilter
from wispprof.types import GenerationRequest, Slo, TokenChunk


class TokenGeneration(Protocol):
    """One generation under way.

    ``finished`` is empty until the generation ends, then ``stop``, ``length`` or ``context``. The
    reader sets it to ``stop`` before it closes :meth:`stream` early because of a stop string.
    """

    finished: str

    def stream(self) -> AsyncGenerator[TokenChunk]:
        """Committed tokens, the final stop token included. The generation begins with the first
        iteration; closing the iterator releases all it holds. Raises :class:`WispprofError`."""

    @property
    def cached_tokens(self) -> int | None:
        """Prompt tokens served from a prefix cache; ``None`` if unknown."""

    def statistics(self) -> dict[str, Any]:
        """Fields to add to the response beside OpenAI's own."""


class TextBackend(Protocol):
    """A model behind the OpenAI routes: the server's sessions, or an edge's generations.

    ``default_max_tokens``, ``default_slo``: for requests that do not state their own.
    """

    tokenizer: ChatTokenizer
    default_max_tokens: int
    default_slo: Slo

    @property
    def model(self) -> str:
        """The model's id in requests and responses."""

    @property
    def max_context(self) -> int:
        """Most tokens of prompt and output together."""

    def accepts_key(self, api_key: str) -> bool: ...

    def accepts_model(self, name: str) -> bool: ...

    def generate(self, request: GenerationRequest, api_key: str) -> TokenGeneration:
        """A generation that has not begun."""


class TextGeneration:
    """The text of one generation, without its stop token and cut before the first stop string."""

    def __init__(
        self,
        generation: TokenGeneration,
        tokenizer: ChatTokenizer,
        prompt: Sequence[int],
        stop_tokens: Sequence[int],
        stop_strings: Sequence[str],
    ) -> None:
        self.generation = generation
        self.completion_tokens = 0
        self._detokenizer = tokenizer.detokenizer(prompt)
        self._stop_tokens = frozenset(stop_tokens)
        self._filter = StopStringFilter(stop_strings)

    async def pieces(self) -> AsyncGenerator[str]:
        """Text as it is committed; closing the iterator ends the generation."""
        generation, stop_filter = self.generation, self._filter
        async with aclosing(generation.stream()) as chunks:
            async for chunk in chunks:
                tokens = chunk.tokens
                self.completion_tokens += len(tokens)
                shown = tokens[:-1] if tokens and tokens[-1] in self._stop_tokens else tokens
                if piece := stop_filter.push(self._detokenizer.push(shown)):
                    yield piece
                if stop_filter.hit:
                    generation.finished = "stop"
                    return
        rest = stop_filter.push(self._detokenizer.finish()) + stop_filter.finish()
        if stop_filter.hit:
            generation.finished = "stop"
        if rest:
            yield rest
