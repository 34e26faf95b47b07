"""Decode many prompts on an engine, with drafts, chunks and members of every kind."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from wispprof.backends import Engine
from wispprof.types import Sampling, StepInput

Drafts = Callable[[int, list[int]], list[int]]


def no_drafts(number: int, text: list[int]) -> list[int]:
    return []


def half_right(truth: Sequence[list[int]], most: int, vocab: int, seed: int = 1) -> Drafts:
    """Up to ``most`` tokens of the truth; every second draft has one wrong token."""
    dice = random.Random(seed)

    def drafts(number: int, text: list[int]) -> list[int]:
        drafted = truth[number][len(text) : len(text) + dice.randrange(most + 1)]
        if drafted and dice.random() < 0.5:
            wrong = dice.randrange(len(drafted))
            drafted = [*drafted[:wrong], (drafted[wrong] + 1) % vocab, *drafted[wrong + 1 :]]
        return drafted

    return drafts


def decode(
    engine: Engine,
    prompts: Sequence[list[int]],
    length: int,
    sampling: Callable[[int], Sampling] = lambda number: Sampling(),
    drafts: Drafts = no_drafts,
    chunk: int = 1 << 20,
    members: Callable[[int], bool] = lambda number: True,
    told: bool = True,
) -> list[list[int]]:
    """``length`` tokens after each prompt. ``members``: who takes part in a step. ``told``: sessions are
    opened with their prompts. Sessions are closed."""
    names = [f"decoded {number}" for number in range(len(prompts))]
    texts: list[list[int]] = [[] for _ in prompts]
    for number, name in enumerate(names):
        engine.open(name, sampling(number), prompts[number] if told else ())
    while unfinished := [n for n, text in enumerate(texts) if len(text) < length]:
        chosen = [n for n in unfinished if members(n)] or unfinished[:1]
        step = [_next_input(engine, names[n], prompts[n], texts[n], drafts, n, chunk) for n in chosen]
        for number, result in zip(chosen, engine.step(step), strict=True):
            texts[number] += result.tokens
    engine.audit({name: engine.cached(name) for name in names})
    for name in names:
        engine.close(name)
    return [text[:length] for text in texts]


def _next_input(
    engine: Engine, name: str, prompt: list[int], text: list[int], drafts: Drafts, number: int, chunk: int
) -> StepInput:
    cached = engine.cached(name)
    if cached < len(prompt):
        end = min(len(prompt), cached + chunk)
        return StepInput(name, prompt[cached:end], needs_logits=end == len(prompt))
    drafted = drafts(number, text)
    return StepInput(name, (text[-1], *drafted), len(drafted))
