"""Invalid requests get a clear answer, and no other session notices."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
from raw_edge import Edge, edge
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from wispprof import protocol
from wispprof.errors import HandshakeRefused, ProtocolError, WispprofError
from wispprof.server import RunningServer, running_server
from wispprof.server.frame_checks import check_draft, check_hello, check_key, session_request
from wispprof.settings.server_settings import ServerSettings, read_api_keys
from wispprof.testing.fake_engine import FakeDrafter, FakeEngine
from wispprof.types import Sampling, ServedModel

MODEL = ServedModel("big", "tok-1", 100, 512)


def hello(**changes: Any) -> protocol.Hello:
    return protocol.Hello(**{"protocol": protocol.PROTOCOL_VERSION, "tokenizer": "tok-1", **changes})


# --- pure checks ---


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"protocol": 99}, f"protocol {protocol.PROTOCOL_VERSION}"),
        ({"tokenizer": "other"}, "tokenizer"),
        ({"target": "small"}, "'big'"),
        ({"key": "wrong"}, "Invalid API key"),
        (
            {"key": ""},
            "needs an API key. Give --key, or set WISPPROF_KEY",
        ),
    ],
)
def test_hello_must_match(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(HandshakeRefused, match=says) as refused:
        check_hello(hello(**{"key": "right", **changes}), MODEL, ["right"])
    assert refused.value.hint


def test_empty_target_and_tokenizer_accept_any() -> None:
    check_hello(hello(tokenizer="", target="", key=""), MODEL, [])


def test_whole_keys_are_compared() -> None:
    assert check_key("b", ["a", "b"])
    assert check_key("anything", [])
    assert not check_key("", ["a"])
    assert not check_key("ab", ["a"])
    assert not check_key("\udc80", ["a"])


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": [1] * 65, "acceptance_prob": bytes(65)},
        {"tokens": [1, 2], "acceptance_prob": bytes(1)},
        {"tokens": [100], "acceptance_prob": bytes(1)},
        {"tokens": [-1], "acceptance_prob": bytes(1)},
        {"base": -1},
        {"epoch": -1},
        {"base": 1 << 40},
        {"parents": b"\x00\x00"},
        {"parents": b"\x01"},
        {"parents": b"\xff"},
        {"tokens": [1, 2], "acceptance_prob": bytes(2), "parents": b"\x00"},
        {"tokens": [1, 2], "acceptance_prob": bytes(2), "parents": b"\x00\x02"},
        {"tokens": [], "acceptance_prob": b"", "parents": b"\x00"},
    ],
)
def test_drafts_no_correct_edge_sends(changes: dict[str, Any]) -> None:
    valid = {"tokens": [1], "acceptance_prob": bytes(1), "base": 3, "epoch": 0}
    frame = protocol.Draft(session=0, draft_ms=1.0, slack_ms=1.0, **{**valid, **changes})
    data = protocol.encode(frame)
    with pytest.raises(ProtocolError):
        check_draft(cast(protocol.Draft, protocol.decode_edge(data)), 100, trees=True)


def test_trees_are_for_engines_that_verify_them() -> None:
    frame = protocol.Draft(0, 0, 3, [1, 2], bytes(2), 1.0, 1.0, parents=b"\x00\x00")
    check_draft(frame, 100, trees=True)
    with pytest.raises(ProtocolError, match="verifies chains"):
        check_draft(frame, 100)


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_k": -1},
        {"tokens_per_s": -1.0},
        {"tokens_per_s": float("inf")},
        {"ttft_ms": -5.0},
        {"seed": 1 << 63},
    ],
)
def test_invalid_openings(changes: dict[str, Any]) -> None:
    data = protocol.encode(protocol.Open(0, [1, 2], 10, **changes))
    with pytest.raises(ProtocolError):
        session_request(cast(protocol.Open, protocol.decode_edge(data)))


def test_settings_refuse_an_open_port_without_a_key(tmp_path: Any) -> None:
    with pytest.raises(WispprofError, match="without an API key"):
        ServerSettings(host="0.0.0.0")
    ServerSettings(host="0.0.0.0", api_keys=("k" * 16,))
    assert ServerSettings(host="::1").loopback
    with pytest.raises(WispprofError, match="key"):
        ServerSettings(tls_cert=tmp_path / "cert.pem")
    keys = tmp_path / "keys"
    keys.write_text("# mine\n\n" + "a" * 20 + "\n")
    assert read_api_keys(keys) == ("a" * 20,)
    keys.write_text("short\n")
    with pytest.raises(WispprofError, match="16"):
        read_api_keys(keys)
    keys.write_text("# none\n")
    with pytest.raises(WispprofError, match="no API key"):
        read_api_keys(keys)


# --- over the socket ---


@pytest.fixture
async def running() -> AsyncIterator[RunningServer]:
    engine = FakeEngine(64, max_context=256)
    settings = ServerSettings(policy="fcfs", api_keys=("right-right-right",), max_drafts=8)
    async with running_server(settings, engine=engine, model=engine.served) as one:
        yield one
        while len(one.server.manager):
            await asyncio.sleep(0.001)
        await one.server.check_integrity()


async def exchange(running: RunningServer, *frames: bytes | str) -> tuple[list[protocol.ServerFrame], int]:
    """Send raw frames on a new connection; the frames received until it closed, and the close code."""
    answers: list[protocol.ServerFrame] = []
    async with connect(running.split_url, compression=None, max_size=None) as socket:
        try:
            for frame in frames:
                await socket.send(frame)
            while True:
                answers.append(protocol.decode_server(await socket.recv(decode=False)))
        except ConnectionClosed:
            pass
        return answers, socket.close_code or 0


GOOD = protocol.encode(protocol.Hello(protocol.PROTOCOL_VERSION, "", "", "right-right-right"))


@pytest.mark.parametrize(
    ("frames", "code", "says"),
    [
        ([b"\x00nonsense"], "frame", "Malformed"),
        (["text"], "frame", "text frame"),
        ([protocol.encode(protocol.Close(1))], "hello", "first frame"),
        ([protocol.encode(protocol.Hello(9, ""))], "hello", "protocol"),
        (
            [protocol.encode(protocol.Hello(protocol.PROTOCOL_VERSION, "", "", "no"))],
            "key",
            "API key",
        ),
        ([GOOD, b"\x93\x01"], "frame", "Malformed"),
        ([GOOD, GOOD], "frame", "already"),
        ([GOOD, bytes(protocol.MAX_FRAME_BYTES + 10)], "frame", "exceeds"),
    ],
)
async def test_a_bad_frame_costs_its_sender_the_connection(
    running: RunningServer, frames: list[bytes | str], code: str, says: str
) -> None:
    async with edge(running.split_url, key="right-right-right") as bystander:
        prompt, drafter = [1, 2, 3], FakeDrafter(FakeEngine(64).target)
        innocent = asyncio.create_task(bystander.generate(0, prompt, 60, drafter=drafter))
        answers, closed = await exchange(running, *frames)
        problem = answers[-1]
        assert isinstance(problem, protocol.Problem)
        assert (problem.session, problem.code) == (-1, code)
        assert says in problem.message
        assert closed in (1002, 1008)
        assert await innocent == FakeEngine(64).target.generate(prompt, 60)


async def test_a_huge_frame_closes_the_connection(running: RunningServer) -> None:
    _, closed = await exchange(running, GOOD, bytes(protocol.MAX_FRAME_BYTES * 2))
    assert closed == 1009


async def first_problem(one: Edge, *frames: protocol.EdgeFrame) -> protocol.Problem:
    one.stray.clear()
    for frame in frames:
        await one.send(frame)
    while not any(isinstance(frame, protocol.Problem) for frame in one.stray):
        await asyncio.sleep(0.001)
    return next(frame for frame in one.stray if isinstance(frame, protocol.Problem))


async def test_a_bad_request_costs_only_itself(running: RunningServer) -> None:
    async with edge(running.split_url, key="right-right-right") as one:
        refused = [
            (protocol.Open(5, [], 10), "frame"),
            (protocol.Open(5, [64], 10), "frame"),
            (protocol.Open(5, [1] * 300, 10), "limit"),
            (protocol.Open(5, [1], 0), "frame"),
            (protocol.Open(5, [1], 10, generated=1), "frame"),
            (protocol.Open(5, [1], 10, temperature=-1.0), "frame"),
            (protocol.Open(5, [1], 10, tokens_per_s=1e12), "slo"),
            (protocol.Open(-4, [1], 10), "session"),
            (protocol.Draft(77, 0, 1, [1], bytes(1), 1.0, 1.0), "session"),
        ]
        for frame, code in refused:
            problem = await first_problem(one, frame)
            assert (problem.session, problem.code) == (frame.session, code), problem
        problem = await first_problem(
            one, protocol.Open(6, [1, 2], 200), protocol.Draft(6, 0, 2, [99], bytes(1), 1.0, 1.0)
        )
        assert (problem.session, problem.code) == (6, "frame")
        await one.send(protocol.Close(6))
        assert await one.generate(0, [3], 5) == FakeEngine(64).target.generate([3], 5)
        # Late frames of a session that has ended are not errors.
        one.stray.clear()
        await one.send(protocol.Draft(0, 0, 9, [1], bytes(1), 1.0, 1.0))
        await one.send(protocol.Ping(3, b"", 10))
        while not one.stray:
            await asyncio.sleep(0.001)
        assert one.stray == [protocol.Pong(3, bytes(10))]


async def test_frames_of_every_length_arrive(running: RunningServer) -> None:
    sizes = [0, 100, 130, 300, 1 << 15, 1 << 16]
    async with edge(running.split_url, key="right-right-right") as one:
        for number, size in enumerate(sizes):
            await one.send(protocol.Ping(number, b"", size))
        while len(one.stray) < len(sizes):
            await asyncio.sleep(0.001)
        assert one.stray == [protocol.Pong(number, bytes(size)) for number, size in enumerate(sizes)]


async def test_too_many_problems_end_the_connection(running: RunningServer) -> None:
    bad = protocol.encode(protocol.Draft(1, 0, 0, [], b"", 0.0, 0.0))
    answers, closed = await exchange(running, GOOD, *[bad] * 80)
    assert closed == 1008
    assert "Too many" in answers[-1].message  # type: ignore[union-attr]


async def test_reopening_replaces_and_resumes(running: RunningServer) -> None:
    target = FakeEngine(64).target
    prompt = list(range(20))
    wanted = target.generate(prompt, 30, Sampling(0.5, seed=3))
    async with edge(running.split_url, key="right-right-right") as one:
        await one.send(protocol.Open(0, prompt, 30, temperature=0.5, seed=3))
        resumed = await one.run(
            0,
            [*prompt, *wanted[:10]],
            30,
            k=0,
            drafter=None,
            sampling=Sampling(0.5, seed=3),
            generated=10,
        )
    assert isinstance(resumed, list)
    assert resumed[-20:] == wanted[10:]
