"""One OpenAI-compatible API over a :class:`TextBackend`; ``routes`` mounts it on server and edge."""

from wispprof.openai_api.api_error import ApiError
from wispprof.openai_api.text_backend import TextBackend, TokenGeneration
from wispprof.openai_api.text_generation import TextGeneration, TextOptions
from wispprof.openai_api.tokenizer import ChatTokenizer

__all__ = [
    "ApiError",
    "ChatTokenizer",
    "TextBackend",
    "TextGeneration",
    "TextOptions",
    "TokenGeneration",
]
