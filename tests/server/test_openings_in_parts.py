"""Openings in several frames, and the other bounds of one connection and one key."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from raw_edge import Edge, edge

from wispprof import protocol
from wispprof.errors import ProtocolError
from wispprof.server import Refused, running_server
from wispprof.server.opening_parts import MAX_UNFINISHED, OpeningParts
from wispprof.settings.server_settings import ServerSettings
from wispprof.testing.fake_engine import FakeEngine
from wispprof.types import GenerationDefaults, Sampling

KEY, OTHER = "k" * 16, "o" * 16


def test_parts_stand_before_the_opening_in_order() -> None:
    parts = OpeningParts(max_prompt=10, vocab_size=8)
    parts.add(1, [1, 2])
    parts.add(2, [7])
    parts.add(1, [3])
    assert parts.take(1, [4]) == (1, 2, 3, 4)
    assert parts.take(1, [4]) == (4,)
    assert parts.tokens == 1
    parts.discard(2)
    assert parts.take(2, []) == ()
    assert parts.tokens == 0


@pytest.mark.parametrize("tokens", [[], [8], [-1], [1, 1 << 40]])
def test_a_part_needs_tokens_of_the_model(tokens: list[int]) -> None:
    parts = OpeningParts(max_prompt=10, vocab_size=8)
    with pytest.raises(ProtocolError):
        parts.add(1, tokens)


def test_parts_are_bounded_and_a_refused_opening_is_dropped_whole() -> None:
    parts = OpeningParts(max_prompt=10, vocab_size=8)
    parts.add(1, [1] * 8)
    with pytest.raises(Refused, match="more than 10") as refused:
        parts.add(1, [1] * 3)
    assert refused.value.code == "limit"
    parts.add(1, [1])  # Told once; the rest of the opening crossed with the refusal.
    assert parts.take(1, [1]) is None
    assert parts.take(1, [1]) == (1,)
    parts.add(2, [1] * 10)
    parts.add(3, [1] * 10)
    with pytest.raises(Refused) as busy:
        parts.add(4, [1])
    assert busy.value.code == "busy"
    many = OpeningParts(max_prompt=1000, vocab_size=8)
    for number in range(MAX_UNFINISHED):
        many.add(number, [1])
    with pytest.raises(Refused):
        many.add(-1, [1])


async def problem(one: Edge) -> protocol.Problem:
    while not any(isinstance(frame, protocol.Problem) for frame in one.stray):
        await asyncio.sleep(0.001)
    return next(frame for frame in one.stray if isinstance(frame, protocol.Problem))


async def test_a_long_prompt_arrives_in_parts() -> None:
    engine = FakeEngine(64, max_context=256)
    settings = ServerSettings(policy="fcfs", max_prompt=100)
    async with running_server(settings, engine=engine, model=engine.served) as running:
        prompt = [n % 64 for n in range(90)]
        async with edge(running.split_url) as one:
            await one.send(protocol.OpenPart(0, prompt[:40]))
            await one.send(protocol.OpenPart(0, prompt[40:80]))
            one.inbox[0] = asyncio.Queue()
            await one.send(protocol.Open(0, prompt[80:], 5, undrafted=True))
            tokens: list[int] = []
            while len(tokens) < 5:
                commit = await one.inbox[0].get()
                assert isinstance(commit, protocol.Commit)
                tokens += commit.tokens
            assert tokens == engine.target.generate(prompt, 5)
            assert commit.committed_len == 95
            await one.send(protocol.OpenPart(3, [1] * 101))
            await one.send(protocol.Open(3, [1], 5, undrafted=True))
            assert ((await problem(one)).session, (await problem(one)).code) == (3, "limit")
            assert await one.generate(4, [3], 5) == engine.target.generate([3], 5)
            assert len(one.stray) == 1


async def test_hello_is_answered_with_the_targets_own_settings() -> None:
    engine = FakeEngine(64)
    served = replace(
        engine.served,
        identity="of-these-weights",
        stop_tokens=(2, 5),
        chat_template="{{ messages }}",
        defaults=GenerationDefaults(0.6, 40, 0.95, 0.05),
    )
    async with running_server(ServerSettings(policy="fcfs"), engine=engine, model=served) as running:
        async with edge(running.split_url, identity="of-these-weights") as one:
            welcome = one.welcome
        assert (welcome.identity, welcome.stop_tokens, welcome.chat_template) == (
            "of-these-weights",
            [2, 5],
            "{{ messages }}",
        )
        assert (welcome.temperature, welcome.top_k, welcome.top_p, welcome.min_p) == (0.6, 40, 0.95, 0.05)
        for hello in ({"identity": "of-others"}, {"target": "another"}):
            with pytest.raises(AssertionError, match="code='model'"):
                async with edge(running.split_url, **hello):
                    pass
        with pytest.raises(AssertionError, match="code='hello'"):
            async with edge(running.split_url, tokenizer="another"):
                pass


async def test_connections_of_one_key_are_bounded() -> None:
    engine = FakeEngine(64)
    settings = ServerSettings(policy="fcfs", api_keys=(KEY, OTHER), connections_per_key=2)
    async with running_server(settings, engine=engine, model=engine.served) as running:
        async with edge(running.split_url, key=KEY), edge(running.split_url, key=KEY):
            with pytest.raises(AssertionError, match="code='busy'"):
                async with edge(running.split_url, key=KEY):
                    pass
            async with edge(running.split_url, key=OTHER):
                pass
        while running.front.client.edges_by_key[KEY]:
            await asyncio.sleep(0.001)
        async with edge(running.split_url, key=KEY):
            pass


class OwnedFakeEngine(FakeEngine):
    """Remembers whose sessions were opened."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size)
        self.owners: list[str] = []

    def open(self, session: str, sampling: Sampling, tokens: Sequence[int] = (), owner: str = "") -> None:
        if owner:
            self.owners.append(owner)
        super().open(session, sampling, tokens, owner)


