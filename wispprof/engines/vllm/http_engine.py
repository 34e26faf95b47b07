"""Verification over an unmodified vLLM server: greedy only, through the log-probabilities of a prompt.

The drafts go at the end of a prompt whose ``prompt_logprobs`` name the likeliest token at every position. The
server computes the whole prompt again for each step with drafts; without drafts its prefix cache holds. The
way for servers that may not be touched: it uses nothing but the API that vLLM documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from wispprof.backends import Engine, EngineCapabilities, IntegrityReport, OpenSessions
from wispprof.engines import EngineOptions
from wispprof.engines.served_model import chat_template, stop_tokens
from wispprof.engines.tokenizers import load_tokenizer, tokenizer_hash
from wispprof.errors import EngineError, EngineLost, InputRefused
from wispprof.types import GenerationDefaults, Sampling, ServedModel, StepInput, VerifyResult

_KV_TOKENS = 1 << 40
_TIMEOUT_S = 120.0


class VllmHttpEngine(Engine):
    """Sessions are lists of tokens here; the server keeps what its prefix cache holds.

    ``client`` reaches the server; ``model`` is its name there.
    """

    def __init__(self, client: httpx.Client, model: str, max_context: int, max_sessions: int) -> None:
        self._client, self._model = client, model
        self._max_context, self._max_sessions = max_context, max_sessions
        self._tokens: OpenSessions[list[int]] = OpenSessions()
        self._executor = ThreadPoolExecutor(16, thread_name_prefix="vllm-http")

    @property
    def capabilities(self) -> EngineCapabilities:
        return EngineCapabilities(
            "any",
            max_context=self._max_context,
            max_drafts=self._max_context - 1,
            max_sessions=self._max_sessions,
            fork=True,
            greedy_only=True,
        )

    @property
    def sessions(self) -> list[str]:
        return list(self._tokens)

    @property
    def kv_tokens(self) -> int:
        """The server's memory is its own: as good as unlimited."""
        return _KV_TOKENS

    @property
    def kv_free(self) -> int:
        return _KV_TOKENS - sum(map(len, self._tokens.values()))

    def open(
        self, session: str, sampling: Sampling | None = None, tokens: Sequence[int] = (), owner: str = ""
    ) -> None:
        self.check_can_open(session)
        if sampling is not None and (sampling.temperature > 0 or sampling.logprobs is not None):
            raise EngineError("--engine vllm-http is greedy and reports no log-probabilities.")
        self._tokens[session] = []

    def step(self, inputs: Sequence[StepInput]) -> list[VerifyResult]:
        for one in inputs:
            held = self._tokens.get(one.session)
            if held is None:
                raise InputRefused(one.session, f"There is no session {one.session!r}.", "Open it first.")
            if len(one.tokens) <= one.drafts or len(held) + len(one.tokens) > self._max_context:
                raise InputRefused(one.session, f"Session {one.session!r}: these tokens do not fit.")
            if one.parents:
                raise InputRefused(one.session, "vLLM verifies chains of drafts, not trees.")
        if len({one.session for one in inputs}) < len(inputs):
            raise InputRefused(inputs[-1].session, "A session appears twice in one step.")
        decided = list(self._executor.map(self._decide, inputs))
        results = []
        for one, tokens in zip(inputs, decided, strict=True):
            accepted = max(0, len(tokens) - 1)
            kept = len(one.tokens) - one.drafts + accepted
            self._tokens[one.session] += [int(token) for token in one.tokens[:kept]]
            results.append(VerifyResult(one.session, accepted, tokens))
        return results

    def _decide(self, one: StepInput) -> tuple[int, ...]:
        """The accepted drafts of an input and the target's own next token."""
        if not one.needs_logits:
            return ()
        prompt = [*self._tokens[one.session], *(int(token) for token in one.tokens)]
        body: dict[str, Any] = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": 1,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        if one.drafts:
            body["prompt_logprobs"] = 1
        choice = self._ask(body)
        tokens: list[int] = []
        for position in range(len(prompt) - one.drafts, len(prompt)):
            tokens.append(_likeliest(choice["prompt_logprobs"][position]))
            if tokens[-1] != prompt[position]:
                return tuple(tokens)
        return (*tokens, int(choice["token_ids"][0]))

    def _ask(self, body: dict[str, Any]) -> dict[str, Any]:
        try:
            answer = self._client.post("/v1/completions", json=body)
            answer.raise_for_status()
            choice: dict[str, Any] = answer.json()["choices"][0]
        except (httpx.HTTPError, KeyError, ValueError) as err:
            raise EngineLost(f"The vLLM server failed: {err}", "Check the server at --target.") from err
        return choice

    def rollback(self, session: str, length: int) -> None:
        held = self._tokens[session]
        if not 0 <= length <= len(held):
            raise EngineError(f"Session {session!r} caches {len(held)} tokens, fewer than {length}.")
        del held[length:]

    def close(self, session: str) -> None:
        self._tokens.take(session)

    def cached(self, session: str) -> int:
        return len(self._tokens[session])

    def fork(self, session: str, child: str, length: int, sampling: Sampling | None = None) -> None:
        held = self._tokens[session]
        if length > len(held):
            raise EngineError(f"Session {session!r} caches {len(held)} tokens, fewer than {length}.")
        self.open(child, sampling)
        self._tokens[child] = held[:length]

    def check_integrity(self, session: str | None = None) -> IntegrityReport:
        """There is no KV of this engine's own to check."""
        names = self.sessions if session is None else [session]
        return IntegrityReport({name: 0.0 for name in names if self._tokens[name] is not None}, 0.0)

    def shutdown(self) -> None:
        self._executor.shutdown()
        self._client.close()


