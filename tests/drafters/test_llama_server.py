"""Drafts of a llama-server: what is asked of it, and what its answers become."""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np
import pytest

from wispprof.drafters.llama_server import LlamaServerDrafter, _HttpClient, check_served_vocabulary
from wispprof.errors import EngineError, ModelError
from wispprof.sampling.sampler import sample_tokens_numpy
from wispprof.types import Sampling

VOCABULARY = 64


def row(tokens: list[int]) -> np.ndarray:
    return np.random.default_rng(len(tokens) * 131 + tokens[-1]).normal(0, 3, VOCABULARY).astype(np.float32)


class Served:
    """Answers as llama-server does; ``width``: tokens it returns per position."""

    def __init__(self, width: int = VOCABULARY) -> None:
        self.width = width
        self.asked: list[tuple[str, Any]] = []

    def __call__(self, path: str, body: Any) -> Any:
        self.asked.append((path, body))
        if path == "/props":
            return {"default_generation_settings": {"n_ctx": 512}}
        logits = row(body["prompt"])
        logprobs = logits - np.log(np.exp(logits).sum())
        order = np.argsort(-logprobs)[: self.width]
        top = [{"id": int(token), "logprob": float(logprobs[token])} for token in order]
        return {"completion_probabilities": [{"top_logprobs": top}]}


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, seed=3)], ids=["greedy", "sampled"])
def test_tokens_are_drawn_with_the_position_s_noise(sampling: Sampling) -> None:
    served = Served()
    drafter = LlamaServerDrafter("", VOCABULARY, served)
    assert drafter.max_context == 512
    held = [1, 2, 3]
    drafter.open(held, sampling)
    drafter.prefill()
    for _ in range(5):
        wanted = sample_tokens_numpy(row(held), len(held), sampling)
        drafted = drafter.draft()
        assert drafted.token == wanted
        assert 0 < drafted.features.confidence <= 1
        held.append(wanted)
    drafter.rollback(4)
    drafter.extend([9])
    drafter.draft()
    assert served.asked[-1][1]["prompt"] == [*held[:4], 9]
    assert served.asked[1][1]["n_predict"] == 0


@pytest.mark.parametrize(
    ("sampling", "asked"),
    [(Sampling(), 32), (Sampling(0.8), 128), (Sampling(0.8, top_k=40), 40), (Sampling(0.8, top_k=4000), 128)],
)
def test_a_draw_needs_more_candidates_than_the_likeliest(sampling: Sampling, asked: int) -> None:
    served = Served()
    drafter = LlamaServerDrafter("", VOCABULARY, served)
    drafter.open([1, 2, 3], sampling)
    drafter.draft()
    assert served.asked[-1][1]["n_probs"] == asked


def test_ids_beyond_the_target_s_are_never_proposed() -> None:
    drafter = LlamaServerDrafter("", 8, Served())
    drafter.open([1, 2], Sampling())
    assert drafter.draft().token == int(row([1, 2])[:8].argmax())
    few = LlamaServerDrafter("", 1, Served(width=1))
    few.open([1, 2], Sampling())
    with pytest.raises(EngineError, match="no token of the target"):
        few.draft()


def test_another_vocabulary_is_refused() -> None:
    def tokenizer(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    def answers(shift: int) -> Any:
        return lambda path, body: {"tokens": [byte + shift for byte in body["content"].encode()]}

    check_served_vocabulary("here", tokenizer, post=answers(0))
    with pytest.raises(ModelError, match="another vocabulary"):
        check_served_vocabulary("here", tokenizer, post=answers(1))


def test_faults_of_the_server_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    client = _HttpClient("http://127.0.0.1:9")
    client._client = httpx.Client(
        base_url="http://here", transport=httpx.MockTransport(lambda request: httpx.Response(503))
    )
    with pytest.raises(EngineError, match="503"):
        client("/completion", {})

    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    client._client = httpx.Client(base_url="http://here", transport=httpx.MockTransport(refuse))
    with pytest.raises(ModelError, match="No llama-server answers"):
        client("/props", None)
    old = LlamaServerDrafter("", VOCABULARY, lambda path, body: {"n_ctx": 9})
    old.open([1], Sampling())
    with pytest.raises(EngineError, match="top_logprobs"):
        old.draft()
