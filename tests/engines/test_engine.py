"""The engine against transformers: the fast path equals the slow path."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from wispprof.engines.loading import LoadedModel, random_model
from wispprof.engines.torch.cuda_graphs import StepGraphs
from wispprof.engines.torch.engine import TorchEngine
from wispprof.engines.torch.paged_kv import PagedKvStore
from wispprof.errors import EngineError, OutOfKvMemory
from wispprof.types import Sampling, StepInput

BACKENDS = ("dense", "paged", "graphs")
FAMILIES = ("tiny-llama", "tiny-qwen2", "tiny-qwen3", "tiny-mistral")


@pytest.fixture(scope="module")
def llama() -> LoadedModel:
    return random_model("tiny-llama", seed=1, device="cpu")


def make(loaded: LoadedModel, backend: str, **limits: int) -> TorchEngine:
    """``graphs`` is the paged backend padded to graph buckets, run uncaptured."""
    if backend == "dense":
        return TorchEngine(loaded, backend=backend, **limits)
    engine = TorchEngine(loaded, backend="paged", **limits)
    if backend == "graphs":
        store = engine._store
        assert isinstance(store, PagedKvStore)
        engine._graphs = StepGraphs(engine._decoder, store, torch.device("cpu"), capture=False)
    return engine


def tokens(count: int, seed: int, vocab: int = 96) -> list[int]:
    return np.random.default_rng(seed).integers(0, vocab, count).tolist()


@torch.inference_mode()
def full_logits(loaded: LoadedModel, ids: list[int]) -> torch.Tensor:
    return loaded.model(torch.tensor([ids])).logits[0]


@torch.inference_mode()
def greedy(loaded: LoadedModel, prompt: list[int], count: int) -> list[int]:
    out = loaded.model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_logits_equal_single_forwards(family: str, backend: str) -> None:
    loaded = random_model(family, seed=3, device="cpu")
    with torch.no_grad():  # biases that are not zero, where the family has them
        for name, p in loaded.model.named_parameters():
            if name.endswith("bias"):
                p.normal_(0, 0.3)
    engine = make(loaded, backend, kv_tokens=4000)
    lengths = [1, 7, 30, 64, 100, 3, 200]
    texts = [tokens(n + 40, n) for n in lengths]
    for i, (n, text) in enumerate(zip(lengths, texts, strict=True)):
        engine.open(str(i))
        engine.step([StepInput(str(i), text[:n], needs_logits=False)])
    new = [1, 5, 2, 9, 1, 33, 5]
    drafts = [0, 4, 1, 3, 0, 0, 4]
    inputs = [
        StepInput(str(i), text[n : n + k], d)
        for i, (n, text, k, d) in enumerate(zip(lengths, texts, new, drafts, strict=True))
    ]
    engine.step(inputs, keep_logits=True)
    for i, (n, text, k, d) in enumerate(zip(lengths, texts, new, drafts, strict=True)):
        expected = full_logits(loaded, text[: n + k])[-(d + 1) :]
        assert engine.last_logits[i].shape == expected.shape
        assert (engine.last_logits[i] - expected).abs().max() < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_greedy_steps_equal_generate_whatever_is_drafted(llama: LoadedModel, backend: str) -> None:
    prompts = [tokens(n, 50 + n) for n in (2, 9, 31)]
    expected = [greedy(llama, p, 40) for p in prompts]
    rng = random.Random(5)
    engine = make(llama, backend, kv_tokens=2000)
    got: list[list[int]] = []
    for i, prompt in enumerate(prompts):
        engine.open(str(i))
        if len(prompt) > 4:
            engine.step([StepInput(str(i), prompt[:4], needs_logits=False)])
            prompt = prompt[4:]
        got.append(list(engine.step([StepInput(str(i), prompt)])[0].tokens))
    while any(len(g) < 40 for g in got):
        inputs = []
        for i, g in enumerate(got):
            k = rng.choice([0, 1, 4, 8])
            guess = expected[i][len(g) : len(g) + k]
            if guess and rng.random() < 0.7:
                guess[rng.randrange(len(guess))] = rng.randrange(96)
            inputs.append(StepInput(str(i), [g[-1], *guess], len(guess)))
        rng.shuffle(inputs)
        for out in engine.step(inputs):
            assert len(out.tokens) == out.accepted + 1
            got[int(out.session)].extend(out.tokens)
    for g, e in zip(got, expected, strict=True):
        assert g[:40] == e
    # Negative control: one corrupted committed token must show.
    broken = list(prompts[2])
    broken[20] = (broken[20] + 1) % 96
    assert greedy(llama, broken, 40) != expected[2]


def churn(engine: TorchEngine, rounds: int, seed: int) -> None:
    """Random accept / partial / reject rounds, prompts in chunks, closes, forks and rollbacks."""
    rng = random.Random(seed)
    pending: dict[str, list[int]] = {}
    names = iter(range(10**6))
    for _ in range(rounds):
        if len(pending) < 6 and rng.random() < 0.3:
            name = str(next(names))
            engine.open(name, Sampling(temperature=rng.choice([0.0, 0.9]), seed=rng.randrange(99)))
            pending[name] = [rng.randrange(96) for _ in range(rng.randrange(1, 60))]
        inputs = []
        for name in rng.sample(sorted(pending), rng.randrange(0, len(pending) + 1)):
            text = pending[name]
            free = engine.max_context - engine.cached(name)
            if free < len(text) + 8:
                engine.close(name)
                del pending[name]
                continue
            if len(text) > 20:
                inputs.append(StepInput(name, text[:20], needs_logits=False))
                continue
            k = rng.choice([0, 0, 1, 3, 6])
            inputs.append(StepInput(name, text + [rng.randrange(96) for _ in range(k)], k))
        before = {n: engine.tokens(n) for n in engine.sessions}
        for one, out in zip(inputs, engine.step(inputs), strict=True):
            kept = len(one.tokens) - one.drafts + out.accepted
            assert engine.tokens(one.session) == before[one.session] + list(one.tokens)[:kept]
            pending[one.session] = (
                [out.tokens[-1]] if one.needs_logits else pending[one.session][len(one.tokens) :]
            )
        if pending and rng.random() < 0.1:
            name = rng.choice(sorted(pending))
            if engine.cached(name) > 2:
                engine.rollback(name, rng.randrange(1, engine.cached(name)))
            if len(pending) < 6:
                copy = str(next(names))
                engine.fork(name, copy, rng.randrange(0, engine.cached(name) + 1))
                pending[copy] = [rng.randrange(96)]
        assert engine.kv_free == engine.kv_tokens - sum(engine.cached(n) for n in engine.sessions)


@pytest.mark.parametrize(("backend", "rounds"), [("dense", 1000), ("paged", 500), ("graphs", 150)])
def test_integrity_after_random_rounds(llama: LoadedModel, backend: str, rounds: int) -> None:
    engine = make(llama, backend, kv_tokens=1500, max_sessions=6)
    churn(engine, rounds, seed=11)
    report = engine.check_integrity()
    assert report.errors
    assert max(report.errors.values()) < 1e-4


def test_integrity_notices_corruption(llama: LoadedModel) -> None:
    engine = TorchEngine(llama, kv_tokens=500)
    engine.open("a")
    engine.open("b")
    engine.step([StepInput("a", tokens(40, 1)), StepInput("b", tokens(20, 2))])
    engine.check_integrity()
    store = engine._store
    pool = store._pools[int(store._pool_of[0])]  # type: ignore[attr-defined]
    pool.data[1, 0, 0, 1, 17] += 0.01
    with pytest.raises(EngineError, match="fresh prefill"):
        engine.check_integrity("a")
    assert engine.check_integrity("b").errors["b"] < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_fork_shares_nothing_afterwards(llama: LoadedModel, backend: str) -> None:
    engine = make(llama, backend, kv_tokens=500)
    text = tokens(50, 3)
    engine.open("a")
    first = engine.step([StepInput("a", text)])[0].tokens
    engine.fork("a", "b", 30)
    assert engine.tokens("b") == text[:30]
    engine.step([StepInput("b", tokens(10, 4))])
    assert engine.step([StepInput("a", first)])[0].tokens == tuple(greedy(llama, text, 2)[1:])
    engine.check_integrity()


@pytest.mark.parametrize("keep", [False, True])
def test_memory_of_sessions_that_ended_is_kept_where_asked_and_text_is_the_same(
    llama: LoadedModel, keep: bool
) -> None:
    engine = TorchEngine(llama, kv_tokens=4000, max_sessions=16, backend="dense", keep_memory=keep)
    text = tokens(40, 3)
    store = engine._store
    held = []
    for _ in range(2):
        names = [f"s{i}" for i in range(12)]
        for name in names:
            engine.open(name)
        results = engine.step([StepInput(name, text) for name in names])
        assert {o.tokens for o in results} == {tuple(greedy(llama, text, 1))}
        engine.check_integrity()
        for name in names:
            engine.close(name)
        held.append(max(pool.rows for pool in store._pools))  # type: ignore[attr-defined]
    assert (min(held) >= 12) == keep


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_failed_step_changes_nothing(
    llama: LoadedModel, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(llama, backend, kv_tokens=100, max_sessions=3)
    for name in "abc":
        engine.open(name)
        engine.step([StepInput(name, tokens(20, ord(name)))])

    def state() -> object:
        return {n: engine.tokens(n) for n in engine.sessions}, engine.kv_free

    before = state()
    bad: list[list[StepInput]] = [
        [StepInput("a", [1]), StepInput("nobody", [1])],
        [StepInput("a", [1]), StepInput("a", [2])],
        [StepInput("a", [1]), StepInput("b", [])],
        [StepInput("a", [1]), StepInput("b", [1], 1)],
        [StepInput("a", [1]), StepInput("b", [1, 2], 1, needs_logits=False)],
        [StepInput("a", [1]), StepInput("b", [96])],
        [StepInput("a", [1]), StepInput("b", [-1])],
        [StepInput("a", [0] * 30), StepInput("b", [0] * 30)],
        [StepInput("a", [0] * 240)],
    ]
    for inputs in bad:
        with pytest.raises(EngineError):
            engine.step(inputs)
        assert state() == before
    with pytest.raises(OutOfKvMemory):
        engine.step([StepInput("a", [0] * 41)])
    with pytest.raises(OutOfKvMemory):
        engine.open("d")
    engine.close("c")
    engine.fork("a", "d", 20)
    with pytest.raises(OutOfKvMemory):
        engine.step([StepInput("d", [0] * 41)])
    engine.close("d")

    def explode(*_: object) -> None:
        raise RuntimeError("the device went away")

    before = state()
    monkeypatch.setattr(engine._decoder, "logits", explode)
    with pytest.raises(RuntimeError, match="went away"):
        engine.step([StepInput("a", [5, 6, 7], 2), StepInput("b", [8])])
    monkeypatch.undo()
    assert state() == before
    engine.check_integrity()


def test_the_context_can_be_filled_to_its_last_token(llama: LoadedModel) -> None:
    engine = TorchEngine(llama, kv_tokens=300)
    engine.open("a")
    text = tokens(256, 9)
    engine.step([StepInput("a", text[:250])])
    engine.step([StepInput("a", text[250:256])], keep_logits=True)
    assert engine.cached("a") == engine.max_context == 256
    assert (engine.last_logits[0][0] - full_logits(llama, text)[-1]).abs().max() < 1e-4
    with pytest.raises(EngineError, match="context"):
        engine.step([StepInput("a", [1])])


def test_sampled_text_is_the_same_whatever_the_batch(llama: LoadedModel) -> None:
    sampling = Sampling(temperature=0.8, top_p=0.9, seed=7)
    prompt = tokens(12, 20)

    def run(k: int, company: int) -> list[int]:
        rng = random.Random(k)
        engine = TorchEngine(llama, kv_tokens=1000)
        engine.open("a", sampling)
        for i in range(company):
            engine.open(str(i), Sampling(temperature=float(i % 2), seed=i))
        out = list(engine.step([StepInput("a", prompt)])[0].tokens)
        while len(out) < 30:
            inputs = [StepInput("a", [out[-1], *(rng.randrange(96) for _ in range(k))], k)]
            inputs += [StepInput(str(i), tokens(3, i)) for i in range(company)]
            out += engine.step(inputs)[0].tokens
        return out[:30]

    expected = run(0, 0)
    assert run(0, 5) == expected
    assert run(4, 0) == expected
    assert run(8, 3) == expected


def test_zero_feeds_and_warm_up(llama: LoadedModel) -> None:
    engine = TorchEngine(llama, kv_tokens=64, max_sessions=2)
    assert engine.step([]) == []
    engine.warm_up()
    assert engine.kv_free == 64
    assert engine.sessions == []
    engine.open("a")
    engine.step([StepInput("a", [1, 2], 1)])
    assert engine.last_step is not None
    assert engine.last_step.shape.new_tokens == 2
    engine.check_integrity()
