"""Draft trees from the draft model to the user: the target's own text, and more of it a round."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from fake_pair import drafting, edge, linear_cost, truth
from fake_tree_drafter import FakeTreeDrafter

from wispprof.backends import Continuations
from wispprof.drafters.torch_drafter import TorchDrafter
from wispprof.edge import EdgeClient, Generation, GenerationRequest, TimedWorker, websocket_connections
from wispprof.edge.draft_worker import ThreadWorker
from wispprof.engines.loading import random_model
from wispprof.engines.torch.engine import TorchEngine
from wispprof.policies import make_batch_policy, make_controller
from wispprof.server import running_server
from wispprof.settings.edge_settings import DraftingSettings
from wispprof.settings.server_settings import ServerSettings
from wispprof.testing.fake_engine import FakeEngine, FakeTarget
from wispprof.testing.in_process_server import InProcessServer
from wispprof.testing.virtual_time import run_virtual
from wispprof.token_tree import TokenTree
from wispprof.types import Sampling, ServedModel

TREES = DraftingSettings(tree_nodes=12, tree_width=3, tree_beams=4, proactive=0)
SAMPLINGS = [Sampling(), Sampling(0.8, seed=5), Sampling(1.0, seed=6)]


def server(trees: bool = True, policy: str = "wisp") -> InProcessServer:
    return InProcessServer(FakeEngine(trees=trees), make_batch_policy(policy), linear_cost())


def with_trees(
    client: EdgeClient,
    prompt: Sequence[int],
    settings: DraftingSettings = TREES,
    sampling: Sampling | None = None,
    drafter: FakeTreeDrafter | None = None,
) -> Generation:
    request = GenerationRequest(tuple(prompt), 60, sampling or Sampling())
    worker = TimedWorker(drafter or FakeTreeDrafter(FakeTarget(), 0.6), lambda context: 5.0)
    return Generation(client, request, worker, make_controller("fixed", k=6), settings)


def accounts(generation: Generation) -> None:
    """Every node was committed or dropped."""
    stats = generation.stats
    assert stats.accepted <= stats.verified_drafts <= stats.sent
    assert stats.drafted - stats.dropped <= stats.tokens
    assert stats.dropped <= stats.drafted
    assert 0.0 <= stats.wasted_ms <= stats.dropped_ms <= stats.draft_ms + 1e-6
    assert not stats.draft_fault


@pytest.mark.parametrize("proactive", [0, 8])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "0.8", "1"])
def test_trees_commit_more_a_round_than_chains(proactive: int, sampling: Sampling) -> None:
    settings = DraftingSettings(tree_nodes=12, tree_width=3, tree_beams=4, proactive=proactive)

    async def main() -> list[Generation]:
        async with server() as host, edge(host.connect) as client:
            found = [
                with_trees(client, (1, 2, 3), settings, sampling),
                with_trees(client, (1, 2, 3), DraftingSettings(proactive=proactive), sampling),
                drafting(client, (7, 8), sampling=sampling),
            ]
            await asyncio.gather(*(one.run() for one in found))
            return found

    tree, chain, beside = run_virtual(main())
    for one in (tree, chain):
        assert list(one.output) == truth((1, 2, 3), 60, sampling)
        accounts(one)
    assert list(beside.output) == truth((7, 8), 48, sampling)
    assert tree.stats.accepted_per_round > chain.stats.accepted_per_round
    assert tree.stats.rounds < chain.stats.rounds
    assert len(tree.stats.offered_by_position) <= 6 + proactive
    if proactive:
        assert tree.stats.proactive_hits > 0


def test_a_server_of_chains_gets_chains() -> None:
    async def main() -> Generation:
        async with server(trees=False) as host, edge(host.connect) as client:
            one = with_trees(client, (1, 2, 3))
            await one.run()
            return one

    one = run_virtual(main())
    assert list(one.output) == truth((1, 2, 3), 60)
    assert one.stats.verified_drafts == sum(one.stats.offered_by_position)
    accounts(one)


@pytest.mark.parametrize("policy", ["wisp", "wispprof"])
def test_a_lost_link_or_another_server_costs_no_token(policy: str) -> None:
    async def main() -> Generation:
        async with server() as first, server(trees=policy == "wisp", policy=policy) as second:
            hosts = [first, second]

            async def connect():
                return await hosts[0].connect()

            async with edge(connect, backoff_ms=1.0, backoff_max_ms=1.0) as client:
                one = with_trees(client, (1, 2, 3), DraftingSettings(tree_nodes=12, proactive=8))
                running = asyncio.create_task(one.run())
                while one.buffer.committed_len < 20:
                    await asyncio.sleep(0.001)
                hosts.pop(0).cut()
                await running
                return one

    one = run_virtual(main())
    assert list(one.output) == truth((1, 2, 3), 60)
    assert one.stats.reopened > 0
    accounts(one)


class Failing(FakeTreeDrafter):
    def expand(self, tree: TokenTree, nodes: Sequence[int], width: int) -> list[Continuations]:
        if self.forwards == 5:
            raise RuntimeError("the device is gone")
        return super().expand(tree, nodes, width)


def test_a_failing_drafter_ends_drafting_alone() -> None:
    async def main() -> Generation:
        async with server() as host, edge(host.connect) as client:
            one = with_trees(client, (1, 2, 3), drafter=Failing(FakeTarget(), 0.6))
            await one.run()
            return one

    one = run_virtual(main())
    assert list(one.output) == truth((1, 2, 3), 60)
    assert "the device is gone" in one.stats.draft_fault


# --- models ---


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "0.8", "1"])
async def test_models_say_the_same_with_trees(sampling: Sampling) -> None:
    """Trees, chains and prompts in the steps of one server; the draft is the target with some noise."""
    target, draft = random_model("tiny-llama", seed=3), random_model("tiny-llama", seed=3)
    for weights in draft.model.parameters():
        weights.data += 0.1 * weights.std() * weights.new_tensor(1.0).sin()
    engine = TorchEngine(target, kv_tokens=4096, max_sessions=32)
    model = ServedModel("tiny", target.info.tokenizer_hash, target.info.vocab_size, engine.max_context)
    prompts = [tuple((5 * i + n) % 90 for i in range(3 + 4 * n)) for n in range(5)]
    settings = ServerSettings(policy="wisp", admit="all", prefill_chunk=8)

    async def outputs(drafts: bool) -> list[Generation]:
        async with EdgeClient(websocket_connections(running.split_url)) as client:
            found = [
                Generation(
                    client,
                    GenerationRequest(prompt, 20, sampling),
                    ThreadWorker(TorchDrafter(draft), executor) if drafts else None,
                    make_controller("fixed", k=4) if drafts else None,
                    TREES if number % 3 else DraftingSettings(),
                )
                for number, prompt in enumerate(prompts)
            ]
            await asyncio.gather(*(one.run() for one in found))
        while len(running.server.manager):
            await asyncio.sleep(0.001)
        await running.server.check_integrity()
        return found

    with ThreadPoolExecutor(1) as executor:
        async with running_server(settings, engine=engine, model=model) as running:
            alone, found = await outputs(False), await outputs(True)
    assert [one.output for one in found] == [one.output for one in alone]
    for one in found:
        accounts(one)
    assert sum(one.stats.accepted for one in found) > 20
