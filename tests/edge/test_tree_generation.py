"""Draft trees from the draft model to the user: the target's own text, and more of it a round."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fake_pair import drafting, edge, linear_cost, truth
from fake_tree_drafter import FakeTreeDrafter

from wispprof.artifacts import Manifest, make_profile, save_profile
from wispprof.artifacts.plan import DraftRow
from wispprof.artifacts.rows import EdgeRow
from wispprof.backends import Continuations
from wispprof.drafters.torch_drafter import TorchDrafter
from wispprof.edge import EdgeClient, Generation, GenerationRequest, TimedWorker, websocket_connections
from wispprof.edge.draft_worker import ThreadWorker
from wispprof.edge.edge_runtime import _node_cost
from wispprof.engines.loading import random_model
from wispprof.engines.torch.engine import TorchEngine
from wispprof.policies import make_batch_policy, make_controller
from wispprof.server import running_server
from wispprof.settings.edge_settings import DraftingSettings, EdgeSettings
from wispprof.settings.server_settings import ServerSettings
from wispprof.testing.fake_engine import FakeEngine, FakeTarget
from wispprof.testing.in_process_server import InProcessServer
from wispprof.testing.virtual_time import run_virtual
from wispprof.token_tree import TokenTree
from wispprof.types import ModelInfo, Sampling, ServedModel

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
    assert stats.drafted == stats.accepted + stats.matched + stats.dropped
    assert min(stats.accepted, stats.matched, stats.dropped) >= 0
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


# --- plans and measured speed ---


def planned_row(mode: str, nodes: int) -> DraftRow:
    shape = {"nodes": nodes, "depth": 8, "width": 4, "beams": 4} if nodes else {}
    figures = dict.fromkeys(
        ("expected_tokens_per_s", "slow_tokens_per_s", "round_ms", "step_ms", "commits", "draft_ms"), 10.0
    )
    return DraftRow(
        device="laptop",
        rtt_ms=10.0,
        load_level=0,
        tokens_per_s=4.0,
        mode=mode,
        k=4,
        stop=0.02,
        draft_ahead=8,
        server_tokens_per_ms=0.01,
        feasible=True,
        nearest_tokens_per_s=10.0,
        **figures,
        **shape,
    )


def obeys(mode: str, **options: object) -> Generation:
    """One answer of an edge whose controller and drafter know trees, settings of trees left alone."""

    async def main() -> Generation:
        policy = "wisp" if mode == "round" else "wispprof"
        async with server(policy=policy) as host, edge(host.connect) as client:
            one = Generation(
                client,
                GenerationRequest((1, 2, 3), 60, Sampling(0.8, seed=5)),
                TimedWorker(FakeTreeDrafter(FakeTarget(), 0.6), lambda context: 5.0, node_ms=0.05),
                make_controller("wispprof", stream=mode == "stream", **options),
                DraftingSettings(),
            )
            await one.run()
            return one

    one = run_virtual(main())
    assert list(one.output) == truth((1, 2, 3), 60, Sampling(0.8, seed=5))
    accounts(one)
    return one


@pytest.mark.parametrize("mode", ["round", "stream"])
def test_a_plans_tree_is_drafted_and_its_row_is_named(mode: str) -> None:
    tree = obeys(mode, rows=lambda context: planned_row(mode, 16), node_ms=math.inf)
    chain = obeys(mode, rows=lambda context: planned_row(mode, 0), node_ms=0.05)
    assert tree.stats.trees > 5
    assert chain.stats.trees == 0
    assert tree.stats.plan_row == chain.stats.plan_row == f"laptop/10/0/4/{mode}"
    assert tree.stats.summary()["plan_row"] == f"laptop/10/0/4/{mode}"
    assert tree.stats.rounds < chain.stats.rounds


@pytest.mark.parametrize("mode", ["round", "stream"])
def test_the_measured_cost_of_nodes_decides_without_a_plan(mode: str) -> None:
    assert obeys(mode, node_ms=0.05).stats.trees > 5
    for node_ms in (math.inf, None):
        one = obeys(mode, node_ms=node_ms)
        assert (one.stats.trees, one.stats.plan_row) == (0, "")
    dear = obeys(mode, node_ms=50.0).stats
    if mode == "stream":
        assert dear.trees == 0
    else:  # the siblings that a forward over a single node finds are free
        assert len(dear.offered_by_position) == 1


def test_the_profile_of_a_device_says_what_nodes_cost(tmp_path: Path) -> None:
    file = tmp_path / "pi.jsonl"
    rows = [EdgeRow("s", "draft_step", 100, (4.0,))]
    rows += [EdgeRow(f"n{n}", "nodes", 100, (4.0 + 0.5 * n,), tokens=n) for n in (1, 4)]
    save_profile(make_profile(Manifest("edge", ModelInfo("draft", tokenizer_hash="hash")), rows), file)
    assert _node_cost(EdgeSettings(profile=file)) == {"node_ms": pytest.approx(0.5)}
    assert _node_cost(EdgeSettings(plan=file)) == {"node_ms": math.inf}
    assert _node_cost(EdgeSettings()) == {}


# --- asynchronous trees ---


@pytest.mark.parametrize("policy", ["wispprof", "fcfs", "sled", "specedge", "wisp", "server-only"])
def test_trees_beside_chains_under_every_policy(policy: str) -> None:
    settings = DraftingSettings(tree_nodes=24, tree_width=3, proactive=8, draft_ahead=24)

    async def main() -> list[Generation]:
        async with server(policy=policy) as host, edge(host.connect) as client:
            found = [with_trees(client, (n, 2, 3), settings, Sampling(1.0, seed=n)) for n in range(4)]
            found += [drafting(client, (n, 2, 3), sampling=Sampling(1.0, seed=n)) for n in range(4, 7)]
            await asyncio.gather(*(one.run() for one in found))
            return found

    found = run_virtual(main())
    for number, one in enumerate(found):
        length = 60 if number < 4 else 48
        assert list(one.output) == truth((number, 2, 3), length, Sampling(1.0, seed=number))
        accounts(one)
    assert all(one.stats.trees > 5 for one in found[:4])


# --- models ---


@pytest.mark.parametrize(
    ("policy", "sampling"),
    [*(("wisp", sampling) for sampling in SAMPLINGS), ("wispprof", SAMPLINGS[1])],
    ids=["greedy", "0.8", "1", "asynchronous"],
)
async def test_models_say_the_same_with_trees(policy: str, sampling: Sampling) -> None:
    """Trees, chains and prompts in the steps of one server; the draft is the target with some noise."""
    target, draft = random_model("tiny-llama", seed=3), random_model("tiny-llama", seed=3)
    for weights in draft.model.parameters():
        weights.data += 0.1 * weights.std() * weights.new_tensor(1.0).sin()
    engine = TorchEngine(target, kv_tokens=4096, max_sessions=32)
    model = ServedModel("tiny", target.info.tokenizer_hash, target.info.vocab_size, engine.max_context)
    prompts = [tuple((5 * i + n) % 90 for i in range(3 + 4 * n)) for n in range(5)]
    settings = ServerSettings(policy=policy, admit="all", prefill_chunk=8)

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
    if policy == "wisp":  # else a step takes no longer than a draft: how many are in time is chance
        assert sum(one.stats.accepted for one in found) > 20
