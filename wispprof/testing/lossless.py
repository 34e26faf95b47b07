"""The proof that split decoding changes nothing: every token over a real server, against the target alone.

For any pair. Greedy output is compared with transformers' own ``generate``; sampled output with the
undrafted run of the same seed, for draft lengths, policies and batches of several sizes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from wispprof.backends import Engine
from wispprof.edge import (
    EdgeClient,
    Generation,
    GenerationRequest,
    ThreadWorker,
    websocket_connections,
)
from wispprof.policies import make_controller
from wispprof.server import running_server
from wispprof.settings.edge_settings import DraftingSettings
from wispprof.settings.server_settings import ServerSettings
from wispprof.types import Sampling, ServedModel


@dataclass(frozen=True, slots=True)
class Case:
    """One run: draft length ``k`` (0: undrafted), sessions at a time, batching policy, sampling.

    With ``tree_nodes`` two sessions of three draft trees of so many nodes, in the policy's mode.
    """

    k: int
    sessions: int
    policy: str = "wispprof"
    sampling: Sampling = field(default_factory=Sampling)
    tree_nodes: int = 0

    def drafting(self, number: int) -> DraftingSettings:
        """Settings of session ``number``."""
        nodes = self.tree_nodes if number % 3 else 0
        return DraftingSettings(draft_ahead=2 * self.k, proactive=self.k, tree_nodes=nodes)


@dataclass(frozen=True, slots=True)
class Verdict:
    """``wrong``: prompts whose text differs; ``first``: (prompt, token) of the first difference."""

    prompts: int
    tokens: int
    wrong: int
    first: tuple[int, int] | None

    @property
    def lossless(self) -> bool:
        return self.wrong == 0


def compare(found: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]) -> Verdict:
    """Token-for-token comparison, lengths included. Raises ``ValueError`` on unequal counts."""
    if len(found) != len(wanted):
        raise ValueError(f"{len(found)} outputs cannot be compared with {len(wanted)}")
    wrong, first = 0, None
    for number, (mine, theirs) in enumerate(zip(found, wanted, strict=True)):
        if list(mine) == list(theirs):
            continue
        wrong += 1
        if first is None:
            agreed = [a == b for a, b in zip(mine, theirs, strict=False)]
            first = (number, agreed.index(False) if False in agreed else len(agreed))
    return Verdict(len(wanted), sum(len(w) for w in wanted), wrong, first)


def generate_alone(
    model: Any, prompts: Sequence[Sequence[int]], max_new: int, stop: Sequence[int] = ()
) -> list[list[int]]:
    """Greedy continuations by transformers' ``generate``, one prompt at a time, ended by ``stop``."""
    import torch
    from transformers import GenerationConfig

    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max_new, do_sample=False, eos_token_id=list(stop) or None, pad_token_id=0
    )
    own, model.generation_config = model.generation_config, config
    try:
        out = []
        for prompt in prompts:
            ids = torch.tensor([list(prompt)], device=model.device)
            with torch.inference_mode():
                full = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
            out.append(full[0, len(prompt) :].tolist())
        return out
    finally:
        model.generation_config = own


async def split_outputs(
    engine: Engine,
    model: ServedModel,
    drafter: Callable[[], Any] | None,
    prompts: Sequence[Sequence[int]],
    max_new: int,
    case: Case,
    stop: Sequence[int] = (),
) -> list[list[int]]:
    """What edges get for ``prompts`` from a server over a real WebSocket.

    ``drafter`` makes a :class:`~wispprof.backends.Drafter` per session (not needed for k = 0). Every cache
    is audited afterwards; :class:`~wispprof.errors.EngineError` where one is not what it should be.
    """
    settings = ServerSettings(policy=case.policy, admit="all", prefix_cache_sessions=4)
    out: list[list[int]] = [[] for _ in prompts]
    waiting = asyncio.Semaphore(case.sessions)
    with ThreadPoolExecutor(1, thread_name_prefix="draft") as executor:
        async with running_server(settings, engine=engine, model=model) as running:
            async with EdgeClient(websocket_connections(running.split_url)) as client:

                async def one(number: int) -> None:
                    async with waiting:
                        drafting = case.k > 0 and drafter is not None
                        generation = Generation(
                            client,
                            GenerationRequest(
                                tuple(prompts[number]),
                                max_new,
                                sampling=case.sampling,
                                stop_tokens=tuple(stop),
                            ),
                            ThreadWorker(drafter(), executor) if drafting and drafter else None,
                            make_controller("fixed", k=case.k) if drafting else None,
                            case.drafting(number),
                        )
                        await generation.run()
                        out[number] = list(generation.output)

                async with asyncio.TaskGroup() as group:
                    for number in range(len(prompts)):
                        group.create_task(one(number))
            while len(running.server.manager):
                await asyncio.sleep(0.001)
            await running.server.check_integrity()
    return out
