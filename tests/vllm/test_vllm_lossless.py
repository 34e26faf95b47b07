"""Split decoding on vLLM gives the target's own text: transformers', plain vLLM's and the own engine's."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from conftest import TARGET
from decoding import decode, half_right
from plain_vllm import plain_vllm
from transformers import GenerationConfig

from wispprof.engines import EngineOptions, load_engine
from wispprof.policies import BATCH_POLICIES
from wispprof.testing.lossless import Case, compare, split_outputs
from wispprof.types import Sampling, StepInput

LENGTH = 64


def hot(number: int) -> Sampling:
    """T = 0.8 with every filter."""
    top_k, top_p, min_p = ((0, 1.0, 0.0), (20, 1.0, 0.0), (0, 0.9, 0.0), (40, 0.95, 0.05))[number % 4]
    return Sampling(0.8, top_k, top_p, 1000 + number, min_p=min_p)


@pytest.fixture(scope="session")
def greedy(target, prompts) -> list[list[int]]:
    """What transformers generates, prompts of one length together."""
    texts: list[list[int]] = [[] for _ in prompts]
    for size in {len(prompt) for prompt in prompts}:
        numbers = [n for n, prompt in enumerate(prompts) if len(prompt) == size]
        ids = torch.tensor([prompts[n] for n in numbers])
        config = GenerationConfig(max_new_tokens=LENGTH, do_sample=False, pad_token_id=0)
        with torch.inference_mode():
            full = target.model.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=config, eos_token_id=None
            )
        for number, row in zip(numbers, full[:, size:].tolist(), strict=True):
            texts[number] = row
    return texts


def test_plain_vllm_agrees_with_transformers(prompts, greedy) -> None:
    assert plain_vllm(prompts, LENGTH) == greedy


@pytest.mark.parametrize(("k", "sessions"), [(0, 16), (1, 7), (4, 1), (8, 16)])
async def test_greedy_over_the_wire(served, prompts, greedy, drafter, k: int, sessions: int) -> None:
    found = await split_outputs(*served, drafter, prompts, LENGTH, Case(k, sessions))
    assert compare(found, greedy).lossless


@pytest.mark.parametrize("policy", BATCH_POLICIES)
async def test_sampled_text_is_the_own_engine_s(served, own, prompts, drafter, policy: str) -> None:
    few, sampling = prompts[:8], Sampling(0.8, 0, 0.9, 7)
    wanted = decode(own, few, 24, lambda number: sampling)
    found = await split_outputs(*served, drafter, few, 24, Case(4, 4, policy, sampling))
    assert compare(found, wanted).lossless


@pytest.mark.parametrize(("chunk", "share", "told"), [(1 << 20, 1.0, True), (7, 0.4, True), (50, 0.4, False)])
def test_any_drafts_chunks_and_members(engine, own, prompts, chunk: int, share: float, told: bool) -> None:
    few, dice = prompts[:16], random.Random(3)
    wanted = decode(own, few, 40, hot)
    assert decode(engine, few, 40, hot) == wanted
    drafts = half_right(wanted, 8, 4096)
    found = decode(engine, few, 40, hot, drafts, chunk, lambda number: dice.random() < share, told)
    assert found == wanted


async def test_a_corrupted_token_is_seen(served, prompts, greedy, drafter) -> None:
    """One accepted draft that the target did not choose."""
    engine, model = served
    step, count = engine.step, 0

    def corrupt(inputs):
        nonlocal count
        results = step(inputs)
        count += 1
        if count == 30:
            *kept, last = results[0].tokens
            results[0] = results[0]._replace(tokens=(*kept, (last + 1) % 4096))
        return results

    engine.step = corrupt
    try:
        found = await split_outputs(engine, model, drafter, prompts[:4], LENGTH, Case(4, 4))
    finally:
        del engine.step
    assert compare(found, greedy[:4]).wrong == 1


def test_logprobs_and_minimum_length(engine, own, prompts) -> None:
    sampling = Sampling(0.8, seed=5, logprobs=3, min_length=200, stop_tokens=tuple(range(0, 4096, 2)))
    answers = []
    for each in (engine, own):
        each.open("told", sampling, prompts[0])
        [first] = each.step([StepInput("told", prompts[0])])
        [second] = each.step([StepInput("told", (*first.tokens, 1, 2), 2)])
        answers.append([first, second])
        each.close("told")
    for mine, theirs in zip(*answers, strict=True):
        assert mine.tokens == theirs.tokens
        assert len(mine.logprobs) == len(mine.tokens)
        assert all(token % 2 for token in mine.tokens)
        for ours, wanted in zip(mine.logprobs, theirs.logprobs, strict=True):
            assert ours.logprob == pytest.approx(wanted.logprob, abs=1e-3)
            assert [token for token, _ in ours.top] == [token for token, _ in wanted.top]


def test_the_target_is_the_own_engine_s(served) -> None:
    """A session may move between the engines: they name the same identity, and stop alike."""
    theirs = load_engine("torch", EngineOptions(TARGET, device="cpu", kv_tokens=4096)).model
    assert replace(served[1], max_context=0) == replace(theirs, max_context=0)
