"""The fake model pair: its traces, a linear step cost, an in-process server, edges and generations."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import numpy as np
from fake_tree_drafter import FakeTreeDrafter

from wispprof.artifacts.rows import AcceptanceTrace, TracePath
from wispprof.backends import Drafter
from wispprof.drafters import make_drafter, needs_model
from wispprof.drafters.lookup_first import LookupFirst
from wispprof.drafters.ngram import LookupDrafter
from wispprof.edge import (
    ConnectionFactory,
    EdgeClient,
    Generation,
    GenerationRequest,
    TimedWorker,
    websocket_connections,
)
from wispprof.edge.draft_device import DraftDevice
from wispprof.edge.edge_runtime import EdgeRuntime
from wispprof.policies import make_batch_policy, make_controller
from wispprof.policies.linear_cost import LinearCost
from wispprof.server.process import running_server
from wispprof.settings.edge_settings import ClientSettings, DraftingSettings, EdgeSettings
from wispprof.settings.server_settings import ServerSettings
from wispprof.testing.fake_engine import FakeDrafter, FakeEngine, FakeTarget
from wispprof.testing.in_process_server import InProcessServer
from wispprof.token_tree import ROOT, TokenTree
from wispprof.types import Sampling


def linear_cost(fixed_ms: float = 8.0) -> LinearCost:
    """Step time of the fake engine."""
    return LinearCost(fixed_ms, row_ms=0.3, kv_ms=0.001)


def in_process(policy: str = "fcfs", cost: LinearCost | None = None, **options: object) -> InProcessServer:
    """A server of the hash target; enter it with ``async with``."""
    return InProcessServer(
        FakeEngine(trees=True), make_batch_policy(policy, **options), cost or linear_cost()
    )


def truth(prompt: Sequence[int], count: int, sampling: Sampling | None = None) -> list[int]:
    return FakeTarget().generate(prompt, count, sampling or Sampling())


def drafting(
    client: EdgeClient,
    prompt: Sequence[int],
    *,
    max_new: int = 48,
    k: int = 4,
    accuracy: float = 0.8,
    draft_ms: float = 5.0,
    proactive: int = 0,
    draft_ahead: int = 24,
    sampling: Sampling | None = None,
    controller: str = "fixed",
    fallback: bool = False,
    **options: object,
) -> Generation:
    """A drafting generation of the hash target's text."""
    request = GenerationRequest(tuple(prompt), max_new, sampling or Sampling())
    worker = TimedWorker(FakeDrafter(FakeTarget(), accuracy), lambda context: draft_ms)
    if controller == "fixed":
        options["k"] = k
    return Generation(
        client,
        request,
        worker,
        make_controller(controller, **options),
        DraftingSettings(draft_ahead=draft_ahead, proactive=proactive),
        fallback=fallback,
    )


def plain(client: EdgeClient, prompt: Sequence[int], max_new: int = 48) -> Generation:
    """A server-only generation."""
    return Generation(client, GenerationRequest(tuple(prompt), max_new))


def edge(connect: ConnectionFactory, **settings: object) -> EdgeClient:
    return EdgeClient(connect, ClientSettings(**settings))  # type: ignore[arg-type]


def hash_trace(
    paths: int = 4, length: int = 40, depth: int = 6, accuracy: float = 0.75, ranks: bool = False
) -> AcceptanceTrace:
    """The acceptance trace that profiling would record of the hash pair; with ``ranks``, for draft trees."""
    target = FakeTarget()
    trees = FakeTreeDrafter(target, accuracy)
    made = []
    for number in range(paths):
        prompt = tuple((number * 31 + i * 7) % 256 for i in range(5 + number))
        path = tuple(target.generate(prompt, length))
        drafter = FakeDrafter(target, accuracy)
        drafts = np.zeros((length, depth), dtype=np.int32)
        features = np.zeros((length, depth, 4), dtype=np.float32)
        accepted = np.zeros(length, dtype=np.int32)
        target_ranks, probs = np.zeros(length, dtype=np.int32), np.zeros((length, 6), dtype=np.float32)
        for row in range(length):
            drafter.open((*prompt, *path[:row]), Sampling())
            trees.open((*prompt, *path[:row]), Sampling())
            [after] = trees.expand(TokenTree(), [ROOT], 6)
            tokens = [candidate.token for candidate in after.candidates]
            target_ranks[row] = tokens.index(path[row]) if path[row] in tokens else len(tokens)
            probs[row] = [accuracy, *((1.0 - accuracy) / 2.0**rank for rank in range(1, 6))]
            good = True
            for place in range(depth):
                drafted = drafter.draft()
                drafts[row, place] = drafted.token
                features[row, place] = drafted.features
                good = good and row + place < length and drafted.token == path[row + place]
                accepted[row] += good
            if ranks:  # features that do not give the rank away
                features[row] = after.features._replace(confidence=accuracy)
        of_trees = (target_ranks, probs) if ranks else ()
        made.append(TracePath(prompt, path, drafts, features, accepted, *of_trees))
    return AcceptanceTrace("hash", "hash-draft", "", Sampling(), tuple(made))


class Letters:
    """Token ``t`` is the t-th letter from a table of 256 visible characters."""

    eos_token_id = None
    chat_template = None
    is_fast = False
    added_tokens_decoder: dict[int, object] = {}
    table = [chr(0x100 + n) for n in range(256)]

    def get_vocab(self) -> dict[str, int]:
        return {letter: n for n, letter in enumerate(self.table)}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [self.table.index(c) if c in self.table else ord(c) % 256 for c in text]

    def decode(self, tokens: list[int], **_: object) -> str:
        return "".join(self.table[token] for token in tokens)


class HashDevice(DraftDevice):
    """A device whose model is the hash drafter."""

    def _make(self) -> Drafter:
        if not needs_model(self.kind) and self.kind != "trees":
            return make_drafter(self.kind)
        drafter = (FakeDrafter if self.kind != "trees" else FakeTreeDrafter)(FakeTarget(), 0.8)
        return drafter if self.kind in ("model", "trees") else LookupFirst(LookupDrafter(), drafter)


LETTERS = Letters()


def text_of(prompt: str, count: int, sampling: Sampling | None = None) -> str:
    return LETTERS.decode(truth(LETTERS.encode(prompt), count, sampling))


@asynccontextmanager
async def fake_runtime(
    kind: str = "model", policy: str = "wispprof", server: str = "", tokenizer: object = LETTERS
) -> AsyncIterator[EdgeRuntime]:
    """An edge of the hash pair, ready to answer; without ``server`` it gets one of its own."""
    async with AsyncExitStack() as stack:
        if not server:
            engine = FakeEngine(trees=True)
            settings = ServerSettings(policy=policy, admit="all")
            own = running_server(settings, engine=engine, model=engine.served)
            server = (await stack.enter_async_context(own)).split_url
        device = HashDevice(kind, "fixed", {"k": 3}, loaded=object())
        stack.callback(device.close)
        connect = websocket_connections(server)
        client = await stack.enter_async_context(edge(connect, backoff_ms=5.0))
        drafting = DraftingSettings(tree_nodes=16) if kind == "trees" else DraftingSettings()
        yield EdgeRuntime(EdgeSettings(drafter=kind, drafting=drafting), tokenizer, device, client)
