"""A faulty or hostile server costs an edge the request or the connection it touches: nothing hangs, nobody
else is hurt, and the text of a correct server that follows is exact. In virtual time."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable

import msgspec
import pytest
from fake_pair import drafting, edge, in_process, plain, truth
from hypothesis import given, settings
from hypothesis import strategies as st

from wispprof import protocol
from wispprof.edge import Connection, Generation, GenerationRequest
from wispprof.edge.opening_frames import PART_TOKENS, opening_frames
from wispprof.edge.server_frames import check_commit
from wispprof.errors import ProtocolError, RuntimeFault, ServerBusy, SettingsError, WispprofError
from wispprof.openai_api.api_error import ApiError
from wispprof.testing.in_process_server import InProcessServer
from wispprof.testing.virtual_time import run_virtual
from wispprof.types import TokenLogprob

PROMPT = (3, 4, 7)
DEADLINE_S = 300.0
"""Virtual seconds in which every request must have ended, whatever the server sends."""

Tamper = Callable[[int, bytes], list[bytes]]
"""From (number of the frame on its connection, frame) to what arrives instead."""


class Tampered:
    """A connection whose server's frames are replaced."""

    def __init__(self, inner: Connection, tamper: Tamper) -> None:
        self._inner, self._tamper = inner, tamper
        self._count = 0
        self._ready: list[bytes] = []

    async def send(self, data: bytes) -> None:
        await self._inner.send(data)

    async def receive(self) -> bytes:
        while not self._ready:
            self._ready = self._tamper(self._count, await self._inner.receive())
            self._count += 1
        return self._ready.pop(0)

    async def close(self) -> None:
        await self._inner.close()


def attack(tamper: Tamper, forever: bool) -> tuple[int, int]:
    """Two requests while the server misbehaves (once, or ``forever``), then one with a correct server.
    Returns how many of the two failed, and the invalid frames counted."""

    async def main() -> tuple[int, int]:
        attacks = 0

        def hostile(number: int, data: bytes) -> list[bytes]:
            nonlocal attacks
            if number == 0 or (attacks and not forever):  # the welcome is another test's
                return [data]
            found = tamper(number, data)
            attacks += found != [data]
            return found

        async with in_process() as server:
            server.vocab_size = 256

            async def connect() -> Connection:
                return Tampered(await server.connect(), hostile)

            async with edge(connect, give_up_ms=20_000.0) as client:
                made = [drafting(client, PROMPT, max_new=24), plain(client, (8, 8), 24)]
                async with asyncio.timeout(DEADLINE_S):
                    results = await asyncio.gather(*(g.run() for g in made), return_exceptions=True)
                failed = [r for r in results if isinstance(r, BaseException)]
                assert all(isinstance(err, RuntimeFault) for err in failed), failed
                for generation in made:
                    output = list(generation.output)
                    assert output == truth(generation.request.tokens, len(output))
                assert attacks
                attacks, bad = 1 << 30, client.bad_frames
                hostile_again, after = forever, plain(client, (9, 9), 8)
                if not hostile_again:
                    await after.run()
                    assert list(after.output) == truth((9, 9), 8)
                return len(failed), bad

    return run_virtual(main())


def instead(frame: protocol.ServerFrame | bytes) -> Tamper:
    """The third frame of each connection is replaced by this one."""
    data = frame if isinstance(frame, bytes) else protocol.encode(frame)
    return lambda number, own: [data] if number == 3 else [own]


def changed(**fields: object) -> Tamper:
    """Each later commit of session 0 has these values."""

    def tamper(number: int, data: bytes) -> list[bytes]:
        frame = protocol.decode_server(data)
        if number < 4 or not isinstance(frame, protocol.Commit) or frame.session != 0:
            return [data]
        return [msgspec.msgpack.encode(msgspec.structs.replace(frame, **fields))]

    return tamper


BAD_BYTES = {
    "empty": b"",
    "not msgpack": b"\xc1\xc1",
    "invalid UTF-8": b"\x94\xa1p\xff\xa2\xff\xfe\xa1x",
    "wrong types": msgspec.msgpack.encode(("c", "a", {}, None, 1, 2, 3, 4, 5)),
    "deep": b"\x91" * 2000,
    "unknown tag": msgspec.msgpack.encode(("z", 1)),
    "a map": msgspec.msgpack.encode({"tag": "c"}),
    "too large": b"\xc6" + bytes(protocol.MAX_FRAME_BYTES + 1),
    "hello": protocol.encode(protocol.Hello(3, "")),
    "second welcome": protocol.encode(protocol.Welcome(3, "", "", 64, 8, False)),
}


