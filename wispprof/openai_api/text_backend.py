"""What the OpenAI routes need from a token generator."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, Protocol

from wispprof.openai_api.tokenizer import ChatTokenizer
from wispprof.types import GenerationDefaults, GenerationRequest, Slo, TokenChunk


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

    def speculative_decoding(self) -> dict[str, Any] | None:
        """Acceptance statistics as vLLM gives them for a request; ``None`` if nothing was drafted."""


class TextBackend(Protocol):
    """A model behind the OpenAI routes: the server's sessions, or an edge's generations.

    ``default_max_tokens``, ``default_slo``: for requests that do not state their own.
    """

    default_max_tokens: int
    default_slo: Slo

    @property
    def tokenizer(self) -> ChatTokenizer:
        """With the target's stop tokens and chat template."""

    @property
    def defaults(self) -> GenerationDefaults:
        """The target's sampling, for requests that do not state their own."""

    @property
    def model(self) -> str:
        """The model's id in requests and responses."""

    @property
    def identity(self) -> str:
        """Hash of the target's weights, dtype and noise; empty if unknown."""

    @property
    def max_context(self) -> int:
        """Most tokens of prompt and output together."""

    def accepts_key(self, api_key: str) -> bool: ...

    def accepts_model(self, name: str) -> bool: ...

    def generate(self, request: GenerationRequest, api_key: str) -> TokenGeneration:
        """A generation that has not begun."""
