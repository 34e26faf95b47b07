"""Attention in C against attention of each input by itself in torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wispprof.engines.torch import ragged_attention
from wispprof.engines.torch.dense_kv import DenseKvStore
from wispprof.engines.torch.draft_tree import DraftTree
from wispprof.engines.torch.kv_store import KvGeometry
from wispprof.errors import EngineError

CPU = torch.device("cpu")
SCALE = 0.3

needs_kernel = pytest.mark.skipif(ragged_attention.kernel().function is None, reason="no gcc here")


def store(heads: int, kv_heads: int, dim: int, native: bool = True) -> DenseKvStore:
    geometry = KvGeometry(2, heads, kv_heads, dim, 2048)
    return DenseKvStore(geometry, SCALE, torch.float32, CPU, native=native)


def alone(q: Tensor, k: Tensor, v: Tensor, tree: DraftTree | None) -> Tensor:
    """One input: q (new, heads, d) over keys and values (length, kv_heads, d), in double precision."""
    new, heads, dim = q.shape
    length, kv_heads = k.shape[:2]
    seen = torch.ones(new, length, dtype=torch.bool).tril(length - new)
    if tree is not None:
        root = new - len(tree.parents)
        for node, other in zip(*tree.hidden(), strict=True):
            seen[root + node, length - new + root + other] = False
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(heads // kv_heads, 0) for x in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=SCALE)
    return out.transpose(0, 1).reshape(new, heads * dim)


def largest_error(
    subject: DenseKvStore,
    heads: int,
    kv_heads: int,
    dim: int,
    cached: list[int],
    new: list[int],
    trees: dict[int, DraftTree],
) -> float:
    """Of a step of both layers, after a prefill of the cached tokens; strided q, k and v as a decoder has."""
    generator = torch.Generator().manual_seed(0)

    def packed(tokens: int) -> Tensor:
        return torch.randn(tokens, heads + 2 * kv_heads, dim, generator=generator)

    handles = np.array([subject.add() for _ in cached])
    history = [[packed(length) for length in cached] for _ in range(2)]
    for index, (handle, length) in enumerate(zip(handles, cached, strict=True)):
        if length:
            one, zero, count = np.array([handle]), np.zeros(1, np.int64), np.array([length])
            subject.allocate(one, zero, count)
            plan = subject.plan(one, zero, count)
            for layer in range(2):
                qkv = history[layer][index]
                q, k, v = qkv[:, :heads], qkv[:, heads : heads + kv_heads], qkv[:, heads + kv_heads :]
                plan.attend(layer, q, k, v)
    old, fresh = np.array(cached), np.array(new)
    subject.allocate(handles, old, old + fresh)
    plan = subject.plan(handles, old, fresh, trees)
    worst = 0.0
    for layer in range(2):
        inputs = [packed(length) for length in new]
        qkv = torch.cat([inputs[number] for number in plan.order])
        q, k, v = qkv[:, :heads], qkv[:, heads : heads + kv_heads], qkv[:, heads + kv_heads :]
        out = plan.attend(layer, q, k, v)
        expected = []
        for number in plan.order:
            all_of = torch.cat((history[layer][number], inputs[number]))
            keys, values = all_of[:, heads : heads + kv_heads], all_of[:, heads + kv_heads :]
            expected.append(alone(inputs[number][:, :heads], keys, values, trees.get(int(number))))
            stored = subject.read(int(handles[number]), len(all_of))[layer]
            assert torch.equal(stored[0].transpose(0, 1), keys)
            assert torch.equal(stored[1].transpose(0, 1), values)
        worst = max(worst, float((out - torch.cat(expected)).abs().max()))
    return worst


TREE = DraftTree.of([-1, 0, 0, -1, 3])

STEPS = {
    "one token each": ([5, 300, 0, 17], [1, 1, 1, 1], {}),
    "ragged drafts": ([5, 300, 0, 17, 64, 900], [5, 1, 3, 16, 2, 9], {}),
    "one session": ([1030], [7], {}),
    "trees": ([40, 7, 260], [6, 3, 8], {0: TREE, 2: TREE}),
    "beside a prompt": ([40, 7, 260, 3], [6, 70, 1, 33], {0: TREE}),
    "a tree behind a prompt": ([40, 7], [70, 6], {1: TREE}),
}


@needs_kernel
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(6, 2, 64), (4, 4, 128), (8, 1, 64)])
@pytest.mark.parametrize("step", STEPS)
def test_a_ragged_step_equals_each_input_alone(
    step: str, heads: int, kv_heads: int, dim: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached, new, trees = STEPS[step]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    subject = store(heads, kv_heads, dim)
    assert subject.attention == "ragged"
    assert largest_error(subject, heads, kv_heads, dim, cached, new, trees) < 2e-5


@pytest.mark.parametrize("step", STEPS)
def test_a_padded_step_equals_each_input_alone(step: str) -> None:
    cached, new, trees = STEPS[step]
    subject = store(6, 2, 64, native=False)
    assert subject.attention == "dense"
    assert largest_error(subject, 6, 2, 64, cached, new, trees) < 2e-5


@needs_kernel
def test_a_hidden_node_that_is_seen_shows() -> None:
    """The negative control: without its tree, an input with branches differs."""
    chain = DraftTree.of([-1, 0, 1, 2, 3])
    subject = store(6, 2, 64)
    cached, new = np.array([40]), np.array([6])
    handle = np.array([subject.add()])
    subject.allocate(handle, np.zeros(1, np.int64), cached + new)
    qkv = torch.randn(6, 10, 64, generator=torch.Generator().manual_seed(1))
    q, k, v = qkv[:, :6], qkv[:, 6:8], qkv[:, 8:]
    told, untold = (subject.plan(handle, cached, new, {0: tree}).attend(0, q, k, v) for tree in (TREE, chain))
    assert torch.equal(told[:2], untold[:2])
    assert float((told[3:] - untold[3:]).abs().max()) > 1e-2


@needs_kernel
def test_scores_of_any_size_give_finite_weights() -> None:
    """Scores that differ by far more than float32's exponent: the largest takes everything."""
    subject = store(2, 2, 64)
    handle, cached, new = np.array([subject.add()]), np.zeros(1, np.int64), np.array([9])
    subject.allocate(handle, cached, new)
    generator = torch.Generator().manual_seed(2)
    q, k, v = (100.0 * torch.randn(9, 2, 64, generator=generator) for _ in range(3))
    out = subject.plan(handle, cached, new).attend(0, q, k, v)
    expected = alone(q, k, v, None).float()
    assert torch.allclose(out, expected, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(
    ("dtype", "device", "dim"),
    [(torch.bfloat16, "cpu", 64), (torch.float32, "meta", 64), (torch.float32, "cpu", 80)],
)
def test_what_the_kernel_does_not_support_is_left_to_torch(dtype: torch.dtype, device: str, dim: int) -> None:
    assert not ragged_attention.supports(dtype, torch.device(device), dim)


@needs_kernel
def test_a_key_that_is_not_finite_shows() -> None:
    """As in torch: a result must not look sound while what is cached is not."""
    subject = store(2, 2, 64)
    handle, cached, new = np.array([subject.add()]), np.zeros(1, np.int64), np.array([8])
    subject.allocate(handle, cached, new)
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(8, 2, 64, generator=generator) for _ in range(3))
    k[4] = float("inf")
    out = subject.plan(handle, cached, new).attend(0, q, k, v)
    assert out.isfinite().all(1).tolist() == [True] * 4 + [False] * 4


@needs_kernel
@pytest.mark.parametrize("cached", [250, 400])
def test_a_step_beyond_its_rows_is_refused(cached: int) -> None:
    subject = store(2, 2, 64)
    handle = np.array([subject.add()])
    subject.allocate(handle, np.zeros(1, np.int64), np.array([8]))
    with pytest.raises(EngineError, match="beyond the rows"):
        subject.plan(handle, np.array([cached]), np.array([8]))


def test_without_a_kernel_torch_attends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WISPPROF_NATIVE", "0")
    monkeypatch.setattr(ragged_attention, "kernel", ragged_attention.kernel.__wrapped__)
    assert ragged_attention.kernel().missing == "WISPPROF_NATIVE=0"
    assert store(2, 2, 64).attention == "dense"
