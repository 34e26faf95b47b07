"""Split decoding over the real WebSocket gives what transformers' ``generate`` gives.

``benchmarks/lossless.py`` runs the same check at full size: 50 held-out prompts of the bundled pair,
64 tokens each, every draft length.
"""

from __future__ import annotations

import random

import pytest

from wispprof.drafters.torch_drafter import TorchDrafter
from wispprof.engines.loading import LoadedModel, random_model
from wispprof.engines.torch.engine import TorchEngine
from wispprof.testing.lossless import Case, compare, generate_alone, split_outputs
from wispprof.types import Sampling, ServedModel, StepInput, VerifyResult

PROMPTS, MAX_NEW = 5, 12


@pytest.fixture(scope="module")
def target() -> LoadedModel:
    return random_model("tiny-llama", seed=3)


@pytest.fixture(scope="module")
def prompts(target: LoadedModel) -> list[list[int]]:
    dice = random.Random(5)
    vocab = target.info.vocab_size
    return [[dice.randrange(vocab) for _ in range(dice.randrange(2, 24))] for _ in range(PROMPTS)]


@pytest.fixture(scope="module")
def wanted(target: LoadedModel, prompts: list[list[int]]) -> list[list[int]]:
    return generate_alone(target.model, prompts, MAX_NEW)


def serve(target: LoadedModel) -> tuple[TorchEngine, ServedModel]:
    engine = TorchEngine(target, kv_tokens=4096, max_sessions=64)
    info = target.info
    return engine, ServedModel("tiny", info.tokenizer_hash, info.vocab_size, engine.max_context)


class HalfRight:
    """Drafts with the target itself and corrupts every third token, so that all three outcomes occur."""

    def __init__(self, target: LoadedModel) -> None:
        self._inner = TorchDrafter(target)
        self._vocab = target.info.vocab_size
        self._count = 0

    def __getattr__(self, name: str):
        return getattr(self._inner, name)

    def draft(self):
        drafted = self._inner.draft()
        self._count += 1
        if self._count % 3:
            return drafted
        wrong = (drafted.token + 1) % self._vocab
        self._inner.rollback(self._inner.length - 1)
        self._inner.extend([wrong])
        return drafted._replace(token=wrong)


@pytest.mark.parametrize(("k", "sessions"), [(0, 5), (1, 1), (4, 5), (8, 3)])
async def test_greedy_equals_generate(target, prompts, wanted, k: int, sessions: int) -> None:
    engine, model = serve(target)
    for policy in ("wisp", "wispprof"):
        case = Case(k, sessions, policy)
        found = await split_outputs(engine, model, lambda: HalfRight(target), prompts, MAX_NEW, case)
        assert compare(found, wanted).lossless, (policy, found, wanted)


async def test_sampled_text_does_not_depend_on_drafts(target, prompts) -> None:
    engine, model = serve(target)
    sampling = Sampling(temperature=0.8, top_p=0.9, seed=11)
    texts = [
        await split_outputs(
            engine,
            model,
            lambda: HalfRight(target),
            prompts,
            MAX_NEW,
            Case(k, 3, policy, sampling),
        )
        for k, policy in ((0, "fcfs"), (4, "wisp"), (4, "wispprof"))
    ]
    assert texts[0] == texts[1] == texts[2]
    assert texts[0] != generate_alone(target.model, prompts, MAX_NEW)


class Corrupting(TorchEngine):
    """Returns one wrong token."""

    def step(self, feeds: list[StepInput], *, keep_logits: bool = False) -> list[VerifyResult]:
        outcomes = super().step(feeds, keep_logits=keep_logits)
        self.seen = getattr(self, "seen", 0) + 1
        if self.seen == 30 and outcomes[0].tokens:
            one = outcomes[0]
            outcomes[0] = one._replace(tokens=(*one.tokens[:-1], (one.tokens[-1] + 1) % 7))
        return outcomes


async def test_one_wrong_token_is_detected(target, prompts, wanted) -> None:
    engine = Corrupting(target, kv_tokens=4096)
    model = serve(target)[1]
    found = await split_outputs(engine, model, None, prompts, MAX_NEW, Case(0, 1))
    verdict = compare(found, wanted)
    assert not verdict.lossless
    assert verdict.first is not None
