"""The server's OpenAI API and the edge's give the same answers to the same requests."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
from fake_pair import fake_runtime

from benchmarks.two_endpoints import ask_both, over, same, sample_requests
from wispprof.edge.local_api import make_edge_app
from wispprof.openai_api import ChatTokenizer
from wispprof.openai_api.tokenizer import ByteTokenizer
from wispprof.server.app import make_app
from wispprof.server.engine_client import EngineClient
from wispprof.server.process import running_server
from wispprof.settings.server_settings import ServerSettings
from wispprof.testing.fake_engine import FakeEngine
from wispprof.types import GenerationDefaults


class Added:
    def __init__(self, content: str) -> None:
        self.content, self.special = content, True


class ByteChat(ByteTokenizer):
    """Bytes with a chat template; two ids that no UTF-8 text has are special tokens."""

    added_tokens_decoder = {0xFE: Added("<|bos|>"), 0xFF: Added("<|eos|>")}
    chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ m.tool_calls or '' }}{% endfor %}"

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        names = {added.content: number for number, added in self.added_tokens_decoder.items()}
        parts = re.split(f"({'|'.join(map(re.escape, names))})", text)
        return [n for part in parts for n in ([names[part]] if part in names else part.encode())]

    def decode(self, tokens: Any, skip_special_tokens: bool = False, **_: object) -> str:
        out = b""
        for token in tokens:
            added = self.added_tokens_decoder.get(token)
            out += bytes([token]) if added is None else b"" if skip_special_tokens else added.content.encode()
        return out.decode("utf-8", "replace")

    def apply_chat_template(self, messages: list[Any], **options: Any) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        options.pop("tokenize")
        return str(render_jinja_template([messages], **options)[0][0])


class OtherTemplate(ByteChat):
    """A draft model's tokenizer: other template, other end of sequence."""

    chat_template = "another conversation {{ messages[0].content }}"
    eos_token_id = ord("e")


@asynccontextmanager
async def endpoints() -> AsyncIterator[tuple[httpx.AsyncClient, httpx.AsyncClient]]:
    engine = FakeEngine(
        stop_tokens=(0xFF, 0x00),
        chat_template=ByteChat.chat_template,
        defaults=GenerationDefaults(temperature=0.8, top_p=0.9),
    )
    parts: dict[str, Any] = {"tokenizer": ChatTokenizer(ByteChat())}
    settings = ServerSettings(policy="wispprof", admit="all")
    async with running_server(settings, engine=engine, model=engine.served, **parts) as running:
        address = running.split_url
        async with (
            over(make_app(EngineClient.within(running.server))) as server,
            fake_runtime(server=address, tokenizer=OtherTemplate()) as runtime,
            over(make_edge_app(runtime)) as edge,
        ):
            yield server, edge


async def test_the_same_answers_to_the_same_requests() -> None:
    asked = sample_requests(60)
    async with endpoints() as (server, edge):
        answers = await ask_both(server, edge, asked)
    differing = [number for number, pair in enumerate(answers) if not same(*pair)]
    assert not differing, (asked[differing[0]], *answers[differing[0]])
    statuses = [one["status"] for one, _ in answers]
    assert set(statuses) >= {200, 400}
    assert statuses.count(200) > 45
    choices = [choice for one, _ in answers for choice in one.get("choices", ()) if isinstance(choice, dict)]
    assert {str, int, type(None)} == {type(choice["stop_reason"]) for choice in choices}


async def test_the_targets_defaults_template_and_stop_tokens_reach_both() -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}], "seed": 4, "max_tokens": 200}
    chat["return_token_ids"] = True
    async with endpoints() as (server, edge):
        answers = []
        for client in (server, edge):
            whole = (await client.post("/v1/chat/completions", json=chat)).json()
            given = {**chat, "temperature": 0.8, "top_p": 0.9}
            named = (await client.post("/v1/chat/completions", json=given)).json()
            assert named["choices"] == whole["choices"]
            answers.append(whole["choices"])
    assert answers[0] == answers[1]
    assert bytes(answers[0][0]["prompt_token_ids"]) == b"[user]hi"
    assert answers[0][0]["token_ids"][-1] in (0xFF, 0x00)
    assert answers[0][0]["finish_reason"] == "stop"
