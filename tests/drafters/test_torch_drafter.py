"""The drafter: plain forwards' tokens, a cache that rollbacks leave right, features by two ways."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from wispprof.drafters.model_drafter import features_numpy, features_torch
from wispprof.drafters.torch_drafter import TorchDrafter
from wispprof.engines.loading import LoadedModel, random_model
from wispprof.errors import EngineError
from wispprof.sampling.sampler import sample_tokens
from wispprof.types import Sampling


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return random_model("tiny-qwen3", seed=4, device="cpu")


@torch.inference_mode()
def logits(loaded: LoadedModel, ids: list[int]) -> torch.Tensor:
    return loaded.model(torch.tensor([ids])).logits[0, -1:]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, top_p=0.9, seed=5), Sampling(1.3, top_k=9)])
def test_tokens_and_features_equal_plain_forwards(loaded: LoadedModel, sampling: Sampling) -> None:
    text = np.random.default_rng(0).integers(0, 96, 20).tolist()
    drafter = TorchDrafter(loaded)
    drafter.open(text, sampling)
    for _ in range(30):
        row = logits(loaded, text)
        expected = int(sample_tokens(row, [len(text)], [sampling])[0])
        token, features = drafter.draft()
        assert token == expected
        np.testing.assert_allclose(features, features_torch(row)[0].numpy(), rtol=1e-3, atol=1e-4)
        text.append(token)
    assert drafter.tokens == text


def test_kv_equals_fresh_prefill_after_rollbacks(loaded: LoadedModel) -> None:
    rng = random.Random(3)
    drafter = TorchDrafter(loaded)
    drafter.open([1, 2, 3], Sampling())
    for _ in range(300):
        if drafter.length > 200:
            drafter.open([*drafter.tokens[: rng.randrange(1, 60)], 7], Sampling())
        for _ in range(rng.randrange(0, 6)):
            drafter.draft()
        if rng.random() < 0.7:
            drafter.rollback(rng.randrange(max(1, drafter.length - 8), drafter.length + 1))
        if rng.random() < 0.5:
            drafter.extend([rng.randrange(96) for _ in range(rng.randrange(0, 4))])
    drafter.draft()
    fresh = TorchDrafter(loaded)
    fresh.open(drafter.tokens[:-1], Sampling())
    assert fresh.draft().token == drafter.tokens[-1]
    have, want = drafter.cached_kv(), fresh.cached_kv()
    assert have.shape == want.shape
    assert (have - want).abs().max() < 1e-4
    # Negative control: another token early on, and the cache differs.
    fresh.open([(drafter.tokens[0] + 1) % 96, *drafter.tokens[1:-1]], Sampling())
    fresh.draft()
    assert (drafter.cached_kv() - fresh.cached_kv()).abs().max() > 1e-2


def test_prefill_and_bare_forward_change_nothing(loaded: LoadedModel) -> None:
    text = np.random.default_rng(1).integers(0, 96, 60).tolist()
    plain, warmed = TorchDrafter(loaded), TorchDrafter(loaded)
    plain.open(text, Sampling())
    warmed.open(text, Sampling())
    warmed.prefill()
    row = warmed.forward()
    assert (row - logits(loaded, text)[0]).abs().max() < 1e-4
    assert warmed.forward().shape == (96,)
    assert [plain.draft().token for _ in range(5)] == [warmed.draft().token for _ in range(5)]


def test_limits(loaded: LoadedModel) -> None:
    drafter = TorchDrafter(loaded, max_context=8)
    with pytest.raises(EngineError):
        drafter.open([], Sampling())
    drafter.open([1] * 7, Sampling())
    drafter.draft()
    with pytest.raises(EngineError, match="context"):
        drafter.draft()
    assert drafter.length == 8
    with pytest.raises(EngineError):
        drafter.rollback(9)
    drafter.rollback(2)
    drafter.draft()
    assert drafter.length == 3


def test_features_by_hand() -> None:
    row = np.array([1.0, 3.0, 2.0], dtype=np.float32)
    p = np.exp(row) / np.exp(row).sum()
    expected = (p.max(), -(p * np.log(p)).sum(), 1.0, row.std())
    np.testing.assert_allclose(features_torch(torch.tensor(row)[None])[0], expected, rtol=1e-5)
    np.testing.assert_allclose(features_numpy(row.copy()), expected, rtol=1e-5)


def test_features_of_one_row_do_not_depend_on_the_row_before() -> None:
    rows = [np.random.default_rng(size).standard_normal(size).astype(np.float32) for size in (9, 300, 9, 40)]
    wanted = features_torch(torch.tensor(rows[2])[None])[0]
    for row in rows[:2]:
        features_numpy(row.copy())
    np.testing.assert_allclose(features_numpy(rows[2].copy()), wanted, rtol=1e-5)
    for row in rows[3:]:
        features_numpy(row.copy())
    with ThreadPoolExecutor(2) as pool:  # threads of two devices
        found = list(pool.map(features_numpy, [row.copy() for row in rows * 50]))
    assert found == [features_numpy(row.copy()) for row in rows * 50]
