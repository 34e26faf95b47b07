"""Laid-out weights give the same products, and the same decoder, as torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from wispprof.engines.loading import random_model
from wispprof.engines.torch import packed_linear
from wispprof.engines.torch.engine import TorchEngine
from wispprof.engines.torch.packed_linear import PackedLinear, can_pack, pad_rows, rows_to_pack
from wispprof.types import Sampling, StepInput

pytestmark = pytest.mark.skipif(
    not can_pack(torch.zeros(2, 2)), reason="this torch lays out no weights on this processor"
)


@pytest.mark.parametrize("bias", [False, True])
def test_products_equal_a_plain_product_for_any_number_of_rows(bias: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(96, 40)
    offset = torch.randn(96) if bias else None
    product = PackedLinear(weight, offset, fewest=1)
    for rows in (1, 2, 3, 16, 17, 65, 200, 257):
        x = torch.randn(rows, 40)
        wanted = x.double() @ weight.double().T + (0 if offset is None else offset.double())
        torch.testing.assert_close(product(x).double(), wanted, atol=1e-4, rtol=1e-4)
        residual = torch.randn(rows, 96)
        added = product.add_to(residual, x).double()
        torch.testing.assert_close(added, residual + wanted, atol=1e-4, rtol=1e-4)


def test_rows_are_filled_up_to_few_numbers_by_little() -> None:
    assert [pad_rows(rows) for rows in range(2, 65)] == list(range(2, 65))
    for rows in range(2, 2049):
        assert rows <= pad_rows(rows) <= 1.13 * rows
        assert pad_rows(pad_rows(rows)) == pad_rows(rows)
    # Five products of a model, each with a kernel per number, stay below oneDNN's 1,024.
    assert 5 * len({pad_rows(rows) for rows in range(2, 2049)}) < 1024


@pytest.mark.parametrize("fewest", [1, 2])
def test_from_the_fewest_rows_on_the_copy_is_used(fewest: int) -> None:
    """Negative control: a weight changed behind its back changes fewer rows and leaves the others."""
    torch.manual_seed(0)
    weight = torch.randn(96, 40)
    product = PackedLinear(weight, None, fewest)
    inputs = [torch.randn(rows, 40) for rows in (1, 4)]
    before = [product(x) for x in inputs]
    weight += 1.0
    for x, old in zip(inputs, before, strict=True):
        wanted = old if len(x) >= fewest else x @ weight.T
        torch.testing.assert_close(product(x), wanted, atol=1e-4, rtol=1e-4)


def test_only_small_float32_models_on_a_cpu_are_laid_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not can_pack(torch.zeros(4, 4, dtype=torch.bfloat16))
    model = nn.Linear(8, 8)
    assert rows_to_pack(model) == 2
    monkeypatch.setattr(packed_linear, "MAX_CACHED_BYTES", 100)
    assert rows_to_pack(model) == 1
    monkeypatch.setattr(packed_linear, "MAX_PACKED_BYTES", 100)
    assert rows_to_pack(model) == 0


def test_an_engine_decides_alike_with_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = random_model("tiny-llama", seed=1, device="cpu")
    packed = TorchEngine(loaded, kv_tokens=2000)
    monkeypatch.setattr(packed_linear, "can_pack", lambda weight: False)
    plain = TorchEngine(loaded, kv_tokens=2000)
    inputs = [
        StepInput("a", [5, 9, 3]),
        StepInput("b", list(range(20)), drafts=4),
        StepInput("c", [7]),
    ]
    logits = []
    for engine in (packed, plain):
        for name in "abc":
            engine.open(name, Sampling())
        results = engine.step(inputs, keep_logits=True)
        logits.append((results, engine.last_logits))
    assert logits[0][0] == logits[1][0]
    for a, b in zip(logits[0][1], logits[1][1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
