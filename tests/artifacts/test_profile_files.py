"""Profiles and journals: exact round trips, and a named line for every kind of damage."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wispprof.artifacts import (
    EdgeRow,
    LinkRow,
    Manifest,
    RowJournal,
    StepRow,
    load_edge,
    load_profile,
    load_server,
    make_profile,
    save_profile,
)
from wispprof.artifacts.journal import journal_header
from wispprof.artifacts.profile import RESTED_MS
from wispprof.artifacts.rows import decode_row, encode_row
from wispprof.errors import ArtifactDamaged, ArtifactError, ArtifactMissing, ArtifactTooNew
from wispprof.types import BatchShape, ModelInfo, VerifyItem

times = st.floats(0, 1e9, allow_nan=False)
samples = st.lists(times, min_size=1, max_size=5).map(tuple)
counts = st.integers(0, 1 << 40)
texts = st.text(max_size=12)
flags = st.lists(st.sampled_from(["drift", "noisy", "throttled"]), max_size=3).map(tuple)
items = st.builds(VerifyItem, st.integers(1, 9000), st.integers(0, 9000), st.booleans())
shapes = st.lists(items, min_size=1, max_size=6).map(lambda i: BatchShape(tuple(i)))
step_rows = st.builds(
    StepRow,
    key=texts,
    kind=st.sampled_from(["verify", "prefill", "mixed", "sentinel"]),
    shape=shapes,
    samples_ms=samples,
    flags=flags,
    padded_tokens=counts,
    order=counts,
)
edge_rows = st.builds(
    EdgeRow,
    key=texts,
    kind=st.sampled_from(["draft_step", "forward", "prefill", "energy"]),
    context=counts,
    samples_ms=samples,
    tokens=counts,
    energy_j=st.none() | times,
    temperature_c=st.none() | times,
    flags=flags,
    order=counts,
    source=st.just("published"),
    citation=st.just("somebody, 2026"),
)
link_rows = st.builds(
    LinkRow,
    key=texts,
    kind=st.sampled_from(["rtt", "uplink", "downlink"]),
    payload_bytes=counts,
    samples_ms=samples,
    order=counts,
)


@given(step_rows, edge_rows, link_rows)
@settings(max_examples=150, deadline=None)
def test_rows_round_trip(step, edge, link):
    for row, kind in ((step, "server"), (edge, "edge"), (link, "link")):
        assert decode_row(encode_row(row), kind, "here") == row


@given(step_rows, st.data())
@settings(max_examples=150, deadline=None)
def test_any_changed_byte_of_a_row_is_noticed(row, data):
    line = bytearray(encode_row(row))
    place = data.draw(st.integers(0, len(line) - 2))
    line[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ArtifactDamaged, match="here"):
        decode_row(bytes(line), "server", "here")


def rows(n=6):
    return [
        StepRow(f"k{i}", "verify", BatchShape.uniform(i + 1, 5, 64), (1.0 + i, 2.5), order=i)
        for i in range(n)
    ]


def saved(folder, n=6):
    profile = make_profile(Manifest("server", ModelInfo("tiny", "float32", 10)), rows(n))
    save_profile(profile, folder / "p")
    return profile, folder / "p.jsonl", folder / "p.manifest.json"


def test_profile_round_trip_by_any_of_its_names(tmp_path):
    profile, *_ = saved(tmp_path)
    for name in ("p", "p.jsonl", "p.manifest.json"):
        assert load_profile(tmp_path / name) == profile
    assert load_server(tmp_path / "p").hash == profile.manifest.rows_hash
    with pytest.raises(ArtifactDamaged, match="not 'edge'"):
        load_edge(tmp_path / "p")


def test_names_with_dots_stay_whole(tmp_path):
    profile, *_ = saved(tmp_path)
    save_profile(profile, tmp_path / "qwen-2.5.v1")
    assert (tmp_path / "qwen-2.5.v1.jsonl").exists()
    assert load_profile(tmp_path / "qwen-2.5.v1") == profile


def damage(lines, how):
    if how == "torn":
        return [*lines[:-1], lines[-1][: len(lines[-1]) // 2]]
    if how == "no newline":
        return [*lines[:-1], lines[-1].rstrip(b"\n")]
    if how == "truncated":
        return lines[:-2]
    if how == "reordered":
        return [*lines[:2], lines[3], lines[2], *lines[4:]]
    if how == "edited":
        return [*lines[:2], lines[2].replace(b"2.5", b"2.4"), *lines[3:]]
    if how == "repeated":
        return [*lines[:3], lines[2], *lines[3:]]
    if how == "binary":
        return [*lines[:2], b"\xff\xfe\x00\n", *lines[3:]]
    if how == "blank":
        return [*lines[:2], b"\n", *lines[2:]]
    if how == "swapped row":  # a whole line of another profile
        other = StepRow("k2", "verify", BatchShape.uniform(9, 9, 9), (9.0,), order=2)
        return [*lines[:2], encode_row(other), *lines[3:]]
    raise AssertionError(how)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("torn", "line 6.*torn"),
        ("no newline", "line 6.*torn"),
        ("truncated", "line 4.*4 rows.*says 6"),
        ("reordered", "line 4.*out of order"),
        ("edited", "line 3.*changed"),
        ("repeated", "line 4.*repeats"),
        ("binary", "line 3.*UTF-8"),
        ("blank", "line 3.*line 1"),
        ("swapped row", "content hash"),
    ],
)
def test_damage_names_line_and_fault(tmp_path, how, says):
    _, body, _ = saved(tmp_path)
    lines = body.read_bytes().splitlines(keepends=True)
    body.write_bytes(b"".join(damage(lines, how)))
    with pytest.raises(ArtifactDamaged, match=says):
        load_profile(tmp_path / "p")


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_no_damage_ever_crashes_the_reader(tmp_path_factory, data):
    """Cut, flip or insert anywhere in either file: an ArtifactError, or the very same profile."""
    folder = tmp_path_factory.mktemp("fuzz")
    profile, body, manifest = saved(folder, 3)
    file = data.draw(st.sampled_from([body, manifest]))
    content = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place : place + data.draw(st.integers(0, 40))] = data.draw(st.binary(max_size=6))
    file.write_bytes(bytes(content))
    with contextlib.suppress(ArtifactError):
        assert load_profile(folder / "p").rows == profile.rows


def test_missing_newer_and_foreign_files(tmp_path):
    with pytest.raises(ArtifactMissing, match="manifest"):
        load_profile(tmp_path / "nothing")
    _, body, manifest = saved(tmp_path)
    document = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**document, "schema": 99}))
    with pytest.raises(ArtifactTooNew, match=r"99.*Upgrade"):
        load_profile(tmp_path / "p")
    manifest.write_text(json.dumps({**document, "kind": "moon"}))
    with pytest.raises(ArtifactDamaged, match="moon"):
        load_profile(tmp_path / "p")
    manifest.write_text("[1, 2]")
    with pytest.raises(ArtifactDamaged, match="not a profile"):
        load_profile(tmp_path / "p")
    manifest.write_text(json.dumps(document))
    body.unlink()
    with pytest.raises(ArtifactMissing, match="rows"):
        load_profile(tmp_path / "p")


def test_a_published_row_needs_its_citation():
    row = replace(rows(1)[0], source="published", citation="")
    with pytest.raises(ArtifactDamaged, match="citation"):
        decode_row(encode_row(row), "server", "here")


def test_draft_time_between_measured_contexts():
    made = [EdgeRow(f"d{c}", "draft_step", c, (ms,), order=c) for c, ms in ((100, 2.0), (300, 4.0))]
    profile = make_profile(Manifest("edge", ModelInfo("d")), made)
    assert [profile.draft_ms(c) for c in (0, 100, 200, 300, 900)] == [2.0, 2.0, 3.0, 4.0, 4.0]


def test_drafting_time_counts_the_steps_that_catch_up():
    step = EdgeRow("d", "draft_step", 100, (2.0,))
    behind = EdgeRow("c", "catch_up", 100, (3.0,), tokens=2, order=1)
    profile = make_profile(Manifest("edge", ModelInfo("d")), [step, behind])
    assert profile.drafting_ms(100, caught_up=0.0) == profile.draft_ms(100) == 2.0
    assert profile.drafting_ms(100, caught_up=0.25) == pytest.approx(2.25)
    older = make_profile(Manifest("edge", ModelInfo("d")), [step])
    assert older.drafting_ms(100, caught_up=0.25) == 2.0


def test_drafting_time_counts_what_a_rest_adds():
    made = [
        EdgeRow("d", "draft_step", 100, (2.0,)),
        EdgeRow("r", "round", 100, (9.0,), tokens=4, order=1, rested_ms=20.0),
        EdgeRow("s", "round", 300, (11.0,), tokens=4, order=2, rested_ms=20.0),
    ]
    profile = make_profile(Manifest("edge", ModelInfo("d")), made)
    assert [profile.resume_ms(c) for c in (0, 100, 200, 900)] == [1.0, 1.0, 2.0, 3.0]
    assert [profile.resume_ms(100, rest) for rest in (0.0, RESTED_MS / 2, 99.0)] == [0.0, 0.5, 1.0]
    assert profile.drafting_ms(100, 0.0, resumed=1 / 4) == pytest.approx(9.0 / 4)
    # Noise can make a round shorter than its steps; a rest never makes drafting faster.
    quick = make_profile(profile.manifest, [made[0], replace(made[1], samples_ms=(7.0,))])
    assert quick.resume_ms(100) == 0.0
    older = make_profile(profile.manifest, made[:1])
    assert older.resume_ms(100) == 0.0
    assert older.drafting_ms(100, 0.0, resumed=1 / 4) == 2.0


def test_a_row_says_how_long_the_device_rested():
    row = EdgeRow("r", "round", 64, (9.0,), tokens=4, rested_ms=20.0)
    assert decode_row(encode_row(row), "edge", "here") == row
    # Rows of older profiles say nothing of it, and are written as they were.
    assert b"rested" not in encode_row(replace(row, rested_ms=0.0))


def test_blocks_must_account_for_every_sample():
    row = StepRow("k", "verify", BatchShape.uniform(1, 1, 8), (1.0, 2.0, 3.0), blocks=((0, 2), (7, 1)))
    row = replace(row, set_aside_ms=(9.0,))
    assert decode_row(encode_row(row), "server", "here") == row
    aside = replace(row, set_aside_blocks=((4, 1),))
    assert decode_row(encode_row(aside), "server", "here") == aside
    with pytest.raises(ArtifactDamaged, match="'set_aside_blocks' gives"):
        decode_row(encode_row(replace(row, set_aside_blocks=((4, 2),))), "server", "here")
    for blocks, fault in (
        (((0, 1), (7, 1)), "'blocks' gives 2"),
        (((0, 3), (7, 0)), r"blocks\[1\]\[1\] is 0"),
        (((0, 4),), "'blocks' gives 4"),
    ):
        with pytest.raises(ArtifactDamaged, match=fault):
            decode_row(encode_row(replace(row, blocks=blocks)), "server", "here")


def test_a_journal_takes_several_visits_of_a_key_but_no_line_twice(tmp_path):
    path = tmp_path / "j.jsonl"
    with RowJournal(path, "server", HEADER) as log:
        for order in range(3):
            log.append(replace(rows(1)[0], order=order))
    with RowJournal(path, "server", HEADER, resume=True) as log:
        assert [row.order for row in log.rows] == [0, 1, 2]
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines, lines[2]]))
    with pytest.raises(ArtifactDamaged, match=r"line 5.*repeated or moved"):
        RowJournal(path, "server", HEADER, resume=True)
    assert journal_header(path) == HEADER
    assert journal_header(tmp_path / "none.jsonl") == {}


# --- journal ------------------------------------------------------------------------------------

HEADER = {"model": "tiny", "seed": 1}


def journal(path, count, **how):
    with RowJournal(path, "server", HEADER, **how) as log:
        for row in rows(count)[len(log.rows) :]:
            log.append(row)
        return list(log.rows)


def test_a_journal_resumes_after_any_cut(tmp_path):
    """kill -9 can stop a write at any byte: whole rows remain, a torn one is measured again."""
    path = tmp_path / "j.jsonl"
    journal(path, 4)
    whole = path.read_bytes()
    ends = [i + 1 for i, b in enumerate(whole) if b == ord("\n")]
    for cut in range(0, len(whole) + 1, 7):
        path.write_bytes(whole[:cut])
        with RowJournal(path, "server", HEADER, resume=True) as log:
            kept = max(0, sum(end <= cut for end in ends) - 1)
            assert log.rows == rows(kept)
        assert journal(path, 4, resume=True) == rows(4)
        assert path.read_bytes() == whole


def test_a_journal_refuses_another_sweep_and_silent_loss(tmp_path):
    path = tmp_path / "j.jsonl"
    journal(path, 3)
    with pytest.raises(ArtifactError, match="--resume"):
        RowJournal(path, "server", HEADER)
    with pytest.raises(ArtifactError, match="another sweep"):
        RowJournal(path, "server", {**HEADER, "seed": 2}, resume=True)
    assert journal(path, 1, overwrite=True) == rows(1)


def test_a_journal_damaged_in_the_middle_is_not_patched_over(tmp_path):
    path = tmp_path / "j.jsonl"
    journal(path, 3)
    path.write_bytes(path.read_bytes().replace(b'"k1"', b'"k7"'))
    with pytest.raises(ArtifactDamaged, match=r"line 3.*changed"):
        RowJournal(path, "server", HEADER, resume=True)


def test_one_writer_at_a_time(tmp_path):
    path = tmp_path / "j.jsonl"
    with RowJournal(path, "server", HEADER) as log:
        log.append(rows(1)[0])
        for how in ({"resume": True}, {"overwrite": True}, {}):
            with pytest.raises(ArtifactError, match="Another process is writing"):
                RowJournal(path, "server", HEADER, **how)
        log.append(replace(rows(1)[0], order=9))
    assert len(journal(path, 2, resume=True)) == 2
