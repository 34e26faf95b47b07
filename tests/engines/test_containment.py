"""One bad input costs its own session only: it is named, nothing changes, and the others go on exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from test_engine import BACKENDS, make, tokens

from wispprof.drafters.torch_drafter import TorchDrafter
from wispprof.engines.loading import LoadedModel, random_model
from wispprof.engines.model_shapes import PRESETS
from wispprof.engines.torch.engine import TorchEngine
from wispprof.errors import EngineError, InputRefused, OutOfKvMemory
from wispprof.types import Sampling, StepInput

POISON = 90
"""A token whose embedding is NaN: whoever feeds it gets logits that are not finite."""


@pytest.fixture(scope="module")
def poisoned() -> LoadedModel:
    loaded = random_model({**PRESETS["tiny-llama"], "tie_word_embeddings": False}, seed=1, device="cpu")
    with torch.no_grad():
        loaded.model.model.embed_tokens.weight[POISON] = torch.nan
    return loaded


def prompt(seed: int, length: int = 20) -> list[int]:
    return [t % POISON for t in tokens(length, seed)]


def alone(loaded: LoadedModel, backend: str, seed: int, sampling: Sampling, count: int = 6) -> list[int]:
    engine = make(loaded, backend, kv_tokens=400, max_sessions=4)
    engine.open("x", sampling)
    out = list(engine.step([StepInput("x", prompt(seed))])[0].tokens)
    while len(out) < count:
        out += engine.step([StepInput("x", [out[-1]])])[0].tokens
    return out


def state(engine: TorchEngine) -> object:
    return {n: engine.tokens(n) for n in engine.sessions}, engine.kv_free


BAD_INPUTS: list[StepInput] = [
    StepInput("b", []),
    StepInput("b", [1], 1),
    StepInput("b", [1], -1),
    StepInput("b", [1, 2], 1, needs_logits=False),
    StepInput("b", [96]),
    StepInput("b", [-1]),
    StepInput("b", [2**80]),
    StepInput("b", [1.5]),  # type: ignore[list-item]
    StepInput("b", ["1"]),  # type: ignore[list-item]
    StepInput("b", [None]),  # type: ignore[list-item]
    StepInput("b", [0] * 260),
    StepInput("nobody", [1]),
    StepInput("b", [POISON]),
    StepInput("b", [1, POISON, 3]),
    StepInput("b", [POISON, 3, 4], 1),
    StepInput("b", [5, POISON, 6], needs_logits=False),
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_input_at_fault_is_named_and_the_others_go_on(poisoned: LoadedModel, backend: str) -> None:
    hot = Sampling(0.9, top_p=0.9, seed=5)
    expected = {"a": alone(poisoned, backend, 1, Sampling()), "c": alone(poisoned, backend, 3, hot)}
    engine = make(poisoned, backend, kv_tokens=600, max_sessions=8)
    texts: dict[str, list[int]] = {}
    for name, seed, sampling in (("a", 1, Sampling()), ("b", 2, Sampling()), ("c", 3, hot)):
        engine.open(name, sampling)
        texts[name] = list(engine.step([StepInput(name, prompt(seed))])[0].tokens)
    before = state(engine)
    for bad in BAD_INPUTS:
        others = [StepInput(name, [texts[name][-1]]) for name in "ac"]
        with pytest.raises(InputRefused) as caught:
            engine.step([others[0], bad, others[1]])
        assert caught.value.session == bad.session
        assert state(engine) == before
    engine.check_integrity()
    for _ in range(5):
        for result in engine.step([StepInput(name, [texts[name][-1]]) for name in "ac"]):
            texts[result.session] += result.tokens
    assert {name: texts[name] for name in "ac"} == expected
    # The session itself goes on too, and nothing that was not finite stays in the memory that it had.
    assert engine.step([StepInput("b", [texts["b"][-1]])])[0].tokens == (
        alone(poisoned, backend, 2, Sampling())[1],
    )
    engine.close("b")
    engine.close("a")
    for name, seed in (("d", 1), ("e", 2)):
        engine.open(name)
        texts[name] = list(engine.step([StepInput(name, prompt(seed))])[0].tokens)
    results = engine.step([StepInput(name, [texts[name][-1]]) for name in "cde"])
    assert all(result.tokens[0] >= 0 for result in results)
    assert texts["d"] + list(results[1].tokens) == expected["a"][:2]
    engine.check_integrity()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wrong_draft_may_be_poison(poisoned: LoadedModel, backend: str) -> None:
    expected = alone(poisoned, backend, 1, Sampling())
    engine = make(poisoned, backend, kv_tokens=400, max_sessions=4)
    engine.open("a")
    text = list(engine.step([StepInput("a", prompt(1))])[0].tokens)
    while len(text) < 6:
        drafts = [*expected[len(text) : len(text) + 1], POISON, 4]
        result = engine.step([StepInput("a", [text[-1], *drafts], len(drafts))])[0]
        assert len(result.tokens) == result.accepted + 1
        text += result.tokens
    assert text[:6] == expected
    engine.check_integrity()


@pytest.mark.parametrize("backend", BACKENDS)
def test_careless_sampling_among_sixteen(backend: str) -> None:
    loaded = random_model("tiny-llama", seed=1, device="cpu")
    odd = [
        Sampling(0.7, top_k=2**63),
        Sampling(1e-300, seed=2**90),
        Sampling(1e300, top_p=1e-9),
        Sampling(1.0, min_length=2**80, stop_tokens=(2**70, -1, 5), logprobs=2**60),
        Sampling(min_length=10**6, stop_tokens=tuple(range(96))),
    ]
    plain = [Sampling(i % 3 / 2, top_p=0.9, seed=i) for i in range(11)]
    engine = make(loaded, backend, kv_tokens=1000, max_sessions=16)
    for i, sampling in enumerate([*plain, *odd]):
        engine.open(str(i), sampling)
    inputs = [StepInput(str(i), prompt(i)) for i in range(16)]
    with pytest.raises(InputRefused) as caught:  # no token may be chosen
        engine.step(inputs)
    assert caught.value.session == "15"
    results = engine.step(inputs[:-1])
    for i, sampling in enumerate(plain):
        assert list(results[i].tokens) == alone(loaded, backend, i, sampling, 1)
    assert all(0 <= result.tokens[0] < 96 for result in results)
    assert len(results[14].logprobs[0].top) == 96


def test_a_step_that_fails_gives_its_blocks_back(poisoned: LoadedModel) -> None:
    engine = make(poisoned, "paged", kv_tokens=256, max_sessions=2)
    engine.open("a")
    free = engine._store.tables.free_blocks  # type: ignore[attr-defined]
    with pytest.raises(InputRefused):
        engine.step([StepInput("a", [*prompt(1, 199), POISON])])
    assert engine._store.tables.free_blocks == free  # type: ignore[attr-defined]


def test_memory_that_runs_out_within_a_step_is_no_disaster(
    poisoned: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TorchEngine(poisoned, kv_tokens=256)
    engine.open("a")

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine._decoder, "forward", full)
    with pytest.raises(OutOfKvMemory, match="max-tokens"):
        engine.step([StepInput("a", [1, 2])])
    monkeypatch.undo()
    assert engine.step([StepInput("a", [1, 2])])[0].tokens[0] >= 0


def test_a_draft_model_that_is_not_finite_says_so(poisoned: LoadedModel) -> None:
    drafter = TorchDrafter(poisoned)
    drafter.open([1, POISON, 2], Sampling(0.8, seed=1))
    for _ in range(2):
        with pytest.raises(EngineError, match="not finite"):
            drafter.draft()
    drafter.open([1, 2, 3], Sampling(0.8, seed=1))
    fresh = TorchDrafter(poisoned)
    fresh.open([1, 2, 3], Sampling(0.8, seed=1))
    assert drafter.draft() == fresh.draft()


# --- what a step reports, and what it must not choose ------------------------------------------------


def drafted(expected: Sequence[int], wrong_at: int) -> list[int]:
    return [t if i != wrong_at else (t + 1) % 96 for i, t in enumerate(expected)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_logprobs_of_accepted_drafts_and_the_own_token(backend: str) -> None:
    loaded = random_model("tiny-llama", seed=1, device="cpu")
    sampling = Sampling(0.9, top_k=30, seed=4, logprobs=3)
    text = alone(loaded, backend, 1, sampling, 8)
    engine = make(loaded, backend, kv_tokens=400, max_sessions=4)
    engine.open("a", sampling)
    engine.open("b")
    first = engine.step([StepInput("a", prompt(1)), StepInput("b", prompt(2))])
    assert [len(result.logprobs) for result in first] == [1, 0]
    result, _ = engine.step(
        [
            StepInput("a", [text[0], *drafted(text[1:7], wrong_at=4)], 6),
            StepInput("b", [3, 4], needs_logits=False),
        ]
    )
    assert list(result.tokens) == text[1:6]
    with torch.inference_mode():
        raw = loaded.model(torch.tensor([prompt(1) + text[:5]])).logits[0].double().log_softmax(-1)
    given = [*first[0].logprobs, *result.logprobs]
    assert len(given) == 6
    for i, (token, one) in enumerate(zip(text, given, strict=False)):
        row = raw[19 + i]
        assert one.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert [p for _, p in one.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
        assert [t for t, _ in one.top] == row.topk(3).indices.tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_stop_token_before_the_minimum_as_in_generate(backend: str) -> None:
    loaded = random_model("tiny-llama", seed=1, device="cpu")
    model: Any = loaded.model
    free = alone(loaded, backend, 1, Sampling(), 12)
    stops = tuple(sorted(set(free[2:4])))
    expected = model.generate(
        torch.tensor([prompt(1)]),
        attention_mask=torch.ones(1, 20, dtype=torch.long),
        max_new_tokens=12,
        min_new_tokens=8,
        do_sample=False,
        eos_token_id=list(stops),
        pad_token_id=0,
    )[0, 20:].tolist()
    assert len(expected) >= 8
    text = alone(loaded, backend, 1, Sampling(min_length=28, stop_tokens=stops, seed=1), 12)
    assert text[: len(expected)] == expected
    assert not set(text[:8]) & set(stops)
    assert free[: len(expected)] != expected
