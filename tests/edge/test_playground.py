"""The playground's stream: how each token came, drafting switched, faults told. Its page: tests/pages."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from fake_pair import fake_runtime, text_of

from wispprof.edge.local_api import make_edge_app
from wispprof.edge.round_record import ACCEPTED, MATCHED, TARGET, TokenOrigin, held_by, likeliest, origins
from wispprof.pages import CONTENT_SECURITY_POLICY, page_files
from wispprof.server.process import running_server
from wispprof.server.web_server import WebServer, bind
from wispprof.sessions.draft_buffer import CommitEffect, DraftBuffer
from wispprof.settings.server_settings import ServerSettings
from wispprof.testing.fake_engine import FakeEngine

Events = list[tuple[str, dict[str, Any]]]


def body(text: str, most: int = 60, **more: object) -> dict[str, object]:
    ask = [{"role": "user", "content": text}]
    return {"messages": ask, "temperature": 0, "max_tokens": most, **more}


@asynccontextmanager
async def playground(kind: str = "model", step_ms: float = 2.0) -> AsyncIterator[httpx.AsyncClient]:
    """The local API of an edge, over a socket: events arrive as they are sent."""
    engine = FakeEngine(step_ms=lambda shape: step_ms, trees=True)
    settings = ServerSettings(admit="all")
    async with (
        running_server(settings, engine=engine, model=engine.served) as running,
        fake_runtime(kind, server=running.split_url) as runtime,
    ):
        listener = bind("127.0.0.1", 0)
        web_server = WebServer(make_edge_app(runtime), listener)
        serving = asyncio.create_task(web_server.serve())
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            async with httpx.AsyncClient(base_url=url) as http:
                yield http
        finally:
            web_server.request_exit()
            await serving


async def events(response: httpx.Response) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    name = ""
    async for line in response.aiter_lines():
        if line.startswith("event: "):
            name = line[7:]
        elif line.startswith("data: "):
            yield name, json.loads(line[6:])


async def chat(http: httpx.AsyncClient, asked: dict[str, object], query: str = "") -> Events:
    async with http.stream("POST", f"/playground/chat{query}", json=asked) as response:
        return [event async for event in events(response)]


def tokens(found: Events) -> list[dict[str, Any]]:
    return [token for name, data in found if name == "round" for token in data["tokens"]]


async def test_the_stream_tells_how_each_token_came() -> None:
    async with playground() as http:
        found = await chat(http, body("hello", logprobs=True, top_logprobs=2))
        assert [found[0][0], found[-1][0]] == ["start", "end"]
        assert found[0][1]["id"].startswith("chatcmpl-")
        made = tokens(found)
        assert "".join(token["text"] for token in made) == text_of("hello", 60)
        counts = {
            kind: sum(token["origin"] == kind for token in made) for kind in (ACCEPTED, MATCHED, TARGET)
        }
        assert sum(counts.values()) == len(made) == 60
        stats = found[-1][1]["stats"]
        assert counts[ACCEPTED] == stats["accepted"] > 10
        for token in made:
            assert ("acceptance_prob" in token) >= (token["origin"] == ACCEPTED)
            assert len(token["top"]) == 2
            assert 0 < token["prob"] <= 1
        wrong = [token for token in made if "draft" in token]
        assert wrong
        assert all(token["origin"] == TARGET and token["draft"] != token["text"] for token in wrong)
        rounds = [data for name, data in found if name == "round"]
        assert all(one["accepted"] <= one["drafted"] for one in rounds)
        assert sum(one["round_ms"] for one in rounds) == pytest.approx(rounds[-1]["at_ms"], abs=1.0)
        assert sum(one["draft_ms"] for one in rounds) <= stats["draft_ms"] + 0.01 * len(rounds)


async def test_tokens_of_trees_come_with_their_alternatives() -> None:
    async with playground("trees", step_ms=5.0) as http:
        found = await chat(http, body("hello"))
        made = tokens(found)
        assert "".join(token["text"] for token in made) == text_of("hello", 60)
        stats = found[-1][1]["stats"]
        assert stats["trees"] > 3
        accepted = [token for token in made if token["origin"] == ACCEPTED]
        assert len(accepted) == stats["accepted"] > 10
        assert all(0 < token["acceptance_prob"] <= 1 for token in accepted)
        beside = [token for token in made if token.get("alternatives")]
        assert len(beside) > 10
        for token in beside:
            probs = [prob for _, prob in token["alternatives"]]
            assert probs == sorted(probs, reverse=True)
            assert token["text"] not in [text for text, _ in token["alternatives"]]
        assert any(data["pending"] for name, data in found if name == "round")


async def test_drafting_is_switched_while_it_writes() -> None:
    async with playground() as http:
        seen: Events = []
        wanted = {12: False, 40: True}
        async with http.stream("POST", "/playground/chat", json=body("switch", 120)) as response:
            async for name, data in events(response):
                seen.append((name, data))
                so_far = len(tokens(seen))
                for at in [at for at in wanted if so_far >= at]:
                    switch = {"id": seen[0][1]["id"], "drafting": wanted.pop(at)}
                    answer = await http.post("/playground/drafting", json=switch)
                    assert answer.json() == switch
        assert "".join(token["text"] for token in tokens(seen)) == text_of("switch", 120)
        drafting = [data["drafting"] for name, data in seen if name == "round"]
        assert [drafting[0], drafting[-1]] == [True, True]
        assert drafting.count(False) > 4
        alone = [data for name, data in seen if name == "round" and not data["drafting"]]
        assert all(data["accepted"] == 0 for data in alone[2:])
        after = seen[-1][1]["stats"]
        assert after["reopened"] == 2
        gone = await http.post("/playground/drafting", json={"id": seen[0][1]["id"], "drafting": False})
        assert gone.status_code == 404


async def test_it_can_begin_without_drafts() -> None:
    async with playground() as http:
        found = await chat(http, body("alone", 20), "?drafting=false")
        assert "".join(token["text"] for token in tokens(found)) == text_of("alone", 20)
        assert {token["origin"] for token in tokens(found)} == {TARGET}
        stats = found[-1][1]["stats"]
        assert (stats["sent"], stats["drafting"]) == (0, False)
        assert "drafting was off" in stats["draft_note"]


async def test_an_edge_without_a_draft_model_answers_too() -> None:
    async with playground("none") as http:
        found = await chat(http, body("none", 8))
        assert "".join(token["text"] for token in tokens(found)) == text_of("none", 8)
        status = (await http.get("/playground/status")).json()
        assert status["drafter"] == "none"
        assert status["energy"] is False


async def test_stop_strings_end_the_text_here_too() -> None:
    async with playground() as http:
        whole = text_of("hello", 40)
        found = await chat(http, body("hello", 40, stop=whole[20:22]))
        text = "".join(token["text"] for token in tokens(found))
        text += "".join(data["text"] for name, data in found if name == "text")
        assert text == whole[:20]
        assert found[-1][1]["finish_reason"] == "stop"


async def test_what_is_wrong_is_refused_in_openai_s_format() -> None:
    async with playground() as http:
        for path, sent in (
            ("/playground/chat", body("x", n=2)),
            ("/playground/chat", {"messages": "no"}),
            ("/playground/drafting", {"id": 3}),
        ):
            response = await http.post(path, json=sent)
            assert response.status_code == 400
            assert response.json()["error"]["message"]


async def test_a_client_that_leaves_ends_its_generation() -> None:
    async with playground(step_ms=10.0) as http:
        async with http.stream("POST", "/playground/chat", json=body("leave", 2000)) as response:
            async for name, data in events(response):
                if name == "start":
                    number = data["id"]
                if name == "round":
                    break
        for _ in range(200):
            switch = {"id": number, "drafting": False}
            if (await http.post("/playground/drafting", json=switch)).status_code == 404:
                break
            await asyncio.sleep(0.01)
        else:
            pytest.fail("the answer is still being written")


async def test_pages_are_files_under_a_strict_policy() -> None:
    assert {"playground.html", "server.html", "theme.css", "dom.js"} <= page_files().keys()
    async with playground("none") as http:
        page = await http.get("/")
        assert page.headers["content-security-policy"] == CONTENT_SECURITY_POLICY
        assert "unsafe" not in CONTENT_SECURITY_POLICY
        again = await http.get("/", headers={"if-none-match": page.headers["etag"]})
        assert again.status_code == 304
        script = await http.get("/pages/playground.js")
        assert script.headers["content-type"].startswith("text/javascript")
        for path in (
            "/pages/none.js",
            "/pages/../__init__.py",
            "/pages/__init__.py",
            "/pages/%2e%2e%2fapp.py",
        ):
            assert (await http.get(path)).status_code == 404
        foreign = await http.post(
            "/playground/chat", json=body("x"), headers={"origin": "http://evil.example"}
        )
        assert foreign.status_code == 403


def test_origins_of_a_commit() -> None:
    def commit(held: list[int], committed: list[int], accepted: int, drafted: int) -> list[TokenOrigin]:
        buffer = DraftBuffer([0], stream=True)
        for place, token in enumerate(held):
            buffer.propose(token, 0.5 + place / 10)
        before = buffer.drafts
        effect = buffer.on_commit(1 + len(committed), committed, accepted, drafted)
        return list(origins(effect, before, drafted))

    assert commit([7, 8], [7, 8, 9], 2, 2) == [
        TokenOrigin(ACCEPTED, 0.5), TokenOrigin(ACCEPTED, 0.6), TokenOrigin(TARGET),
    ]  # fmt: skip
    assert commit([7, 8, 9], [7, 5], 1, 2) == [TokenOrigin(ACCEPTED, 0.5), TokenOrigin(TARGET, 0.6, 8)]
    assert commit([7, 8], [7, 8], 1, 1) == [TokenOrigin(ACCEPTED, 0.5), TokenOrigin(MATCHED)]
    assert commit([7], [3], 0, 0) == [TokenOrigin(TARGET, None, 7)]
    assert commit([], [3], 0, 0) == [TokenOrigin(TARGET)]


def test_origins_of_a_tree() -> None:
    """7 or 5 or 6, after 7 again 8 or 9, of which 6 and 9 were not sent."""
    buffer = DraftBuffer([0], stream=True)
    tree = buffer.begin_tree().tree
    for parent, token, prob in ((-1, 5, 0.2), (-1, 7, 0.5), (-1, 6, 0.1), (1, 8, 0.6), (1, 9, 0.3)):
        tree.add(parent, token, prob)
    buffer.tree._draft_ms = [1.0] * 5
    assert likeliest(buffer) == [7, 8]
    buffer.take_tree([1, 3, 0])

    def commit(committed: list[int], accepted: int) -> list[TokenOrigin]:
        held, effect = held_by(buffer), CommitEffect(tuple(committed), accepted=accepted)
        return list(origins(effect, held, 3))

    first = TokenOrigin(ACCEPTED, 0.5, None, ((5, 0.2),))
    assert commit([7, 8, 4], 2) == [first, TokenOrigin(ACCEPTED, 0.6), TokenOrigin(TARGET)]
    assert commit([7, 4], 1) == [first, TokenOrigin(TARGET, 0.6, 8)]
    assert commit([7, 9], 1) == [first, TokenOrigin(MATCHED, None, None, ((8, 0.6),))]
    assert commit([3], 0) == [TokenOrigin(TARGET, 0.5, 7, ((5, 0.2),))]
