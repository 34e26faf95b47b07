"""One OpenAI-compatible API over a :class:`TextBackend`; ``routes`` mounts it on server and edge."""

from wispprof.openai_api.openai_protocol import ApiError
from wispprof.openai_api.text_backend import (
    TextBackend,
    TextGeneration,
    TokenGeneration,
)
from wispprof.openai_api.tokenizer import ChatTokenizer

__all__ = [
    "ApiError",
    "ChatTokenizer",
    "TextBackend",
    "TextGeneration",
    "TokenGeneration",
]
