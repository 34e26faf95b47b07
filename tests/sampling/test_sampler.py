"""Draws are exact, reproducible, the same in numpy and torch, and filtered as transformers filters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers.generation import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from wispprof.engines.loading import random_model
from wispprof.sampling.position_noise import gumbel, gumbel_numpy, position_keys
from wispprof.sampling.sampler import (
    UNDECIDED,
    acceptance_rates,
    bounded,
    filtered_probs,
    sample_tokens,
    sample_tokens_numpy,
    token_logprobs,
)
from wispprof.types import Sampling

DRAWS = 20_000
SETTINGS = [
    Sampling(1.0),
    Sampling(0.8, top_p=0.9),
    Sampling(0.7, top_k=5),
    Sampling(1.2, top_k=12, top_p=0.8),
    Sampling(1.1, min_p=0.1),
    Sampling(1.3, top_k=15, top_p=0.9, min_p=0.05),
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
            [replace(sampling, seed=s) for s in range(DRAWS)],
        )
        counts = np.bincount(tokens.numpy(), minlength=24)
        p = filtered_probs(row, sampling)[0].double().numpy()
        assert counts[p == 0].sum() == 0
        assert chi_square(counts, p) > 1e-4
        # Negative control: against a slightly warmer distribution the same test must fail.
        wrong = filtered_probs(row, replace(sampling, temperature=sampling.temperature * 1.15))[0]
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
    if sampling.min_p:
        expected = MinPLogitsWarper(sampling.min_p)(None, expected)
    torch.testing.assert_close(filtered_probs(rows, sampling), expected.softmax(-1))


@pytest.mark.parametrize("sampling", [s for s in SETTINGS if s.min_p])
def test_filters_come_in_the_order_of_generate(sampling: Sampling) -> None:
    model = random_model("tiny-llama", seed=3, device="cpu").model
    torch.manual_seed(1)
    out: Any = model.generate(
        torch.tensor([[5, 6, 7]]),
        attention_mask=torch.ones(1, 3, dtype=torch.long),
        max_new_tokens=12,
        do_sample=True,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        eos_token_id=None,
        pad_token_id=0,
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    raw, scores = torch.cat(out.logits), torch.cat(out.scores)
    torch.testing.assert_close(filtered_probs(raw, sampling), scores.softmax(-1))
    tokens = sample_tokens(raw, range(12), [sampling] * 12)
    assert scores.gather(1, tokens[:, None]).isfinite().all()
    assert not scores.isfinite().all()


def test_greedy_is_argmax_and_rows_do_not_touch_each_other() -> None:
    mixed = [
        Sampling(),
        Sampling(1.0, seed=1),
        Sampling(0.8, top_p=0.9, seed=2),
        Sampling(),
        Sampling(2.0, top_k=200, seed=3),
        Sampling(1.5, top_p=0.99, seed=4),
        Sampling(0.5, top_k=64, top_p=0.5, seed=5),
        Sampling(1.5, min_p=0.2, seed=6),
    ]
    rows = logits(8, 500, seed=6)
    positions = [3, 1, 4, 1, 5, 9, 2, 6]
    together = sample_tokens(rows, positions, mixed)
    assert sample_tokens(rows, positions, [Sampling()] * 8).equal(rows.argmax(-1))
    for i, (p, s) in enumerate(zip(positions, mixed, strict=True)):
        assert sample_tokens(rows[i : i + 1], [p], [s])[0] == together[i]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(2, 700),
    st.floats(0.1, 3),
    st.sampled_from([0, 1, 5, 63, 64, 65, 400]),
    st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]),
    st.sampled_from([0.0, 0.001, 0.1, 0.7, 1.0]),
    st.integers(0, 200),
)
def test_numpy_and_torch_draw_the_same(
    seed: int, vocab: int, temperature: float, top_k: int, top_p: float, min_p: float, min_length: int
) -> None:
    row = logits(1, vocab, seed=seed)
    stops = (int(row.argmax()), vocab + 3, -1)
    sampling = Sampling(temperature, top_k, top_p, seed, min_p, min_length, stops)
    token = int(sample_tokens(row, [seed % 97], [sampling])[0])
    assert sample_tokens_numpy(row[0].numpy(), seed % 97, sampling) == token
    if early := seed % 97 < min_length:
        row[0, stops[0]] = -torch.inf
    assert not (early and token in stops)
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


EXTREMES = [
    Sampling(0.7, top_k=2**63, seed=2**80),
    Sampling(0.7, top_k=2**200, top_p=0.5, seed=-(2**70)),
    Sampling(1e-320, seed=1),
    Sampling(1e-6, top_p=1e-300),
    Sampling(1.7e308, seed=3),
    Sampling(1e300, top_k=3, min_p=1.0),
    Sampling(1.0, min_length=2**90, stop_tokens=(2**80, -(2**80), 3)),
    Sampling(logprobs=2**70),
]


@pytest.mark.parametrize("sampling", EXTREMES)
def test_no_number_overflows(sampling: Sampling) -> None:
    rows = logits(3, 50, seed=9)
    others = [Sampling(), Sampling(0.9, top_p=0.8, seed=4)]
    expected = sample_tokens(rows[1:], [7, 8], others)
    with np.errstate(over="raise", invalid="raise"):
        tokens = sample_tokens(rows, [6, 7, 8], [sampling, *others])
        assert tokens[1:].equal(expected)
        assert 0 <= int(tokens[0]) < 50
        assert sample_tokens_numpy(rows[0].numpy(), 6, sampling) == int(tokens[0])
    within = bounded(sampling, 50)
    assert sample_tokens(rows[:1], [6], [within])[0] == tokens[0]
    assert max(within.top_k, within.seed.bit_length(), within.logprobs or 0) <= 64
    assert all(0 <= t < 50 for t in within.stop_tokens)
    assert bounded(within, 50) is within


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_a_temperature_that_is_no_number_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="temperature"):
        Sampling(value)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, seed=1), Sampling(1.0, top_p=0.9, min_p=0.1)])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_decides_nothing(sampling: Sampling, bad: float) -> None:
    rows = logits(3, 200, seed=2)
    expected = sample_tokens(rows, [1, 2, 3], [sampling] * 3)
    rows[1, 150] = bad
    tokens = sample_tokens(rows, [1, 2, 3], [sampling] * 3)
    assert tokens[[0, 2]].equal(expected[[0, 2]])
    assert tokens[1] == sample_tokens_numpy(rows[1].numpy(), 2, sampling) == UNDECIDED
    rows[1] = -torch.inf
    assert sample_tokens(rows, [1, 2, 3], [sampling] * 3)[1] == UNDECIDED
    assert sample_tokens_numpy(rows[1].numpy(), 2, sampling) == UNDECIDED


def test_logprobs_are_of_raw_logits() -> None:
    rows = logits(3, 40, seed=8)
    expected = rows.double().log_softmax(-1)
    found = token_logprobs(rows, [5, 6, 7], [3, 0, 100])
    for i, (token, count) in enumerate(((5, 3), (6, 0), (7, 40))):
        assert found[i].logprob == pytest.approx(float(expected[i, token]), abs=1e-5)
        best = expected[i].topk(count)
        assert [t for t, _ in found[i].top] == best.indices.tolist()
        assert [p for _, p in found[i].top] == pytest.approx(best.values.tolist(), abs=1e-5)