@pytest.mark.parametrize(("second", "reused"), [(KEY, 20), (OTHER, 0)])
async def test_a_prefix_is_reused_within_its_key_only(second: str, reused: int) -> None:
    engine = OwnedFakeEngine(64)
    settings = ServerSettings(policy="fcfs", api_keys=(KEY, OTHER))
    async with running_server(settings, engine=engine, model=engine.served) as running:
        prompt = [n % 64 for n in range(20)]
        for key in (KEY, second):
            async with edge(running.split_url, key=key) as one:
                text = await one.generate(0, [*prompt, 1], 8)
                assert text == engine.target.generate([*prompt, 1], 8)
            while len(running.server.manager):
                await asyncio.sleep(0.001)
        assert running.server.metrics.reused_tokens._value.get() == reused
        # A fork stays its parent's owner's; what is opened is told whose it is.
        assert engine.owners == ([KEY] if reused else [KEY, OTHER])
        await running.server.check_integrity()


@pytest.mark.parametrize(
    "changes",
    [
        {"top_k": (1 << 63) - 1},
        {"top_k": -1},
        {"min_p": 1.5},
        {"min_new": -1},
        {"logprobs": 21},
        {"temperature": float("inf")},
        {"tokens_per_s": float("nan")},
        {"stop": [-1]},
        {"stop": [1 << 40]},
        {"stop": list(range(300))},
        {"max_new": -(1 << 63)},
        {"generated": 1 << 62},
    ],
)
async def test_numbers_that_no_engine_can_take_cost_their_session_only(changes: dict[str, Any]) -> None:
    engine = FakeEngine(64)
    async with running_server(ServerSettings(policy="fcfs"), engine=engine, model=engine.served) as running:
        async with edge(running.split_url) as one:
            await one.send(protocol.Open(7, [1, 2], **{"max_new": 10, "undrafted": True, **changes}))
            assert ((await problem(one)).session, (await problem(one)).code) == (7, "frame")
            assert await one.generate(0, [3], 5) == engine.target.generate([3], 5)
        assert running.server.loop.failed_steps == 0


async def test_min_new_and_logprobs_reach_the_engine() -> None:
    engine = FakeEngine(64)
    async with running_server(ServerSettings(policy="fcfs"), engine=engine, model=engine.served) as running:
        opened: list[Sampling] = []
        original = engine.open

        def remember(session: str, sampling: Sampling, tokens: Any = (), owner: str = "") -> None:
            opened.append(sampling)
            original(session, sampling, tokens, owner)

        engine.open = remember  # type: ignore[method-assign]
        async with edge(running.split_url) as one:
            await one.generate(0, [1, 2, 3, 4], 6, generated=1, min_new=3, min_p=0.1, logprobs=2, stop=[9])
    assert opened == [Sampling(min_p=0.1, min_length=6, stop_tokens=(9,), logprobs=2)]
