"""The server's OpenAI API and an edge's, asked the same: ``python benchmarks/two_endpoints.py``.

A hundred requests (chats, tool turns, stop strings and tokens, special tokens, Unicode, lists,
several choices, log-probabilities, invalid ones) go to both endpoints of one target, streamed and whole.
Status, text, finish and stop reason, token ids, log-probabilities (within 0.001), counts and errors must be
equal. The edge drafts with the bundled draft model, and once more with n-grams. Prints a table and one JSON
line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
from typing import Any

import httpx

from wispprof.edge.edge_runtime import open_edge
from wispprof.edge.local_api import make_edge_app
from wispprof.server import running_server
from wispprof.server.app import make_app
from wispprof.server.engine_client import EngineClient
from wispprof.settings.edge_settings import EdgeSettings
from wispprof.settings.server_settings import ServerSettings

TEXTS = (
    "def fibonacci(n):\n",
    "class Stack:\n    def __init__(self):\n",
    "import os\n\n\ndef main() -> None:\n    for name in os.listdir('.'):\n",
    "# naïve café: 你好, \N{GRINNING FACE}\N{PARTY POPPER}\n",
    "x = 1",
    "<|bos|>def f():\n    return ",
)
STOPS = ("\n\n", "return", ":", "e", "<|eos|>", "self", " = ", "never to be seen", "é", "\n    ")
TOOL_TURN = (
    {"role": "user", "content": "What is 2 + 2?", "name": "ann"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 2}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "1", "content": "4"},
)
INVALID: tuple[dict[str, Any], ...] = (
    {"model": "other"},
    {"n": 9},
    {"logit_bias": {"1": 5}},
    {"response_format": {"type": "json_object"}},
    {"temperature": 3},
    {"stop": ["x"] * 17},
    {"stop_token_ids": [1 << 40]},
    {"min_tokens": 100, "max_tokens": 10},
    {"max_token": 5},
    {"tokens_per_s": -1},
)


def sample_requests(count: int = 100, seed: int = 0) -> list[tuple[str, dict[str, Any]]]:
    """(path, body) of ``count`` requests; about one in ten is invalid."""
    rng = random.Random(seed)
    return [_body(rng, number) for number in range(count)]


def _body(rng: random.Random, number: int) -> tuple[str, dict[str, Any]]:
    def sometimes(share: float) -> bool:
        return rng.random() < share

    body: dict[str, Any] = {"max_tokens": rng.randrange(1, 40), "seed": rng.randrange(1 << 40)}
    body["temperature"] = rng.choice([0, 0, 0.7, 1.0])
    chat = number % 2 == 0
    if chat:
        messages = [{"role": "user", "content": rng.choice(TEXTS)}]
        if sometimes(0.3):
            messages = [*TOOL_TURN]
        if sometimes(0.3):
            parts = [{"type": "text", "text": text} for text in rng.sample(TEXTS, 2)]
            messages.append({"role": "user", "content": parts})
        body["messages"] = messages
    else:
        text = rng.choice(TEXTS)
        body["prompt"] = rng.choice([text, text, [9, 20, 31], [text, "y"], [[7, 8], [9]]])
        body["echo"] = sometimes(0.2)
    if sometimes(0.5):
        body["stop"] = rng.choice([rng.choice(STOPS), rng.sample(STOPS, rng.randrange(1, 6))])
        body["include_stop_str_in_output"] = sometimes(0.3)
    if sometimes(0.2):
        body["stop_token_ids"] = [rng.randrange(128) for _ in range(8)]
    if sometimes(0.2):
        body["min_tokens"] = min(8, body["max_tokens"])
    if sometimes(0.3):
        body |= {"top_p": rng.choice([0.5, 0.9]), "top_k": rng.choice([-1, 5]), "min_p": rng.choice([0, 0.1])}
    if sometimes(0.3) and not body.get("echo"):
        body |= {"logprobs": True, "top_logprobs": 2} if chat else {"logprobs": rng.choice([0, 3])}
    for name, share in (("ignore_eos", 0.2), ("return_token_ids", 0.3), ("stream", 0.3)):
        if sometimes(share):
            body[name] = True
    if sometimes(0.2):
        body["skip_special_tokens"] = False
    if sometimes(0.2):
        body["n"] = rng.randrange(2, 4)
    if sometimes(0.1):
        body |= rng.choice(INVALID)
    return ("/v1/chat/completions" if chat else "/v1/completions"), body


async def answer(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """All of an answer that must not depend on the endpoint; of a stream, what it adds up to."""
    response = await client.post(path, json=body)
    if response.status_code != 200:
        return {"status": response.status_code, **response.json()}
    if not body.get("stream"):
        whole = response.json()
        counts = {name: count for name, count in whole["usage"].items() if not name.endswith("details")}
        return {"status": 200, "usage": counts, "choices": [_choice(one) for one in whole["choices"]]}
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    events = [json.loads(line) for line in lines if line != "[DONE]"]
    errors = [event for event in events if "error" in event]
    parts: dict[int, list[dict[str, Any]]] = {}
    for event in events:
        for one in event.get("choices", ()):
            parts.setdefault(one["index"], []).append(_choice(one))
    return {
        "status": 200,
        "errors": errors,
        "choices": {index: _joined(found) for index, found in sorted(parts.items())},
    }


def _choice(one: dict[str, Any]) -> dict[str, Any]:
    message = one.get("message") or one.get("delta") or {}
    names = ("index", "logprobs", "finish_reason", "stop_reason", "token_ids", "prompt_token_ids")
    return {"text": one.get("text", message.get("content") or ""), **{name: one.get(name) for name in names}}


def _joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    content = [entry for part in parts if part["logprobs"] for entry in part["logprobs"].get("content", ())]
    tokens = [entry for part in parts if part["logprobs"] for entry in part["logprobs"].get("tokens", ())]
    return {
        "text": "".join(part["text"] for part in parts),
        "ends": [(part["finish_reason"], part["stop_reason"]) for part in parts if part["finish_reason"]],
        "token_ids": [token for part in parts for token in part["token_ids"] or ()],
        "logprobs": [content, tokens],
    }


def same(one: Any, other: Any) -> bool:
    """Equal; log-probabilities as far as they depend on the batch, by the order in which sums are rounded."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=0.0, abs_tol=1e-3)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def over(app: Any) -> httpx.AsyncClient:
    """A client of an application in this process."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost", timeout=300)


async def ask_both(
    server: httpx.AsyncClient, edge: httpx.AsyncClient, asked: list[tuple[str, dict[str, Any]]]
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The server's and the edge's answer to each request."""
    answers = []
    for path, body in asked:
        answers.append(await asyncio.gather(answer(server, path, body), answer(edge, path, body)))
    return [(one, other) for one, other in answers]


async def main(count: int, seed: int) -> int:
    asked = sample_requests(count, seed)
    settings = ServerSettings(target_id="reference-pair", policy="wispprof", admit="all")
    wrong = 0
    async with (
        running_server(settings) as running,
        over(make_app(EngineClient.within(running.server))) as server,
    ):
        for drafter in ("model", "lookup"):
            edge_settings = EdgeSettings(server=running.split_url, drafter=drafter)
            async with open_edge(edge_settings) as runtime, over(make_edge_app(runtime)) as edge:
                answers = await ask_both(server, edge, asked)
            differing = [number for number, pair in enumerate(answers) if not same(*pair)]
            wrong += len(differing)
            print(f"drafter {drafter:8} {count} requests, {len(differing)} answered differently")
            for number in differing:
                print(*map(json.dumps, (asked[number], *answers[number])), sep="\n  ")
    print(json.dumps({"benchmark": "two_endpoints", "requests": count, "seed": seed, "different": wrong}))
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    raise SystemExit(1 if asyncio.run(main(given.count, given.seed)) else 0)
