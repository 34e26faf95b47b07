"""Draft workers: they keep a drafter in step with a path."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import numpy as np
import pytest
from fake_pair import truth
from hypothesis import given
from hypothesis import strategies as st

from wispprof.artifacts.profile import RESTED_MS
from wispprof.edge import ThreadWorker, TimedWorker
from wispprof.edge.draft_worker import CatchUp, DraftStep, DraftThread
from wispprof.sessions.pending_drafts import common_prefix
from wispprof.simulation.devices import DeviceProfile
from wispprof.testing.fake_engine import FakeDrafter, FakeTarget
from wispprof.testing.virtual_time import VirtualTimeLoop, run_virtual
from wispprof.types import Sampling


class CountingDrafter(FakeDrafter):
    """Notes how many tokens each call makes it read."""

    def __init__(self) -> None:
        super().__init__(FakeTarget(), 1.0)
        self.reads: list[int] = []

    def extend(self, tokens: Any) -> None:
        super().extend(tokens)
        self.reads.append(len(tokens))


async def test_prompts_and_gaps_are_read_in_pieces() -> None:
    drafter, thread = CountingDrafter(), DraftThread()
    worker = ThreadWorker(drafter, thread)
    prompt = [1 + i % 7 for i in range(150)]
    await worker.open(prompt, Sampling())
    assert drafter.reads == [64, 64, 22]
    assert worker.held == prompt
    drafter.reads.clear()
    grown = [*prompt, *truth(prompt, 90)]
    steps = [await worker.step(grown) for _ in range(3)]
    assert [type(step) for step in steps] == [CatchUp, CatchUp, DraftStep]
    assert drafter.reads[:2] == [64, 26]
    assert [step.tokens for step in steps if isinstance(step, CatchUp)] == [64, 26]
    assert worker.held == [*grown, *truth(grown, 1)]
    # What an earlier request left is not read again.
    drafter.reads.clear()
    again = ThreadWorker(drafter, thread, held=worker.held)
    await again.open([*grown, 5], Sampling())
    assert drafter.reads == [len(grown) + 1]
    thread.shutdown()


@given(
    st.lists(st.integers(0, 1), max_size=40),
    st.lists(st.integers(0, 1), max_size=40),
)
def test_common_prefix(one: list[int], other: list[int]) -> None:
    expected = 0
    while expected < min(len(one), len(other)) and one[expected] == other[expected]:
        expected += 1
    assert common_prefix(one, other) == expected


def test_a_worker_follows_any_sequence() -> None:
    async def main() -> float:
        target = FakeTarget()
        worker = TimedWorker(FakeDrafter(target, 1.0), lambda context: 2.0, read_ms=0.5)
        loop = asyncio.get_running_loop()
        await worker.open([1, 2, 3], Sampling())
        opened = loop.time()
        assert opened == pytest.approx(0.0015)
        rng = random.Random(1)
        for _ in range(50):
            sequence = [1, 2, 3, *(rng.randrange(2) for _ in range(rng.randrange(6)))]
            step = await worker.step(sequence)
            assert step is not None
            assert step.drafted.token == truth(sequence, 1)[0]
            assert step.draft_ms >= 2.0
        return loop.time() - opened

    assert run_virtual(main()) >= 0.1


def test_a_replayed_device_is_slower_after_a_rest() -> None:
    """By the rule of the simulator, and only for the first step after the rest."""
    device = DeviceProfile("d", draft_ms=2.0, resume_ms=3.0)

    async def main() -> list[float]:
        worker = TimedWorker(FakeDrafter(FakeTarget(), 1.0), device.step_ms, resuming_ms=device.resuming_ms)
        await worker.open([1, 2, 3], Sampling())
        sequence, costs = [1, 2, 3], []
        for rest_s in (0.0, 0.03, 0.0, RESTED_MS / 2000, 0.0):
            await asyncio.sleep(rest_s)
            step = await worker.step(sequence)
            assert step is not None
            costs.append(step.draft_ms)
            sequence.append(step.drafted.token)
        return costs

    assert run_virtual(main()) == pytest.approx([2.0, 5.0, 2.0, 3.5, 2.0])


def test_a_late_timer_does_not_slow_a_replayed_device() -> None:
    """Consecutive steps end on the device's clock, even if the loop wakes late for each. A step after a
    pause begins when it is requested."""

    class Late(VirtualTimeLoop):
        def call_at(self, when: float, *rest: Any, **more: Any) -> Any:
            return super().call_at(when + 0.001, *rest, **more)

    async def main() -> tuple[float, float]:
        worker = TimedWorker(FakeDrafter(FakeTarget(), 1.0), lambda context: 2.5)
        loop = asyncio.get_running_loop()
        await worker.open([1, 2, 3], Sampling())
        sequence, begun = [1, 2, 3], loop.time()
        for _ in range(20):
            step = await worker.step(sequence)
            assert step is not None
            assert step.draft_ms == 2.5
            sequence.append(step.drafted.token)
        run = loop.time() - begun
        await asyncio.sleep(0.02)
        begun = loop.time()
        await worker.step(sequence)
        return run, loop.time() - begun

    with asyncio.Runner(loop_factory=Late) as runner:
        run, single_step = runner.run(main())
    assert run == pytest.approx(20 * 0.0025 + 0.001)
    assert single_step == pytest.approx(0.0035)


def test_a_prompt_beyond_the_drafters_context_gets_no_drafts() -> None:
    class Small(FakeDrafter):
        max_context = 4

    [drafted] = truth([1, 2], 1)

    async def main() -> None:
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(1) as pool:
            worker = ThreadWorker(Small(FakeTarget(), 1.0), pool)
            await worker.open([1] * 9, Sampling())
            assert await worker.step([1] * 9) is None
            await worker.open([1, 2], Sampling())
            assert (await worker.step([1, 2])) is not None
            assert worker.held == [1, 2, drafted]
            assert await worker.step([1, 2, drafted, 4]) is None

    asyncio.run(main())


# --- KV of a real draft model ---------------------------------------------------------------------


def test_draft_kv_equals_a_fresh_prefill_after_hit_miss_and_partial_accept() -> None:
    torch = pytest.importorskip("torch")
    from wispprof.drafters.torch_drafter import TorchDrafter
    from wispprof.engines.loading import random_model
    from wispprof.sessions.draft_buffer import DraftBuffer

    config = {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    loaded = random_model(config, device="cpu")
    prompt = [3, 1, 4, 1, 5]
    rng = np.random.default_rng(0)

    async def main() -> None:
        from concurrent.futures import ThreadPoolExecutor

        drafter, fresh = TorchDrafter(loaded), TorchDrafter(loaded)
        with ThreadPoolExecutor(1) as pool:
            worker = ThreadWorker(drafter, pool)
            await worker.open(prompt, Sampling())
            path = DraftBuffer(prompt)
            path.on_commit(6, [9])
            seen = set()
            for number in range(24):
                for _ in range(4):
                    step = await worker.step(path.sequence())
                    assert step is not None
                    path.propose(step.drafted.token)
                path.take(3)  # the fourth is a guess at the target's own token
                kind = ("hit", "miss", "partial")[number % 3]
                held = [draft.token for draft in path.drafts]
                accepted = 3 if kind != "partial" else int(rng.integers(0, 3))
                own = held[accepted] if kind == "hit" else (held[accepted] + 1) % 64
                effect = path.on_commit(
                    path.committed_len + accepted + 1, [*held[:accepted], own], accepted, 3
                )
                seen.add((effect.proactive_hit, effect.rejected))
                step = await worker.step(path.sequence())
                assert step is not None
                path.propose(step.drafted.token)
                fresh.open(path.sequence()[:-1], Sampling())
                assert fresh.draft().token == step.drafted.token
                ours, theirs = drafter.cached_kv(), fresh.cached_kv()
                assert ours.shape == theirs.shape
                assert torch.allclose(ours, theirs, atol=1e-4)
                path = DraftBuffer(path.committed)
        assert seen == {(True, False), (False, True)}

    asyncio.run(main())
