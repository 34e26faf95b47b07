"""Drafts of a running ``llama-server``: token ids in, ids and their likeliest alternatives out.

The server's own sampling is not used. It returns the most likely tokens of a position with their
log-probabilities, and the next token is drawn from those with the target's position noise, so that drafts
at a temperature agree with the target as those of any other draft. The server keeps the prompt's KV itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from wispprof.backends import Drafter
from wispprof.errors import EngineError, ModelError
from wispprof.sampling.sampler import MIN_TEMPERATURE, sample_tokens_numpy
from wispprof.types import DraftFeatures, DraftToken, Sampling

SCHEME = "llama-server:"
_GREEDY, _DRAWN = 32, 128
"""Tokens asked for: greedy, where the rest only counts in the features, and where the draw may take any."""
_FLOOR = -1e4
"""Logit of the tokens that the server does not return."""


_PROBE = "The quick brown fox; def f(x):\n    return x ** 2  # naïve 中文 12345 🙂"


def check_served_vocabulary(url: str, tokenizer: Any, key: str = "", post: Any = None) -> None:
    """Raise :class:`ModelError` unless the server's model cuts a mixed text into the target's token ids."""
    wanted = [int(token) for token in tokenizer(_PROBE, add_special_tokens=False)["input_ids"]]
    body = {"content": _PROBE, "add_special": False}
    found = (post or _HttpClient(url, key))("/tokenize", body).get("tokens")
    if found != wanted:
        raise ModelError(
            f"The model of the llama-server at {url} has another vocabulary than the target.",
            "Serve a model of the target's family there, or give its .gguf file, which can draft text.",
        )


class _HttpClient:
    def __init__(self, url: str, key: str = "", timeout_s: float = 30.0) -> None:
        import httpx

        self._url = url
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.Client(base_url=url.rstrip("/"), timeout=timeout_s, headers=headers)

    def __call__(self, path: str, body: dict[str, Any] | None) -> Any:
        import httpx

        try:
            answer = self._client.get(path) if body is None else self._client.post(path, json=body)
            answer.raise_for_status()
            return answer.json()
        except httpx.TransportError as err:
            raise ModelError(
                f"No llama-server answers at {self._url}: {err}.", "Start it, or check the address."
            ) from err
        except (httpx.HTTPError, ValueError) as err:
            raise EngineError(f"llama-server refused {path}: {err}.") from err


class LlamaServerDrafter(Drafter):
    """``url``: the server's address, ``key``: its API key, if it has one. ``vocab_size``: the target's; other
    ids are never proposed. ``server``: kept while this drafter lives, if it runs in this process.

    ``post(path, body)`` replaces the HTTP client. Raises :class:`ModelError` if no server answers.
    """

    def __init__(
        self, url: str, vocab_size: int, post: Any = None, key: str = "", server: Any = None
    ) -> None:
        self._vocab_size = vocab_size
        self._server = server
        self._post = post or _HttpClient(url, key)
        self._tokens: list[int] = []
        self._sampling = Sampling()
        self._candidates = _GREEDY
        self.max_context = self._context()

    @property
    def length(self) -> int:
        return len(self._tokens)

    def open(self, tokens: Sequence[int], sampling: Sampling) -> None:
        self._tokens, self._sampling = [int(token) for token in tokens], sampling
        drawn = min(_DRAWN, max(_GREEDY, sampling.top_k)) if sampling.top_k else _DRAWN
        self._candidates = drawn if sampling.temperature >= MIN_TEMPERATURE else _GREEDY

    def draft(self) -> DraftToken:
        found = self._complete(1)
        ids = [int(each["id"]) for each in found]
        logprobs = np.array([float(each["logprob"]) for each in found], dtype=np.float32)
        logits = np.full(self._vocab_size, np.float32(_FLOOR))
        known = [place for place, token in enumerate(ids) if 0 <= token < self._vocab_size]
        if not known:
            raise EngineError("llama-server proposes no token of the target's vocabulary.")
        logits[[ids[place] for place in known]] = logprobs[known]
        token = sample_tokens_numpy(logits, len(self._tokens), self._sampling)
        self._tokens.append(token)
        return DraftToken(token, _features(logprobs))

    def rollback(self, length: int) -> None:
        if not 0 <= length <= len(self._tokens):
            raise EngineError(f"Cannot roll back {len(self._tokens)} draft tokens to {length}.")
        del self._tokens[length:]

    def extend(self, tokens: Sequence[int]) -> None:
        self._tokens.extend(int(token) for token in tokens)

    def prefill(self) -> None:
        self._complete(0)

    def _context(self) -> int:
        facts = self._post("/props", None)
        settings = facts.get("default_generation_settings", {})
        return int(settings.get("n_ctx") or facts.get("n_ctx") or 4096)

    def _complete(self, count: int) -> list[dict[str, Any]]:
        """The likeliest tokens after those held, most likely first; nothing for ``count`` 0."""
        body = {
            "prompt": list(self._tokens),
            "n_predict": count,
            "n_probs": self._candidates,
            "temperature": 0.0,
            "cache_prompt": True,
            "return_tokens": True,
        }
        answer = self._post("/completion", body)
        if not count:
            return []
        try:
            first = answer["completion_probabilities"][0]
            return list(first["top_logprobs"])
        except (KeyError, IndexError, TypeError):
            raise EngineError("llama-server's answer has no top_logprobs.", "Update llama.cpp.") from None


def _features(logprobs: np.ndarray) -> DraftFeatures:
    """Features of the tokens returned; the rest of the distribution is not known."""
    ordered = np.sort(logprobs)[::-1]
    probs = np.exp(ordered)
    entropy = float(-(probs * ordered).sum())
    margin = float(ordered[0] - ordered[1]) if len(ordered) > 1 else math.inf
    return DraftFeatures(float(probs[0]), max(0.0, entropy), margin, float(ordered.std()))
