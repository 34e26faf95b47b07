"""Greedy verification over the API of an unmodified vLLM server, which a fake target plays here."""

from __future__ import annotations

import json

import httpx
import pytest
from raw_edge import edge

from wispprof.engines import EngineOptions
from wispprof.engines.vllm.http_engine import VllmHttpEngine, load_http_engine
from wispprof.errors import EngineError, EngineLost, InputRefused
from wispprof.server import running_server
from wispprof.settings.server_settings import ServerSettings
from wispprof.testing.fake_engine import FakeDrafter, FakeTarget
from wispprof.types import Sampling, StepInput

TARGET = FakeTarget(64)
PROMPTS = [[(5 * i + n) % 64 for i in range(4 + n)] for n in range(6)]


class FakeVllm:
    """Answers as vLLM 0.32.0 does. ``asked``: what was requested."""

    def __init__(self) -> None:
        self.asked: list[dict] = []
        self.broken = False

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if self.broken:
            return httpx.Response(500, text="out of order")
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "org/target", "max_model_len": 512}]})
        body = json.loads(request.content)
        self.asked.append(body)
        tokens = body["prompt"]
        choice: dict = {"token_ids": TARGET.generate(tokens, 1, Sampling()), "prompt_logprobs": None}
        if (most := body.get("prompt_logprobs")) is not None:
            choice["prompt_logprobs"] = [
                None,
                *(self.entry(tokens, at, most) for at in range(1, len(tokens))),
            ]
        return httpx.Response(200, json={"choices": [choice]})

    def entry(self, tokens: list[int], at: int, most: int) -> dict:
        """The prompt's own token, and the ``most`` likeliest."""
        [best] = TARGET.generate(tokens[:at], 1, Sampling())
        entries = {str(tokens[at]): {"logprob": -3.0, "rank": 1 if tokens[at] == best else 7}}
        if most:
            entries.setdefault(str(best), {"logprob": -0.1, "rank": 1})
        return entries


@pytest.fixture
def vllm() -> FakeVllm:
    return FakeVllm()


@pytest.fixture
def engine(vllm: FakeVllm):
    made, model, tokenizer = load(vllm)
    assert (model.id, model.max_context, model.defaults.temperature, tokenizer) == ("target", 511, 0.0, None)
    yield made
    made.shutdown()


def load(vllm: FakeVllm):
    return load_http_engine(EngineOptions("http://vllm:8000"), httpx.MockTransport(vllm))


def test_drafts_are_judged_by_the_rank_of_the_prompt_s_tokens(engine: VllmHttpEngine, vllm) -> None:
    prompt = PROMPTS[3]
    text = TARGET.generate(prompt, 8, Sampling())
    engine.open("a", Sampling(), prompt)
    assert engine.step([StepInput("a", prompt[:2], needs_logits=False)])[0].tokens == ()
    [first] = engine.step([StepInput("a", prompt[2:])])
    assert first.tokens == tuple(text[:1])
    assert "prompt_logprobs" not in vllm.asked[-1]
    wrong = (text[3] + 1) % 64
    [second] = engine.step([StepInput("a", [text[0], text[1], text[2], wrong, 5], drafts=4)])
    assert (second.accepted, second.tokens) == (2, tuple(text[1:4]))
    engine.audit({"a": len(prompt) + 3})
    engine.fork("a", "b", len(prompt), Sampling())
    [again] = engine.step([StepInput("b", text[:3], drafts=2)])
    assert again.tokens == tuple(text[1:4])


async def test_split_text_is_the_target_s(engine: VllmHttpEngine, vllm) -> None:
    model = load(vllm)[1]
    async with (
        running_server(ServerSettings(admit="all"), engine=engine, model=model) as running,
        edge(running.split_url) as one,
    ):
        for n, prompt in enumerate(PROMPTS):
            text = await one.generate(n, prompt, 12, k=4, drafter=FakeDrafter(TARGET, 0.6))
            assert text == TARGET.generate(prompt, 12, Sampling())
        refused = await one.run(9, PROMPTS[0], 4, k=0, drafter=None, sampling=Sampling(0.8))
        assert "greedy" in refused.message
    assert any("prompt_logprobs" in body for body in vllm.asked)


def test_what_it_refuses(engine: VllmHttpEngine, vllm) -> None:
    with pytest.raises(EngineError, match="greedy"):
        engine.open("a", Sampling(0.8))
    engine.open("a", Sampling())
    with pytest.raises(InputRefused, match="no session"):
        engine.step([StepInput("b", [1])])
    with pytest.raises(InputRefused, match="do not fit"):
        engine.step([StepInput("a", [1] * 512)])
    vllm.broken = True
    with pytest.raises(EngineLost, match="500"):
        engine.step([StepInput("a", [1])])
    engine.audit({"a": 0})
    with pytest.raises(EngineError, match="does not answer"):
        load(vllm)
    with pytest.raises(EngineError, match="no address"):
        load_http_engine(EngineOptions("models/target"))
