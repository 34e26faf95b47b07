"""Draft trees over a real WebSocket: the text is the target's own, beside chains, prompts and any policy."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence

import pytest
from raw_edge import Edge, edge

from wispprof import protocol
from wispprof.backends import Engine
from wispprof.engines.loading import random_model
from wispprof.engines.torch.engine import TorchEngine
from wispprof.policies import BATCH_POLICIES
from wispprof.server import running_server
from wispprof.settings.server_settings import ServerSettings
from wispprof.testing.fake_engine import FakeDrafter, FakeEngine
from wispprof.token_tree import ROOT, TokenTree
from wispprof.types import Sampling, ServedModel, StepInput, VerifyResult

VOCAB, MAX_NEW = 64, 24
PROMPTS = [[(7 * i + n) % VOCAB for i in range(4 + 3 * n)] for n in range(8)]
SAMPLINGS = [Sampling(), Sampling(0.8, seed=3), Sampling(1.0, top_p=0.9, seed=4)]


def drawn_tree(dice: random.Random, text: Sequence[int]) -> TokenTree:
    """A random tree of up to 12 nodes, most of which follow ``text`` as far as their depth allows."""
    tree = TokenTree()
    for _ in range(dice.randrange(13)):
        node = dice.randrange(-1, len(tree))
        depth = 0 if node == ROOT else tree.depths[node]
        right = depth < len(text) and dice.random() < 0.7
        tree.add(node, text[depth] if right else dice.randrange(VOCAB), dice.random())
    return tree


async def with_trees(
    one: Edge, number: int, prompt: list[int], text: list[int], sampling: Sampling
) -> list[int]:
    """One session that answers each commit with a random tree; ``text``: what the target will say. Frames
    come twice now and then, and in parts."""
    dice = random.Random(number)
    one.inbox[number] = asyncio.Queue()
    opening = protocol.Open(
        number, prompt, MAX_NEW, temperature=sampling.temperature, top_p=sampling.top_p, seed=sampling.seed
    )
    await one.send(opening)
    output: list[int] = []
    for epoch in range(1, 10_000):
        commit = await one.inbox[number].get()
        assert isinstance(commit, protocol.Commit), commit
        output += commit.tokens
        assert commit.committed_len == len(prompt) + len(output)
        if commit.finished:
            return output
        tree = drawn_tree(dice, text[len(output) :])
        for count in {len(tree), dice.randrange(len(tree) + 1) if dice.random() < 0.3 else len(tree)}:
            frame = protocol.Draft(
                number,
                epoch,
                commit.committed_len,
                tree.tokens[:count],
                bytes(protocol.acceptance_byte(prob) for prob in tree.acceptance_probs[:count]),
                1.0,
                50.0,
                protocol.parent_bytes(tree.parents[:count]),
            )
            await one.send(frame)
    raise AssertionError("it does not end")


class Watched:
    """Counts an engine's trees with branches, and the nodes accepted of them. ``step_ms`` more a step: the
    drafts of the next one are there before it begins."""

    def __init__(self, engine: Engine, step_ms: float = 0.0) -> None:
        self.trees = self.accepted = 0
        self._step, self._step_ms = engine.step, step_ms
        engine.step = self.step  # type: ignore[method-assign]

    def step(self, inputs: Sequence[StepInput]) -> list[VerifyResult]:
        time.sleep(self._step_ms / 1000.0)
        results = self._step(inputs)
        for given, result in zip(inputs, results, strict=True):
            if given.parents:
                self.trees += 1
                self.accepted += result.accepted
        return results


async def served(
    engine: Engine, model: ServedModel, policy: str, sampling: Sampling
) -> tuple[list[list[int]], list[list[int]]]:
    """(Texts without drafts, texts of sessions with trees and of some with chains) of one server."""
    options = {"timeout_ms": 1.0} if policy == "sled" else {}
    settings = ServerSettings(policy=policy, policy_options=options, admit="all", prefill_chunk=16)
    async with (
        running_server(settings, engine=engine, model=model) as running,
        edge(running.split_url) as one,
    ):
        assert one.welcome.trees
        alone = [
            await one.generate(n, prompt, MAX_NEW, k=0, sampling=sampling) for n, prompt in enumerate(PROMPTS)
        ]
        jobs = [
            one.generate(
                n, prompt, MAX_NEW, k=4, drafter=FakeDrafter(FakeEngine(VOCAB).target), sampling=sampling
            )
            if n % 4 == 3
            else with_trees(one, n, prompt, alone[n], sampling)
            for n, prompt in enumerate(PROMPTS)
        ]
        found = list(await asyncio.gather(*jobs))
        while len(running.server.manager):
            await asyncio.sleep(0.001)
        await running.server.check_integrity()
        assert running.server.loop.failed_steps == running.server.loop.rejected_plans == 0
    return alone, found


@pytest.mark.parametrize("policy", BATCH_POLICIES)
async def test_every_policy_serves_trees(policy: str) -> None:
    engine = FakeEngine(VOCAB, trees=True, step_ms=lambda shape: 5.0)
    watched = Watched(engine)
    alone, found = await served(engine, engine.served, policy, Sampling())
    assert alone == [engine.target.generate(prompt, MAX_NEW) for prompt in PROMPTS]
    assert found == alone
    if policy != "server-only":
        # In stream mode the server does not wait for them.
        assert watched.trees > (3 if policy == "wispprof" else 20)
        assert watched.accepted > watched.trees // 2


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "0.8", "1"])
@pytest.mark.parametrize("policy", ["wisp", "wispprof"])
async def test_the_torch_engine_says_the_same_with_trees(policy: str, sampling: Sampling) -> None:
    loaded = random_model("tiny-llama", seed=3, device="cpu")
    engine = TorchEngine(loaded, kv_tokens=4096, max_sessions=32)
    model = ServedModel("tiny", "", loaded.info.vocab_size, engine.max_context)
    watched = Watched(engine, step_ms=10.0)
    alone, found = await served(engine, model, policy, sampling)
    assert found == alone
    assert watched.accepted > watched.trees // 2 >= (10 if policy == "wisp" else 0)


async def test_a_tree_taken_for_a_chain_would_be_noticed() -> None:
    class Blind(FakeEngine):
        """Takes the children of any node for those of the one before it, and commits what it was given."""

        def _verify(self, given: StepInput) -> VerifyResult:
            result = super()._verify(given._replace(parents=()))
            own = [one for one in given.tokens[len(given.tokens) - given.drafts :] if given.parents]
            return result._replace(tokens=(*result.tokens[:-1], own[-1])) if own else result

    engine = Blind(VOCAB, trees=True)
    alone, found = await served(engine, engine.served, "wisp", Sampling())
    assert found != alone


async def test_an_engine_of_chains_refuses_trees() -> None:
    engine = FakeEngine(VOCAB)
    settings = ServerSettings(policy="wisp", admit="all")
    async with (
        running_server(settings, engine=engine, model=engine.served) as running,
        edge(running.split_url) as one,
    ):
        assert not one.welcome.trees
        one.inbox[0] = asyncio.Queue()
        await one.send(protocol.Open(0, [1, 2, 3], MAX_NEW))
        commit = await one.inbox[0].get()
        assert isinstance(commit, protocol.Commit)
        await one.send(protocol.Draft(0, 1, commit.committed_len, [1, 2], bytes(2), 1.0, 50.0, b"\0\0"))
        problem = await one.inbox[0].get()
        assert isinstance(problem, protocol.Problem)
        assert (problem.code, "verifies chains" in problem.message) == ("frame", True)
        # The session goes on with a chain.
        await one.send(protocol.Draft(0, 1, commit.committed_len, [1, 2], bytes(2), 1.0, 50.0))
        assert isinstance(await one.inbox[0].get(), protocol.Commit)
