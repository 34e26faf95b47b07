"""Answers of a server and an edge that start for them, with a given draft."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from wispprof.edge import EdgeClient, websocket_connections
from wispprof.edge.draft_device import DraftDevice
from wispprof.edge.edge_runtime import EdgeRuntime, Prompt
from wispprof.engines.tokenizers import tokenizer_hash
from wispprof.server.process import running_server
from wispprof.settings.edge_settings import ClientSettings, EdgeSettings
from wispprof.settings.server_settings import ServerSettings
from wispprof.types import Sampling

TOKENS, LEAST = 100, 40
"""Length of an answer. With a temperature, the few drafts of a very short one may all be wrong."""


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


async def answer(
    runtime: EdgeRuntime, question: str, sampling: Sampling, tokens_wanted: int
) -> tuple[list[int], Any]:
    tokens = runtime.tokenizer.chat([{"role": "user", "content": question}])
    stop = runtime.tokenizer.stop_tokens
    sampling = replace(sampling, min_length=len(tokens) + min(LEAST, tokens_wanted), stop_tokens=stop)
    reply = runtime.reply(Prompt(tokens, tokens_wanted, sampling))
    async for _ in reply.stream():
        pass
    return reply.tokens, reply.stats


async def answers(
    folder: Path,
    device: DraftDevice,
    tokenizer: Any,
    sampling: Sampling,
    questions: Sequence[str],
    at_once: int = 1,
    *,
    policy: str = "wispprof",
    tokens: int = TOKENS,
) -> list[tuple[list[int], Any]]:
    """Answers to the questions, ``at_once`` at a time, from a server that starts for them."""
    # Server and device share the cores of one machine: one more process would only wait for one.
    served = ServerSettings(target=str(folder), policy=policy, admit="all", device="cpu", in_process=True)
    client_settings = ClientSettings(tokenizer=tokenizer_hash(tokenizer))
    limit = asyncio.Semaphore(at_once)
    async with (
        running_server(served) as server,
        EdgeClient(websocket_connections(server.split_url), client_settings) as client,
    ):
        runtime = EdgeRuntime(EdgeSettings(), tokenizer, device, client)

        async def one(question: str) -> tuple[list[int], Any]:
            async with limit:
                return await answer(runtime, question, sampling, tokens)

        try:
            return await asyncio.gather(*map(one, questions))
        finally:
            device.close()
