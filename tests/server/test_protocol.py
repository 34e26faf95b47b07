"""Frames: round trips, bounds, and newer or older peers."""

from __future__ import annotations

import contextlib
from random import Random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wispprof import protocol
from wispprof.errors import ProtocolError
from wispprof.types import TokenLogprob

int64 = st.integers(-(1 << 63), (1 << 63) - 1)
numbers = st.integers(-(1 << 31), (1 << 31) - 1)
positions = st.integers(0, (1 << 31) - 1)
counts = st.integers(0, 1 << 20)
tokens = st.lists(st.integers(0, 1 << 20), max_size=20)
floats = st.floats(allow_nan=False)
times = st.floats(-1e12, 1e12)
names = st.text(max_size=50)
logprobs = st.lists(
    st.builds(TokenLogprob, floats, st.lists(st.tuples(positions, floats), max_size=3).map(tuple)), max_size=3
)

edge_frames = st.one_of(
    st.builds(protocol.Hello, int64, names, names, names, names, names),
    st.builds(protocol.Open, numbers, tokens, int64, int64, floats, st.none() | floats),
    st.builds(protocol.OpenPart, numbers, tokens),
    st.builds(
        protocol.Draft,
        numbers,
        positions,
        positions,
        tokens,
        st.binary(max_size=20),
        floats,
        floats,
        st.binary(max_size=20),
    ),
    st.builds(protocol.Close, numbers),
    st.builds(protocol.Ping, int64, st.binary(max_size=50), int64),
)
server_frames = st.one_of(
    st.builds(protocol.Welcome, int64, names, names, positions, counts, st.booleans(), trees=st.booleans()),
    st.builds(
        protocol.Commit,
        numbers,
        positions,
        positions,
        tokens,
        counts,
        counts,
        times,
        times,
        counts,
        names,
        logprobs,
    ),
    st.builds(protocol.Problem, numbers, names, names, times, floats),
    st.builds(protocol.Pong, int64, st.binary(max_size=50)),
)


@given(edge_frames)
def test_edge_frames_round_trip(frame: protocol.EdgeFrame) -> None:
    assert protocol.decode_edge(protocol.encode(frame)) == frame


@given(server_frames)
def test_server_frames_round_trip(frame: protocol.ServerFrame) -> None:
    assert protocol.decode_server(protocol.encode(frame)) == frame


