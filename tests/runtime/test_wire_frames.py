"""Frames: round trips, limits, and what newer or older peers may send."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wispprof.errors import ProtocolError
from wispprof.runtime import wire

ints = st.integers(-(1 << 40), 1 << 40)
tokens = st.lists(st.integers(0, 1 << 20), max_size=20)
floats = st.floats(allow_nan=False)

edge_frames = st.one_of(
    st.builds(wire.Hello, ints, st.text(), st.text(), st.text(), st.text()),
    st.builds(wire.Open, ints, tokens, ints, ints, floats, st.none() | floats),
    st.builds(wire.Draft, ints, ints, ints, tokens, st.binary(max_size=20), floats, floats),
    st.builds(wire.Close, ints),
    st.builds(wire.Ping, ints, st.binary(max_size=50), ints),
)
server_frames = st.one_of(
    st.builds(wire.Welcome, ints, st.text(), st.text(), ints, ints, st.booleans()),
    st.builds(wire.Commit, ints, ints, ints, tokens, ints, ints, floats, floats, ints, st.text()),
    st.builds(wire.Problem, ints, st.text(), st.text(), floats, floats),
    st.builds(wire.Pong, ints, st.binary(max_size=50)),
)


@given(edge_frames)
def test_edge_frames_survive(frame: wire.EdgeFrame) -> None:
    assert wire.decode_edge(wire.encode(frame)) == frame


@given(server_frames)
def test_server_frames_survive(frame: wire.ServerFrame) -> None:
    assert wire.decode_server(wire.encode(frame)) == frame


@given(st.binary(max_size=200))
def test_noise_is_a_protocol_error_or_a_frame(data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        assert isinstance(wire.decode_edge(data), wire.EdgeFrame)


def test_a_malformed_frame_names_the_fix() -> None:
    with pytest.raises(ProtocolError) as fault:
        wire.decode_edge(b"noise")
    assert fault.value.fix


def test_frames_are_bounded() -> None:
    with pytest.raises(ProtocolError, match="limit"):
        wire.decode_edge(bytes(wire.MAX_FRAME_BYTES + 1))


def test_a_server_frame_is_no_edge_frame() -> None:
    with pytest.raises(ProtocolError):
        wire.decode_edge(wire.encode(wire.Pong(1)))


def test_fields_may_be_added_at_the_end() -> None:
    older = msgspec.msgpack.encode(["p", 3, "busy", "later", 20.0])
    assert wire.decode_server(older) == wire.Problem(3, "busy", "later", 20.0, 0.0)
    newer = msgspec.msgpack.encode(["x", 3, "something new"])
    assert wire.decode_edge(newer) == wire.Close(3)


def test_a_round_of_five_drafts_is_small() -> None:
    frame = wire.Draft(12, 3, 700, [4000, 17, 250, 3999, 8], bytes(5), 41.5, 120.25)
    assert len(wire.encode(frame)) < 64


def test_a_stream_of_single_drafts_and_commits_is_small() -> None:
    draft = wire.Draft(3, 17, 700, [4000], bytes(1), wire.brief_ms(16.3), 0)
    assert len(wire.encode(draft)) == 17
    commit = wire.Commit(3, 17, 701, [4000], 0, 1, wire.brief_ms(0.02), wire.brief_ms(22.4))
    assert len(wire.encode(commit)) == 16
    assert wire.decode_server(wire.encode(commit)) == commit


@given(st.floats(allow_nan=False, allow_infinity=False, width=32))
def test_a_brief_time_is_near_and_takes_five_bytes_at_most(ms: float) -> None:
    brief = wire.brief_ms(ms)
    assert abs(brief - ms) <= (0.5 if abs(ms) >= 16 else 1 / 32)
    frame = wire.Draft(0, 0, 0, [], b"", brief, 0)
    size = len(wire.encode(frame)) - len(wire.encode(wire.Draft(0, 0, 0, [], b"", 0, 0)))
    assert size <= 4 or abs(ms) > 2**31
    assert wire.decode_edge(wire.encode(frame)) == frame


@given(st.floats(-2.0, 2.0))
def test_survival_fits_a_byte(probability: float) -> None:
    assert 0 <= wire.survival_byte(probability) <= 255
