"""Draws are exact, reproducible, the same in numpy and torch, and filtered as transformers filters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from wispprof.sampling.position_noise import gumbel, gumbel_numpy, position_keys
from wispprof.sampling.sampler import (
    acceptance_rates,
    filtered_probs,
    sample_tokens,
    sample_tokens_numpy,
)
from wispprof.types import Sampling

DRAWS = 20_000
SETTINGS = [
    Sampling(1.0),
    Sampling(0.8, top_p=0.9),
    Sampling(0.7, top_k=5),
    Sampling(1.2, top_k=12, top_p=0.8),
]


def logits(rows: int, vocab: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def test_noise_is_the_same_in_numpy_and_torch() -> None:
    keys = position_keys([0, 1, -1, 2**64 + 1, 12345], [0, 5, 7, 5, 10**6])
    assert (keys[1] == keys[3]).all()
    ids = np.arange(50_000)
    a = gumbel_numpy(keys, ids)
    b = gumbel(torch.from_numpy(keys.view(np.int32)), torch.from_numpy(ids)).numpy()
    assert np.isfinite(a).all()
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    # Pinned: sessions resumed under a later version must see the same noise.
    np.testing.assert_allclose(gumbel_numpy(position_keys([7], [3]), np.arange(4))[0], PINNED, rtol=1e-5)


PINNED = [1.3737139, 0.824451, 1.7764043, 2.201108]


def test_noise_is_gumbel_and_uncorrelated() -> None:
    noise = gumbel_numpy(position_keys([1] * 200, range(200)), np.arange(500))
    assert stats.kstest(noise.ravel(), "gumbel_r").pvalue > 1e-3
    for lag in ([1, 0], [0, 1], [1, 1]):
        a = noise[: 200 - lag[0], : 500 - lag[1]].ravel()
        b = noise[lag[0] :, lag[1] :].ravel()
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.015
    other = gumbel_numpy(position_keys([2] * 200, range(200)), np.arange(500))
    assert abs(np.corrcoef(noise.ravel(), other.ravel())[0, 1]) < 0.015


@pytest.mark.parametrize("sampling", SETTINGS)
def test_draws_follow_the_filtered_distribution(sampling: Sampling) -> None:
    row = logits(1, 24, seed=3, scale=1.5)
    for position in (0, 17):
        tokens = sample_tokens(
            row.expand(DRAWS, -1),
            [position] * DRAWS,
            [Sampling(sampling.temperature, sampling.top_k, sampling.top_p, s) for s in range(DRAWS)],
        )
        counts = np.bincount(tokens.numpy(), minlength=24)
        p = filtered_probs(row, sampling)[0].double().numpy()
        assert counts[p == 0].sum() == 0
        assert chi_square(counts, p) > 1e-4
        # Negative control: against a slightly warmer distribution the same test must fail.
        wrong = filtered_probs(row, Sampling(sampling.temperature * 1.15, sampling.top_k, sampling.top_p))[0]
        shared = np.where(p > 0, wrong.double().numpy(), 0)
        assert chi_square(counts, shared / shared.sum()) < 1e-6


def test_draws_along_positions_follow_it_too() -> None:
    row = logits(1, 24, seed=4)
    tokens = sample_tokens(row.expand(DRAWS, -1), range(DRAWS), [Sampling(1.0, seed=9)] * DRAWS)
    p = filtered_probs(row, Sampling(1.0))[0].double().numpy()
    assert chi_square(np.bincount(tokens.numpy(), minlength=24), p) > 1e-4


def chi_square(counts: np.ndarray, p: np.ndarray) -> float:
    """p-value, cells with under five expected draws merged."""
    expected = p * counts.sum()
    small = expected < 5
    f_obs = np.append(counts[~small], counts[small].sum())
    f_exp = np.append(expected[~small], expected[small].sum())
    used = f_exp > 0
    f_exp = f_exp[used] * f_obs[used].sum() / f_exp[used].sum()
    return float(stats.chisquare(f_obs[used], f_exp).pvalue)


@pytest.mark.parametrize("sampling", SETTINGS)
def test_filters_are_those_of_transformers(sampling: Sampling) -> None:
    rows = logits(40, 300, seed=5)
    expected = TemperatureLogitsWarper(sampling.temperature)(None, rows)
    if sampling.top_k:
        expected = TopKLogitsWarper(sampling.top_k)(None, expected)
    if sampling.top_p < 1:
        expected = TopPLogitsWarper(sampling.top_p)(None, expected)
    torch.testing.assert_close(filtered_probs(rows, sampling), expected.softmax(-1))


def test_greedy_is_argmax_and_rows_do_not_touch_each_other() -> None:
    rows = logits(7, 500, seed=6)
    mixed = [
        Sampling(),
        Sampling(1.0, seed=1),
        Sampling(0.8, top_p=0.9, seed=2),
        Sampling(),
        Sampling(2.0, top_k=200, seed=3),
        Sampling(1.5, top_p=0.99, seed=4),
        Sampling(0.5, top_k=64, top_p=0.5, seed=5),
    ]
    positions = [3, 1, 4, 1, 5, 9, 2]
    together = sample_tokens(rows, positions, mixed)
    assert sample_tokens(rows, positions, [Sampling()] * 7).equal(rows.argmax(-1))
    for i, (p, s) in enumerate(zip(positions, mixed, strict=True)):
        assert sample_tokens(rows[i : i + 1], [p], [s])[0] == together[i]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(2, 700),
    st.floats(0.1, 3),
    st.sampled_from([0, 1, 5, 63, 64, 65, 400]),
    st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]),
)
def test_numpy_and_torch_draw_the_same(
    seed: int, vocab: int, temperature: float, top_k: int, top_p: float
) -> None:
    row = logits(1, vocab, seed=seed)
    sampling = Sampling(temperature, top_k, top_p, seed)
    token = int(sample_tokens(row, [seed % 97], [sampling])[0])
    assert sample_tokens_numpy(row[0].numpy(), seed % 97, sampling) == token
    # And it is the argmax of noise over what the plain definition keeps.
    kept = filtered_probs(row, sampling)[0]
    noise = gumbel_numpy(position_keys([seed], [seed % 97]), np.arange(vocab))[0]
    assert int((kept.log().numpy() + noise).argmax()) == token


def test_same_noise_agrees_nearly_as_often_as_anything_could() -> None:
    target = logits(200, 60, seed=7)
    draft = target + logits(200, 60, seed=8, scale=0.7)
    for sampling in SETTINGS:
        a = acceptance_rates(target, draft, sampling, draws=32)
        assert a.independent < a.same_noise <= a.best + 0.02
        # Daliri et al.: at least (1 - tv) / (1 + tv) of the draws agree.
        assert a.same_noise > a.best / (2 - a.best) - 0.02
    same = acceptance_rates(target, target, Sampling(1.0), draws=2)
    assert same.best == pytest.approx(1.0, abs=1e-5)
    assert same.same_noise == 1.0