@pytest.mark.parametrize("data", BAD_BYTES.values(), ids=BAD_BYTES.keys())
def test_an_invalid_frame_ends_the_connection_and_the_link_heals(
    data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    assert attack(instead(data), forever=False) == (0, 1)
    assert not any(record.exc_info for record in caplog.records)


@pytest.mark.parametrize("data", [b"", BAD_BYTES["invalid UTF-8"]])
def test_a_server_that_only_sends_invalid_frames_does_not_hang_a_request(data: bytes) -> None:
    failed, bad = attack(lambda number, own: [data], forever=True)
    assert failed == 2
    assert bad >= 16


BAD_COMMITS: dict[str, dict[str, object]] = {
    "a token outside the vocabulary": {"tokens": [256], "accepted": 0},
    "a negative token": {"tokens": [-1], "accepted": 0},
    "a huge token": {"tokens": [1 << 63], "accepted": 0},
    "a jump": {"committed_len": 20, "tokens": [1], "accepted": 0},
    "beyond the end": {"committed_len": 400, "tokens": [1], "accepted": 0},
    "a huge position": {"committed_len": (1 << 63) - 1},
    "before the start": {"committed_len": 0, "tokens": [1, 2], "accepted": 0},
    "a negative position": {"committed_len": -5},
    "contradiction": {"committed_len": 5, "tokens": [9, 9], "accepted": 0},
    "more accepted than drafted": {"accepted": 9, "drafted": 2},
    "a huge number of drafts": {"drafted": 1 << 40},
    "negative counts": {"accepted": -3, "drafted": -2},
    "not a number": {"queue_ms": math.nan},
    "infinite": {"verify_ms": math.inf},
    "negative time": {"verify_ms": -7.0},
    "unknown end": {"finished": "x" * 500_000},
    "log-probabilities": {"logprobs": [(0.0, ())] * 40},
}


@pytest.mark.parametrize("fields", BAD_COMMITS.values(), ids=BAD_COMMITS.keys())
def test_an_impossible_commit_ends_its_request_at_most(
    fields: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    for forever in (False, True):
        # A commit that no frame can hold ends the connection, any other the session.
        failed, _ = attack(changed(**fields), forever)
        assert failed <= 1 + forever
    assert not any(record.exc_info for record in caplog.records)


def test_commits_of_sessions_that_are_not_open_change_nothing() -> None:
    stray = protocol.encode(protocol.Commit(99, 0, 5, [1], 0, 0, 0.0, 0.0))
    assert attack(lambda number, own: [stray, own, stray], forever=True) == (0, 0)


def test_a_load_level_out_of_range_is_the_nearest_one() -> None:
    for level in (-5, 1 << 40):
        failed, bad = attack(changed(load_level=level), forever=False)
        assert failed == 0
        assert bad <= 1


@pytest.mark.parametrize("code", ["session", "internal", "busy", "draining", "slo", "frame", "made up", ""])
@pytest.mark.parametrize("retry_ms", [0.0, -1.0, math.nan, math.inf, 1e300])
def test_endless_problems_end_the_request(code: str, retry_ms: float) -> None:
    problem = protocol.Problem(0, code, "no", retry_ms, 7.5)

    async def main() -> RuntimeFault:
        def tamper(number: int, data: bytes) -> list[bytes]:
            return [protocol.encode(problem)] if number else [data]

        async with in_process() as server:

            async def connect() -> Connection:
                return Tampered(await server.connect(), tamper)

            async with edge(connect, give_up_ms=20_000.0) as client, asyncio.timeout(DEADLINE_S):
                with pytest.raises(RuntimeFault) as raised:
                    await plain(client, PROMPT, 8).run()
                return raised.value

    err = run_virtual(main())
    if abs(retry_ms) < 2.0:
        assert isinstance(err, ServerBusy) == (code in ("busy", "draining", "slo"))
    if isinstance(err, ServerBusy):
        over_http = ApiError.of(err)
        assert over_http.status == (503 if code == "draining" else 429)
        assert (over_http.code, over_http.details) == (code, {"nearest_tokens_per_s": 7.5})


@pytest.mark.parametrize(
    "fields",
    [
        {"max_context": 0},
        {"max_context": -1},
        {"max_drafts": -1},
        {"max_drafts": 1 << 50},
        {"stop_tokens": [-4]},
        {"vocab_size": 8, "stop_tokens": [8]},
        {"vocab_size": -1},
        {"temperature": math.nan},
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"min_p": 2.0},
    ],
    ids=str,
)
def test_an_impossible_welcome_is_refused(fields: dict[str, object]) -> None:
    async def main() -> None:
        def tamper(number: int, data: bytes) -> list[bytes]:
            frame = protocol.decode_server(data)
            return [msgspec.msgpack.encode(msgspec.structs.replace(frame, **fields))]

        async with in_process() as server:

            async def connect() -> Connection:
                return Tampered(await server.connect(), tamper)

            with pytest.raises(ProtocolError, match=r"Invalid welcome|Malformed"):
                async with edge(connect):
                    pass

    run_virtual(main())


@given(
    st.integers(1, 6),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_mutated_frames(place: int, mutations: list[tuple[float, int]], cut: bool) -> None:
    """Whatever bytes change: the text stays the target's, or the request ends with an error."""

    def tamper(number: int, data: bytes) -> list[bytes]:
        frame = protocol.decode_server(data)
        if number < place or not isinstance(frame, protocol.Commit):
            return [data]
        # Committed tokens themselves cannot be checked by anyone but the target.
        head, tokens, tail = _around_tokens(data, frame)
        changed = bytearray(head + tail)
        for where, value in mutations:
            changed[int(where * len(changed))] = value
        found = bytes(changed[: len(head)]) + tokens + bytes(changed[len(head) :])
        found = found[: len(found) // 2] if cut else found
        try:
            told = protocol.decode_server(found)
        except ProtocolError:
            return [found]
        # A commit that only goes missing is what a slow server looks like.
        same = isinstance(told, protocol.Commit) and told.session == frame.session
        return [found if same else data]

    def _around_tokens(data: bytes, frame: protocol.Commit) -> tuple[bytes, bytes, bytes]:
        tokens = msgspec.msgpack.encode(frame.tokens)
        at = data.index(tokens, 3)
        return data[:at], tokens, data[at + len(tokens) :]

    logging.disable(logging.CRITICAL)
    try:
        attack(tamper, forever=False)
    finally:
        logging.disable(logging.NOTSET)


def test_a_server_that_prefills_for_minutes_is_waited_for() -> None:
    """It answers pings meanwhile; that is all an edge can ask of it."""

    async def main() -> None:
        def step_ms(shape: object) -> float:
            return 300_000.0 if shape.prefill_tokens else 8.0  # type: ignore[attr-defined]

        fast = in_process()
        slow = InProcessServer(fast.engine, fast.policy, fast.estimator, step_ms)
        async with slow as server, edge(server.connect) as client:
            stats = await drafting(client, PROMPT, max_new=8).run()
            assert stats.reopened == 0
            assert stats.first_ms is not None
            assert stats.first_ms >= 300_000.0
            assert client.reconnects == 0

    run_virtual(main())


def test_a_server_that_answers_nothing_is_left() -> None:
    async def main() -> None:
        def silent(number: int, data: bytes) -> list[bytes]:
            return [data] if number == 0 else []

        async with in_process() as server:

            async def connect() -> Connection:
                return Tampered(await server.connect(), silent)

            async with edge(connect, dead_ms=4000.0) as client, asyncio.timeout(DEADLINE_S):
                with pytest.raises(RuntimeFault, match="without a token"):
                    await plain(client, PROMPT, 8).run()

    run_virtual(main())


# --- what the edge itself would send ----------------------------------------------------------------


@pytest.mark.parametrize(
    "request_",
    [
        lambda: GenerationRequest((1 << 64,), 4),
        lambda: GenerationRequest((-1,), 4),
        lambda: GenerationRequest((1,), 1 << 20_000),
        lambda: GenerationRequest((1,), 4, stop_tokens=(1 << 31,)),
    ],
    ids=["token", "negative token", "max_new", "stop token"],
)
def test_numbers_that_fit_no_frame_are_refused_before_anything_is_registered(
    request_: Callable[[], GenerationRequest],
) -> None:
    async def main() -> None:
        async with in_process() as server, edge(server.connect) as client:
            with pytest.raises(SettingsError, match="out of bounds") as raised:
                await Generation(client, request_()).run()
            assert isinstance(raised.value, WispprofError)
            assert not isinstance(raised.value, RuntimeFault)  # the API's 400
            server.cut()  # a link loss opens all registered sessions again
            generation = plain(client, PROMPT, 8)
            await generation.run()
            assert list(generation.output) == truth(PROMPT, 8)

    run_virtual(main())


def test_a_listener_whose_opening_cannot_be_encoded_is_not_registered() -> None:
    async def main() -> None:
        async with in_process() as server, edge(server.connect) as client:
            await plain(client, PROMPT, 2).run()
            generation = plain(client, PROMPT, 4)
            opening = generation.opening
            generation.opening = lambda: msgspec.structs.replace(opening(), seed=1 << 80)  # type: ignore[method-assign]
            with pytest.raises(SettingsError, match="does not fit into a frame"):
                client.open(generation)
            server.cut()
            await plain(client, PROMPT, 2).run()

    run_virtual(main())


def test_long_openings_leave_in_parts_that_fit_a_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    class Listener:
        def __init__(self, count: int) -> None:
            self.tokens = [(1 << 31) - 1 - n for n in range(count)]

        def opening(self) -> protocol.Open:
            return protocol.Open(0, self.tokens, 8)

    for count in (1, PART_TOKENS, PART_TOKENS + 1, 250_000):
        listener = Listener(count)
        data = opening_frames(7, listener.opening())
        frames = [protocol.decode_edge(frame) for frame in data]
        assert max(map(len, data)) <= protocol.MAX_FRAME_BYTES / 2
        assert [token for frame in frames for token in frame.tokens] == listener.tokens  # type: ignore[union-attr]
        assert {frame.session for frame in frames} == {7}  # type: ignore[union-attr]
        assert [type(frame) for frame in frames[:-1]] == [protocol.OpenPart] * (len(frames) - 1)
        assert isinstance(frames[-1], protocol.Open)

    monkeypatch.setattr("wispprof.edge.opening_frames.PART_TOKENS", 16)

    async def main() -> None:
        async with in_process() as server, edge(server.connect) as client:
            prompt = tuple(range(100))
            generation = drafting(client, prompt, max_new=40)
            task = asyncio.create_task(generation.run())
            await asyncio.sleep(0.3)
            server.cut()
            await task
            assert generation.stats.reopened == 1
            assert list(generation.output) == truth(prompt, 40)

    run_virtual(main())


def test_log_probabilities_reach_the_reader_with_their_tokens() -> None:
    """Of an overlapping commit, those of its new tokens."""

    async def main() -> list[tuple[int, float]]:
        def tamper(number: int, data: bytes) -> list[bytes]:
            frame = protocol.decode_server(data)
            if not isinstance(frame, protocol.Commit):
                return [data]
            told = [TokenLogprob(-float(token), ((token, -1.0),)) for token in frame.tokens]
            own = protocol.encode(msgspec.structs.replace(frame, logprobs=told))
            if not seen:
                seen.append(frame.tokens[0])
                return [own]
            tokens = [*seen, *frame.tokens]
            seen.extend(frame.tokens)
            whole = [TokenLogprob(-float(token)) for token in tokens]
            return [protocol.encode(msgspec.structs.replace(frame, tokens=tokens, logprobs=whole))]

        seen: list[int] = []
        async with in_process() as server:

            async def connect() -> Connection:
                return Tampered(await server.connect(), tamper)

            async with edge(connect) as client:
                pairs = []
                async for chunk in plain(client, PROMPT, 6).stream():
                    pairs += list(zip(chunk.tokens, (p.logprob for p in chunk.logprobs), strict=True))
                return pairs

    pairs = run_virtual(main())
    assert [token for token, _ in pairs] == truth(PROMPT, 6)
    assert all(value == -float(token) for token, value in pairs)


def test_a_log_probability_that_is_no_number_is_refused() -> None:
    commit = protocol.Commit(0, 0, 4, [1], 0, 0, 0.0, 0.0, logprobs=[TokenLogprob(-1.0, ((2, math.nan),))])
    with pytest.raises(ProtocolError, match="log-probabilities"):
        check_commit(commit, 10, 0)
    check_commit(msgspec.structs.replace(commit, logprobs=[TokenLogprob(-math.inf)]), 10, 0)
