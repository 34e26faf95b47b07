"""Drafters of the edge, and the worker that keeps them in step with a path."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import numpy as np
import pytest
from fake_pair import hash_trace, truth
from hypothesis import given, settings
from hypothesis import strategies as st

from wispprof.artifacts.profile import RESTED_MS
from wispprof.backends import Drafter
from wispprof.drafters.ngram import LookupDrafter, LookupFirst
from wispprof.drafters.replay import ReplayDrafter
from wispprof.edge import ThreadWorker, TimedWorker
from wispprof.errors import ProfileError
from wispprof.sessions.pending_drafts import common_prefix
from wispprof.simulation.devices import DeviceProfile
from wispprof.testing.fake_engine import FakeDrafter, FakeTarget
from wispprof.testing.virtual_time import VirtualTimeLoop, run_virtual
from wispprof.types import DraftFeatures, DraftToken, Sampling

TRACE = hash_trace(paths=3, length=30, depth=6)


# --- replay ---------------------------------------------------------------------------------------


def test_replay_proposes_what_the_draft_model_did() -> None:
    for path in TRACE.paths:
        real, replay = FakeDrafter(FakeTarget(), 0.75), ReplayDrafter(TRACE)
        for row in range(len(path.path) - TRACE.depth):
            start = (*path.prompt, *path.path[:row])
            real.open(start, Sampling())
            replay.open(start, Sampling())
            for _ in range(TRACE.depth):
                ours, theirs = replay.draft(), real.draft()
                assert ours.token == theirs.token
                assert ours.features == pytest.approx(theirs.features, rel=1e-6)


def test_replay_on_the_true_path_goes_beyond_the_depth_of_a_row() -> None:
    perfect = hash_trace(paths=1, length=30, depth=3, accuracy=1.0)
    drafter = ReplayDrafter(perfect)
    path = perfect.paths[0]
    drafter.open(path.prompt, Sampling())
    drafted = [drafter.draft().token for _ in range(20)]
    assert drafted == list(path.path[:20])


def test_replay_rolls_back_and_extends_like_a_model() -> None:
    path = TRACE.paths[0]
    real, replay = FakeDrafter(FakeTarget(), 0.75), ReplayDrafter(TRACE)
    rng = random.Random(3)
    for drafter in (real, replay):
        drafter.open(path.prompt, Sampling())
    committed = 0
    while committed < len(path.path) - 8:
        count = rng.randrange(6)
        ours = [replay.draft().token for _ in range(count)]
        theirs = [real.draft().token for _ in range(count)]
        assert ours == theirs
        accepted = 0
        while accepted < count and ours[accepted] == path.path[committed + accepted]:
            accepted += 1
        committed += accepted
        for drafter in (real, replay):
            drafter.rollback(len(path.prompt) + committed)
            drafter.extend([path.path[committed]])
        committed += 1
        assert replay.length == real.length


def test_replay_refuses_strange_text() -> None:
    drafter = ReplayDrafter(TRACE)
    with pytest.raises(ProfileError, match="no path for this prompt"):
        drafter.open([1, 2, 3], Sampling())
    path = TRACE.paths[0]
    drafter.open(path.prompt, Sampling())
    with pytest.raises(ProfileError, match="left the trace's path"):
        drafter.extend([path.path[0] ^ 1])
    drafter.extend(path.path)
    assert not drafter.can_draft


# --- lookup ---------------------------------------------------------------------------------------


def test_lookup_continues_the_last_occurrence() -> None:
    drafter = LookupDrafter(longest=3, shortest=2)
    drafter.open([1, 2, 3, 4, 9, 1, 2, 3], Sampling())
    assert [drafter.draft().token for _ in range(3)] == [4, 9, 1]
    drafter.rollback(8)
    drafter.extend([7, 5, 2, 3])
    assert drafter.draft().token == 7  # the later of two continuations


def test_lookup_cannot_draft_without_a_match() -> None:
    drafter = LookupDrafter()
    drafter.open([1, 2, 3, 4], Sampling())
    assert not drafter.can_draft
    assert drafter.confidence() == 0.0
    assert drafter.draft().features.confidence == pytest.approx(0.01)


def test_lookup_learns_its_confidence() -> None:
    def confidence(right: bool) -> float:
        drafter = LookupDrafter(longest=2, shortest=2)
        drafter.open([1, 2, 3, 4] * 2, Sampling())
        for _ in range(20):
            at = drafter.length
            token = drafter.draft().token
            drafter.rollback(at + right)
            drafter.extend([] if right else [token])
            if right:
                drafter.extend([])
        return drafter.confidence()

    assert confidence(True) > 0.8
    assert confidence(False) < 0.2


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_lookup_after_any_history_equals_a_fresh_one(seed: int) -> None:
    rng = random.Random(seed)
    drafter = LookupDrafter(longest=3, shortest=1)
    text = [rng.randrange(3) for _ in range(4)]
    drafter.open(text, Sampling())
    for _ in range(30):
        action = rng.random()
        if action < 0.5:
            text.append(drafter.draft().token)
        elif action < 0.75:
            cut = rng.randrange(1, len(text) + 1)
            drafter.rollback(cut)
            del text[cut:]
        else:
            more = [rng.randrange(3) for _ in range(rng.randrange(3))]
            drafter.extend(more)
            text += more
        fresh = LookupDrafter(longest=3, shortest=1)
        fresh.open(text, Sampling())
        assert drafter._followers.keys() >= fresh._followers.keys()
        assert {k: v for k, v in drafter._followers.items() if v} == fresh._followers
        assert drafter.length == len(text)


class Counting(Drafter):
    """A model that notes what it read, and always proposes 99."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    @property
    def length(self) -> int:
        return len(self.tokens)

    def open(self, tokens, sampling) -> None:  # type: ignore[no-untyped-def]
        self.tokens = list(tokens)

    def draft(self) -> DraftToken:
        self.tokens.append(99)
        return DraftToken(99, DraftFeatures(0.5, 0.5, 1.0, 1.0))

    def rollback(self, length: int) -> None:
        assert length <= len(self.tokens)
        del self.tokens[length:]

    def extend(self, tokens) -> None:  # type: ignore[no-untyped-def]
        self.tokens += list(tokens)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_lookup_first_keeps_the_model_in_step(seed: int) -> None:
    rng = random.Random(seed)
    model = Counting()
    drafter = LookupFirst(
        LookupDrafter(longest=2, shortest=1, prior=(1.5, 1.0)), model, min_confidence=0.5
    )
    text = [rng.randrange(3) for _ in range(6)]
    drafter.open(text, Sampling())
    for _ in range(40):
        action = rng.random()
        if action < 0.5:
            text.append(drafter.draft().token)
        elif action < 0.75:
            cut = rng.randrange(1, len(text) + 1)
            drafter.rollback(cut)
            del text[cut:]
        else:
            drafter.extend([rng.choice([0, 1, 99])])
            text.append(drafter._lookup._tokens[-1])
        assert drafter.length == len(text)
        assert model.tokens + drafter._unread == text


