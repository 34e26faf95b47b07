"""Block tables under random operations, and paged attention against dense KV."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from wispprof.engines.loading import random_model
from wispprof.engines.torch.block_table import BlockTables
from wispprof.engines.torch.dense_kv import DenseKvStore
from wispprof.engines.torch.draft_tree import NO_TREES, DraftTree, Trees
from wispprof.engines.torch.engine import TorchEngine
from wispprof.engines.torch.kv_store import KvGeometry
from wispprof.engines.torch.paged_kv import PagedKvStore
from wispprof.errors import EngineError, OutOfKvMemory
from wispprof.types import StepInput

CPU = torch.device("cpu")


@pytest.mark.parametrize("seed", range(4))
def test_blocks_never_leak_and_writers_never_share_one(seed: int) -> None:
    """Each handle reads what it wrote, through forks and rollbacks."""
    rng = random.Random(seed)
    size, sessions, budget = 4, 5, 60
    tables = BlockTables(budget // size + sessions, size, max_context=40, handles=sessions)
    memory: dict[int, int] = {}
    held: dict[int, list[int]] = {}
    stamp = 0
    for _ in range(600):
        kind = rng.random()
        free = budget - sum(map(len, held.values()))
        if kind < 0.2 and len(held) < sessions:
            held[tables.add()] = []
        elif kind < 0.35 and held and len(held) < sessions:
            source = rng.choice(sorted(held))
            length = rng.randrange(min(len(held[source]), free) + 1)
            held[tables.fork(source, length)] = held[source][:length]
        elif kind < 0.5 and held:
            handle = rng.choice(sorted(held))
            keep = rng.randrange(len(held[handle]) + 1)
            tables.truncate(handle, keep)
            del held[handle][keep:]
        elif kind < 0.6 and held:
            handle = rng.choice(sorted(held))
            tables.remove(handle)
            del held[handle]
        elif held:
            chosen = rng.sample(sorted(held), rng.randrange(1, len(held) + 1))
            new = [rng.randrange(1, 7) for _ in chosen]
            lengths = [len(held[h]) + n for h, n in zip(chosen, new, strict=True)]
            if max(lengths) > 40 or sum(new) > free:
                continue
            # Within the budget an allocation must always succeed.
            copies = tables.allocate(
                np.array(chosen), np.array([len(held[h]) for h in chosen]), np.array(lengths)
            )
            for old, fresh in copies:
                for offset in range(size):
                    memory[fresh * size + offset] = memory.get(old * size + offset, -1)
            for handle, count in zip(chosen, new, strict=True):
                at = np.arange(len(held[handle]), len(held[handle]) + count)
                for slot in tables.slots(np.full(count, handle), at).tolist():
                    stamp += 1
                    memory[slot] = stamp
                    held[handle].append(stamp)
        for handle, wrote in held.items():
            at = tables.slots(np.full(len(wrote), handle), np.arange(len(wrote)))
            assert [memory[p] for p in at.tolist()] == wrote
        tables.check({h: len(w) for h, w in held.items()})


def test_the_check_notices_a_leak() -> None:
    tables = BlockTables(4, 4, 16, 2)
    handle = tables.add()
    tables.allocate(np.array([handle]), np.array([0]), np.array([6]))
    tables.check({handle: 6})
    tables._free.pop()
    with pytest.raises(EngineError, match="leaked"):
        tables.check({handle: 6})


def test_too_many_blocks_are_refused_before_anything_changes() -> None:
    tables = BlockTables(3, 4, 64, 2)
    a, b = tables.add(), tables.add()
    tables.allocate(np.array([a]), np.array([0]), np.array([5]))
    with pytest.raises(OutOfKvMemory):
        tables.allocate(np.array([a, b]), np.array([5, 0]), np.array([9, 4]))
    tables.check({a: 5, b: 0})
    assert tables.free_blocks == 1


def step_inputs(heads: int, kv_heads: int, dim: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    total = int(NEW.sum())
    return tuple(torch.randn(total, h, dim, generator=generator) for h in (heads, kv_heads, kv_heads))


CACHED = np.array([0, 5, 100, 300, 63])
NEW = np.array([7, 1, 5, 33, 2])


SHAPES = [(4, 2, 16), (8, 1, 32), (3, 3, 8)]
TREES = {0: DraftTree.of([-1, -1, 0, 1, 0]), 3: DraftTree.of([-1, *(node // 3 - 1 for node in range(1, 30))])}
CASES = [
    (*s, block_size, "gather", trees) for s in SHAPES for block_size, trees in ((16, NO_TREES), (64, TREES))
]
# Triton's interpreter is slow, and the kernel needs heads of at least 16 dimensions.
CASES += [(*SHAPES[0], 64, "triton", TREES), (*SHAPES[1], 64, "triton", NO_TREES)]


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "block_size", "attention", "trees"), CASES)
def test_paged_attention_equals_dense_attention(
    heads: int,
    kv_heads: int,
    dim: int,
    block_size: int,
    attention: str,
    trees: Trees,
) -> None:
    if attention == "triton":
        pytest.importorskip("triton")
    geometry = KvGeometry(1, heads, kv_heads, dim, 512)
    dense = DenseKvStore(geometry, 0.3, torch.float32, CPU)
    paged = PagedKvStore(geometry, 0.3, torch.float32, CPU, 2000, 8, block_size, "gather")
    handles = np.arange(5)
    results = []
    for store in (dense, paged):
        assert [store.add() for _ in range(5)] == handles.tolist()
        generator = torch.Generator().manual_seed(1)
        for handle, cached in zip(handles, CACHED, strict=True):
            if cached:
                one, zero, all_new = np.array([handle]), np.array([0]), np.array([cached])
                store.allocate(one, zero, all_new)
                past = torch.randn(2, int(cached), kv_heads, dim, generator=generator)
                query = torch.zeros(int(cached), heads, dim)
                store.plan(one, zero, all_new).attend(0, query, past[0], past[1])
        store.allocate(handles, CACHED, CACHED + NEW)
        paged.attention = attention  # for the step in question alone
        plan = store.plan(handles, CACHED, NEW, trees)
        # Into the store's packed order and back.
        parts = [np.arange(int(n)) + int(s) for n, s in zip(NEW, np.cumsum(NEW) - NEW, strict=True)]
        order = torch.from_numpy(np.concatenate([parts[i] for i in plan.order]))
        q, k, v = step_inputs(heads, kv_heads, dim)
        out = torch.empty(len(order), heads * dim)
        out[order] = plan.attend(0, q[order], k[order], v[order])
        results.append(out)
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)
    for handle, length in zip(handles.tolist(), (CACHED + NEW).tolist(), strict=True):
        assert dense.read(handle, length).equal(paged.read(handle, length))


def test_forks_share_blocks_until_written_or_private() -> None:
    engine = TorchEngine(random_model("tiny-llama", seed=1, device="cpu"), kv_tokens=600, backend="paged")
    store = engine._store
    assert isinstance(store, PagedKvStore)
    engine.open("a")
    engine.step([StepInput("a", list(range(90)))])
    free = store.tables.free_blocks
    engine.fork("a", "b", 80)
    assert store.tables.free_blocks == free
    engine.fork("a", "c", 80, private=True)
    assert store.tables.free_blocks == free - 2
    engine.step([StepInput("b", [1, 2])])
    assert store.tables.free_blocks == free - 3
    engine.check_integrity()
    for name in "abc":
        engine.close(name)
    store.check({})
    assert engine.kv_free == 600