def _likeliest(entries: dict[str, dict[str, Any]]) -> int:
    """The token of rank 1 at a position of a prompt."""
    for token, entry in entries.items():
        if entry["rank"] == 1:
            return int(token)
    raise KeyError("no token of rank 1")


def load_http_engine(
    options: EngineOptions, transport: httpx.BaseTransport | None = None
) -> tuple[VllmHttpEngine, ServedModel, Any]:
    """An engine over the server at ``options.target``, what it serves, and the tokenizer of
    ``--vllm-arg tokenizer=FOLDER``; without one the OpenAI API is off."""
    address = options.target
    if not address.startswith(("http://", "https://")):
        raise EngineError(f"{address} is no address of a vLLM server.", "Give --target http://HOST:PORT.")
    headers = {"authorization": f"Bearer {key}"} if (key := options.arguments.get("api_key")) else {}
    client = httpx.Client(base_url=address, timeout=_TIMEOUT_S, headers=headers, transport=transport)
    try:
        answer = client.get("/v1/models")
        answer.raise_for_status()
        served = answer.json()["data"][0]
    except (httpx.HTTPError, KeyError, IndexError, ValueError) as err:
        raise EngineError(f"{address} does not answer as a vLLM server: {err}", "Check --target.") from err
    folder = options.arguments.get("tokenizer")
    tokenizer = load_tokenizer(str(folder)) if folder else None
    context = int(served.get("max_model_len") or options.max_context or 4096) - 1
    engine = VllmHttpEngine(client, served["id"], context, options.max_sessions)
    vocabulary = len(tokenizer) if tokenizer is not None else 1 << 20
    model = ServedModel(
        Path(served["id"]).name,
        tokenizer_hash(tokenizer) if tokenizer is not None else "",
        vocabulary,
        context,
        stop_tokens=stop_tokens({}, _Vocabulary(vocabulary), tokenizer),
        chat_template=chat_template(tokenizer),
        defaults=GenerationDefaults(temperature=0.0),
    )
    return engine, model, tokenizer


class _Vocabulary:
    """Of a config only the size of the vocabulary is known."""

    def __init__(self, size: int) -> None:
        self.vocab_size = size