# --- workers --------------------------------------------------------------------------------------


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


def test_a_replayed_device_that_rested_pays_for_it() -> None:
    """By the simulator's own rule, and only once: what follows at once does not pay again."""
    device = DeviceProfile("d", draft_ms=2.0, resume_ms=3.0)

    async def main() -> list[float]:
        worker = TimedWorker(
            FakeDrafter(FakeTarget(), 1.0), device.step_ms, resuming_ms=device.resuming_ms
        )
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


def test_a_late_timer_is_not_the_replayed_devices_fault() -> None:
    """Steps that follow at once end on the device's clock, however late the loop was for each of them; a
    step that was waited for begins when it is asked for."""

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
        run, lone = runner.run(main())
    assert run == pytest.approx(20 * 0.0025 + 0.001)
    assert lone == pytest.approx(0.0035)


def test_a_prompt_beyond_the_drafters_context_is_left_alone() -> None:
    class Small(Counting):
        max_context = 4

    async def main() -> None:
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(1) as pool:
            worker = ThreadWorker(Small(), pool)
            await worker.open([1] * 9, Sampling())
            assert await worker.step([1] * 9) is None
            await worker.open([1, 2], Sampling())
            assert (await worker.step([1, 2])) is not None
            assert worker.held == [1, 2, 99]
            assert await worker.step([1, 2, 99, 4]) is None

    asyncio.run(main())


# --- the splice, on a real draft model ------------------------------------------------------------


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
