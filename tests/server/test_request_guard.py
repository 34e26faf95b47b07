"""Key before body, bounded requests, and no way in for web pages."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from wispprof.openai_api import request_guard
from wispprof.openai_api.request_guard import RequestGuard


async def echo(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Answers with the body."""
    message = await receive()
    assert not message["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": message["body"]})


class Reads:
    """A body that counts how much of it was asked for."""

    def __init__(self, *chunks: bytes, length: int | None = None) -> None:
        self.chunks = list(chunks)
        self.taken = 0
        self.length = length

    async def receive(self) -> dict[str, Any]:
        if not self.chunks:
            return {"type": "http.disconnect"}
        self.taken += 1
        body = self.chunks.pop(0)
        return {"type": "http.request", "body": body, "more_body": bool(self.chunks)}


async def ask(
    guard: RequestGuard, body: Reads, path: str = "/v1/completions", **headers: str
) -> tuple[int, bytes]:
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    length = str(body.length).encode() if body.length is not None else None
    encoded.append((b"content-length", length) if length else (b"transfer-encoding", b"chunked"))
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "headers": encoded, "query_string": b""}
    await guard(scope, body.receive, send)
    return (sent[0]["status"], sent[-1]["body"]) if sent else (0, b"")


def keyed(**options: Any) -> RequestGuard:
    return RequestGuard(echo, accepts_key=lambda key: key == "right", **options)


@pytest.mark.parametrize("shown", ["", "Bearer wrong", "Basic right", "right"])
async def test_without_a_key_nothing_of_the_body_is_read(shown: str) -> None:
    body = Reads(b"x" * 10, length=100 << 20)
    assert (await ask(keyed(), body, authorization=shown))[0] == 401
    assert body.taken == 0


async def test_open_paths_and_the_right_key_pass() -> None:
    assert await ask(keyed(), Reads(b"a", b"b"), authorization="bearer right") == (200, b"ab")
    assert await ask(keyed(), Reads(b"", length=0), "/health") == (200, b"")


@pytest.mark.parametrize("path", ["/metrics", "/steps", "/steps/7"])
async def test_monitoring_takes_a_key_beyond_loopback(path: str) -> None:
    nothing = Reads(b"", length=0)
    assert (await ask(keyed(), nothing, path))[0] == 200
    guarded = keyed(monitoring_needs_key=True)
    status, body = await ask(guarded, nothing, path)
    assert (status, b"This server needs an API key" in body) == (401, True)
    status, body = await ask(guarded, nothing, path, authorization="Bearer wrong")
    assert (status, b"Invalid API key" in body) == (401, True)
    assert (await ask(guarded, Reads(b"", length=0), path, authorization="Bearer right"))[0] == 200
    assert [
        (await ask(guarded, Reads(b"", length=0), open_path))[0] for open_path in ("/", "/health", "/ready")
    ] == [200] * 3


async def test_a_body_over_the_limit_is_refused_when_it_is_known() -> None:
    guard = keyed(max_body_bytes=10)
    declared = Reads(b"x" * 11, length=11)
    assert (await ask(guard, declared, authorization="Bearer right"))[0] == 413
    assert declared.taken == 0
    chunked = Reads(b"x" * 6, b"x" * 6, b"x" * 6)
    assert (await ask(guard, chunked, authorization="Bearer right"))[0] == 413
    assert chunked.taken == 2
    exact = Reads(b"x" * 6, b"x" * 4, length=10)
    assert (await ask(guard, exact, authorization="Bearer right")) == (200, b"x" * 10)
    assert guard._held_bytes == 0


async def test_all_requests_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_guard, "_MAX_HELD_BYTES", 15)
    release = asyncio.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await release.wait()
        await echo(scope, receive, send)

    guard = RequestGuard(slow)
    first = asyncio.create_task(ask(guard, Reads(b"x" * 10)))
    await asyncio.sleep(0)
    assert (await ask(guard, Reads(b"x" * 10)))[0] == 503
    release.set()
    assert (await first)[0] == 200
    assert (await ask(guard, Reads(b"x" * 10)))[0] == 200


async def test_a_client_that_leaves_within_its_body_reaches_nobody() -> None:
    body = Reads(b"half")
    body.chunks.append(b"")
    body.chunks[1:] = []
    guard = RequestGuard(echo)

    async def receive() -> dict[str, Any]:
        if body.chunks:
            return {"type": "http.request", "body": body.chunks.pop(), "more_body": True}
        return {"type": "http.disconnect"}

    body.receive = receive  # type: ignore[method-assign]
    assert await ask(guard, body) == (0, b"")
    assert guard._held_bytes == 0


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "localhost:8200"}, 200),
        ({"host": "127.0.0.1:8200"}, 200),
        ({"host": "[::1]:8200"}, 200),
        ({"host": "app.localhost"}, 200),
        ({"host": "gpu-box:8200"}, 200),
        ({"host": "GPU-BOX."}, 200),
        ({"host": "rebound.example:8200"}, 403),
        ({"host": "127.0.0.1.example"}, 403),
        ({"host": "192.168.1.5:8200"}, 403),
        ({"host": "[::1"}, 403),
        ({"host": "localhost", "origin": "http://localhost:3000"}, 200),
        ({"host": "localhost", "origin": "https://gpu-box"}, 200),
        ({"host": "localhost", "origin": "https://evil.example"}, 403),
        ({"host": "localhost", "origin": "http://localhost.evil.example"}, 403),
        ({"host": "localhost", "origin": "null"}, 403),
        ({"host": "localhost", "origin": ""}, 403),
    ],
)
async def test_a_keyless_server_answers_to_this_machine_only(headers: dict[str, str], status: int) -> None:
    guard = RequestGuard(echo, allowed_hosts=["gpu-box"])
    assert (await ask(guard, Reads(b""), **headers))[0] == status
    assert (await ask(keyed(), Reads(b""), authorization="Bearer right", **headers))[0] == 200


async def test_a_page_cannot_open_the_link_of_a_keyless_server() -> None:
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": "/v1/split", "headers": [(b"origin", b"https://evil.example")]}
    await RequestGuard(echo)(scope, Reads().receive, send)
    assert sent == [{"type": "websocket.close", "code": 1008}]


async def test_errors_have_openais_form() -> None:
    transport = httpx.ASGITransport(keyed())  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        answer = await client.get("/v1/models")
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
    assert answer.headers["www-authenticate"] == "Bearer"