@given(st.binary(max_size=200))
def test_random_bytes_are_a_protocol_error_or_a_frame(data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        assert isinstance(protocol.decode_edge(data), protocol.EdgeFrame)
    with contextlib.suppress(ProtocolError):
        assert isinstance(protocol.decode_server(data), protocol.ServerFrame)


HELLO = protocol.encode(protocol.Hello(protocol.PROTOCOL_VERSION, "tok"))
COMMIT = protocol.encode(protocol.Commit(0, 0, 5, [1], 0, 0, 1.0, 1.0, 0, "stop"))


@pytest.mark.parametrize(
    "data",
    [
        HELLO.replace(b"tok", b"t\xffk"),  # not UTF-8
        COMMIT.replace(b"stop", b"st\xffp"),
        b"\x92\xa1\xff\x00",  # nor the tag
        b"\x93\xa1o\x00\xdd\xff\xff\xff\xff\x01",  # 4 billion tokens announced
        b"\xdd\xff\xff\xff\xff\xa1c\x00",
        b"\x93\xa1h\x03\xdb\xff\xff\xff\xffabc",
        b"\x93\xa1q\x00" + b"\x91" * 100_000,  # nested 100,000 deep
        b"\x92\xa1x\xcf" + b"\xff" * 8,  # session 2**64 - 1
        protocol.encode(protocol.Commit(0, 0, 5, [-1], 0, 0, 1.0, 1.0)),
        protocol.encode(protocol.Commit(0, 0, -5, [1], 0, 0, 1.0, 1.0)),
        protocol.encode(protocol.Commit(0, 0, 5, [1], -1, 0, 1.0, 1.0)),
        protocol.encode(protocol.Commit(0, 0, 5, [1], 0, 0, float("nan"), 1.0)),
        protocol.encode(protocol.Problem(0, "busy", "", float("inf"))),
        protocol.encode(protocol.Hello(protocol.PROTOCOL_VERSION, "tok", key="k" * 5000)),
    ],
)
def test_impossible_values_are_a_protocol_error_in_both_directions(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        protocol.decode_edge(data)
    with pytest.raises(ProtocolError):
        protocol.decode_server(data)


def test_a_malformed_frame_names_the_fix() -> None:
    with pytest.raises(ProtocolError) as err:
        protocol.decode_edge(b"noise")
    assert err.value.hint


def test_frames_are_bounded() -> None:
    with pytest.raises(ProtocolError, match="limit"):
        protocol.decode_edge(bytes(protocol.MAX_FRAME_BYTES + 1))


def test_a_server_frame_is_no_edge_frame() -> None:
    with pytest.raises(ProtocolError):
        protocol.decode_edge(protocol.encode(protocol.Pong(1)))


def test_fields_may_be_added_at_the_end() -> None:
    older = msgspec.msgpack.encode(["p", 3, "busy", "later", 20.0])
    assert protocol.decode_server(older) == protocol.Problem(3, "busy", "later", 20.0, 0.0)
    newer = msgspec.msgpack.encode(["x", 3, "something new"])
    assert protocol.decode_edge(newer) == protocol.Close(3)


def test_a_round_of_five_drafts_is_small() -> None:
    frame = protocol.Draft(12, 3, 700, [4000, 17, 250, 3999, 8], bytes(5), 41.5, 120.25)
    assert len(protocol.encode(frame)) < 64


def test_a_stream_of_single_drafts_and_commits_is_small() -> None:
    draft = protocol.Draft(3, 17, 700, [4000], bytes(1), protocol.brief_ms(16.3), 0)
    assert len(protocol.encode(draft)) == 17
    commit = protocol.Commit(3, 17, 701, [4000], 0, 1, protocol.brief_ms(0.02), protocol.brief_ms(22.4))
    assert len(protocol.encode(commit)) == 16
    assert protocol.decode_server(protocol.encode(commit)) == commit


@given(st.lists(st.integers(0, 1 << 17), max_size=64), st.randoms())
def test_a_node_of_a_tree_takes_one_byte_more(tokens: list[int], random: Random) -> None:
    parents = [random.randrange(-1, node) if node else -1 for node in range(len(tokens))]
    chain = protocol.Draft(3, 17, 700, tokens, bytes(len(tokens)), 16.0, 0)
    tree = msgspec.structs.replace(chain, parents=protocol.parent_bytes(parents))
    more = len(protocol.encode(tree)) - len(protocol.encode(chain))
    assert more == (2 + len(tokens) if tokens else 0)  # two for the field
    assert protocol.decode_edge(protocol.encode(tree)) == tree
    assert protocol.parents_of(tree) == parents


@given(st.floats(allow_nan=False, allow_infinity=False, width=32))
def test_a_rounded_time_is_near_and_takes_five_bytes_at_most(ms: float) -> None:
    brief = protocol.brief_ms(ms)
    assert abs(brief - ms) <= (0.5 if abs(ms) >= 16 else 1 / 32)
    frame = protocol.Draft(0, 0, 0, [], b"", brief, 0)
    size = len(protocol.encode(frame)) - len(protocol.encode(protocol.Draft(0, 0, 0, [], b"", 0, 0)))
    assert size <= 4 or abs(ms) > 2**31
    assert protocol.decode_edge(protocol.encode(frame)) == frame


@given(st.floats(-2.0, 2.0))
def test_an_acceptance_probability_fits_a_byte(probability: float) -> None:
    assert 0 <= protocol.acceptance_byte(probability) <= 255
