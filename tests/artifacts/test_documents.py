"""Documents, traces, atomic writes and bundled files."""

from __future__ import annotations

import ast
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import wispprof.artifacts as artifacts
from wispprof.artifacts import (
    AcceptanceTrace,
    TracePath,
    bundled_path,
    files,
    load_trace,
    read_document,
    save_trace,
    trace_hash,
    write_document,
)
from wispprof.artifacts.files import check_writable, write_atomic
from wispprof.artifacts.manifest import command_line
from wispprof.artifacts.rows import open_line, seal_line
from wispprof.artifacts.trace import quantized
from wispprof.errors import (
    ArtifactDamaged,
    ArtifactError,
    ArtifactMissing,
    ArtifactTooNew,
    ArtifactTooOld,
)
from wispprof.types import Sampling

leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    leaves | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=12,
)


@given(st.dictionaries(st.text(max_size=6), values, max_size=5))
@settings(max_examples=100, deadline=None)
def test_documents_round_trip(tmp_path_factory, payload):
    path = tmp_path_factory.mktemp("doc") / "x.json"
    digest = write_document(path, "plan", payload, {"trace": "blake2b:1"})
    document = read_document(path, "plan")
    assert document.payload == payload
    assert document.hash == digest
    assert document.inputs == {"trace": "blake2b:1"}
    assert document.provenance.versions["python"]


def test_documents_take_numpy_and_integer_keys(tmp_path):
    path = tmp_path / "x.json"
    write_document(path, "plan", {"a": np.float32(1.5), "b": np.arange(3), "c": {1: 1, 10: 2, 2: 3}})
    assert read_document(path, "plan").payload == {
        "a": 1.5,
        "b": [0, 1, 2],
        "c": {"1": 1, "10": 2, "2": 3},
    }
    with pytest.raises(ValueError, match="JSON"):
        write_document(path, "plan", {"a": float("inf")})
    assert read_document(path, "plan").payload["a"] == 1.5  # the refused write changed nothing


def test_damaged_documents(tmp_path):
    path = tmp_path / "x.json"
    write_document(path, "estimator", {"slope": 1.25})
    good = path.read_text()
    with pytest.raises(ArtifactDamaged, match=r"holds a estimator, not a plan"):
        read_document(path, "plan")
    path.write_text(good.replace("1.25", "1.5"))
    with pytest.raises(ArtifactDamaged, match="changed after it was written"):
        read_document(path, "estimator")
    path.write_text(good[: len(good) // 2])
    with pytest.raises(ArtifactDamaged, match=r"line \d+"):
        read_document(path, "estimator")
    path.write_text(good.replace("1.25", "NaN"))
    with pytest.raises(ArtifactDamaged, match="NaN"):
        read_document(path, "estimator")
    path.write_text(json.dumps({**json.loads(good), "schema": 3}))
    with pytest.raises(ArtifactTooNew, match=r"schema 3.*Upgrade"):
        read_document(path, "estimator")
    path.write_text(json.dumps({**json.loads(good), "schema": 1}))
    with pytest.raises(ArtifactTooOld, match=r"schema 1.*wispprof fit"):
        read_document(path, "estimator")
    path.write_text("{}")
    with pytest.raises(ArtifactDamaged, match="not a file of wispprof"):
        read_document(path, "estimator")
    path.unlink()
    with pytest.raises(ArtifactMissing, match=r"x\.json"):
        read_document(path, "estimator")
    with pytest.raises(ArtifactMissing):
        read_document(tmp_path, "estimator")  # a folder


# --- traces -------------------------------------------------------------------------------------


def make_path(seed, n, m, depth, width=0):
    rng = np.random.default_rng(seed)
    ranked = (None, None)
    if width:
        ranks = rng.integers(0, width + 1, m).astype(np.int32)
        ranked = (ranks, quantized(rng.uniform(0, 1, (m, width))))
    scale = 10.0 ** rng.integers(-30, 30, (m, depth, 4))
    return TracePath(
        tuple(int(t) for t in rng.integers(0, 5000, n)),
        tuple(int(t) for t in rng.integers(0, 5000, m)),
        rng.integers(0, 5000, (m, depth)).astype(np.int32),
        (rng.normal(size=(m, depth, 4)) * scale).astype(np.float32),
        rng.integers(0, depth + 1, m).astype(np.int32),
        *ranked,
    )


def make_trace(*paths, **meta):
    return AcceptanceTrace("target", "draft", "tok", Sampling(0.8, 5, 0.9, 7), paths, meta)


def same(a, b):
    return (
        a.prompt == b.prompt
        and a.path == b.path
        and all(
            np.array_equal(getattr(a, n), getattr(b, n)) and getattr(a, n).dtype == getattr(b, n).dtype
            for n in ("drafts", "features", "accepted")
        )
        and all(
            np.array_equal(getattr(a, n), getattr(b, n))
            if getattr(a, n) is not None
            else getattr(b, n) is None
            for n in ("target_ranks", "candidate_probs")
        )
    )


@given(st.integers(0, 1 << 30), st.integers(0, 9), st.integers(0, 20), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_traces_round_trip_exactly(tmp_path_factory, seed, n, m, depth):
    file = tmp_path_factory.mktemp("trace") / "t.jsonl"
    ranked = make_path(seed + 1, n, m, depth, width=16 if m else 0)
    trace = make_trace(make_path(seed, n, m, depth), ranked, note="x")
    digest = save_trace(trace, file)
    back = load_trace(file)
    assert all(same(a, b) for a, b in zip(trace.paths, back.paths, strict=True))
    assert (back.sampling, back.meta, back.target) == (trace.sampling, {"note": "x"}, "target")
    assert trace_hash(back) == digest


def with_first_feature(line: bytes, value: float) -> bytes:
    body = open_line(line, "here")
    return seal_line({**body, "features": [value, *body["features"][1:]]})


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (lambda lines: [*lines[:-1], lines[-1][:-30]], "line 4.*torn"),
        (lambda lines: lines[:-1], "line 3.*2 paths.*says 3"),
        (lambda lines: [lines[0], lines[2], lines[1], lines[3]], "not the lines"),
        (
            lambda lines: [*lines[:2], lines[2].replace(b"[", b"[1,", 1), lines[3]],
            "line 3.*changed",
        ),
        (lambda lines: [lines[0].replace(b"target", b"tergat"), *lines[1:]], "line 1.*changed"),
        (lambda lines: [lines[0], with_first_feature(lines[1], 1e308), *lines[2:]], "line 2.*not finite"),
        (lambda lines: [b"hello\n"], "not an acceptance trace"),
        (lambda lines: [], "not an acceptance trace"),
    ],
)
def test_damaged_traces_name_line_and_fault(tmp_path, how, says):
    file = tmp_path / "t.jsonl"
    save_trace(make_trace(*(make_path(s, 3, 9, 4) for s in range(3))), file)
    file.write_bytes(b"".join(how(file.read_bytes().splitlines(keepends=True))))
    with pytest.raises(ArtifactDamaged, match=says):
        load_trace(file)


@pytest.mark.parametrize(
    "change",
    [
        {"target_ranks": [17] * 9},
        {"target_ranks": [0] * 8},
        {"candidate_probs": [1] * 17},
        {"candidate_probs": []},
        {"candidate_probs": [10_001] * 144},
    ],
)
def test_candidates_that_do_not_fit_their_path_are_damage(tmp_path, change):
    file = tmp_path / "t.jsonl"
    save_trace(make_trace(make_path(0, 3, 9, 4, width=16)), file)
    head, line = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(head + seal_line({**open_line(line, "here"), **change}))
    with pytest.raises(ArtifactDamaged, match=r"line 2.*(target_ranks|reshape)"):
        load_trace(file)


def test_a_trace_with_wrong_shapes_is_not_written(tmp_path):
    path = make_path(0, 3, 9, 4)
    bad = TracePath(path.prompt, path.path, path.drafts, path.features[:, :, :3], path.accepted)
    with pytest.raises(ValueError, match="features"):
        save_trace(make_trace(bad), tmp_path / "t.jsonl")
    assert not list(tmp_path.iterdir())


# --- atomic writes, bundled files, no pickle ------------------------------------------------------


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    file = tmp_path / "a"
    write_atomic(file, b"old")

    def broken(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(file, b"new")
    assert file.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_bundled_files_are_found_in_a_checkout_and_in_a_wheel(tmp_path, monkeypatch):
    checkout, wheel = tmp_path / "checkout", tmp_path / "site-packages"
    for root, place in ((checkout, "profiles"), (wheel, "wispprof/_bundled/profiles")):
        (root / "wispprof").mkdir(parents=True)
        (root / place).mkdir(parents=True)
        (root / place / "a.jsonl").write_text("x")
    (checkout / "pyproject.toml").write_text("")
    (wheel / "models").mkdir()  # a stranger's folder in site-packages
    monkeypatch.setattr(files, "PACKAGE", checkout / "wispprof")
    assert bundled_path("profiles/a.jsonl") == checkout / "profiles/a.jsonl"
    monkeypatch.setattr(files, "PACKAGE", wheel / "wispprof")
    assert bundled_path("profiles/a.jsonl") == wheel / "wispprof/_bundled/profiles/a.jsonl"
    with pytest.raises(ArtifactMissing, match="does not hold models"):
        bundled_path("models")
    with pytest.raises(ValueError, match="relative"):
        bundled_path("../secrets")


def test_provenance_keeps_no_secrets(monkeypatch):
    words = ["/usr/bin/wispprof", "trace", "--server", "ws://x", "--key", "hush", "--api-key=hush"]
    monkeypatch.setattr("sys.argv", [*words, "--path-tokens", "9", "--server-token", "hush"])
    said = command_line()
    assert "hush" not in said
    assert said.startswith("wispprof trace --server ws://x --key")
    assert "--path-tokens 9" in said


def test_nothing_here_can_run_code_from_disk():
    """No module of this package imports pickle or similar, or calls eval or exec."""
    folder = Path(artifacts.__file__).parent
    for file in folder.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert not {"pickle", "marshal", "shelve"} & {a.name for a in node.names}
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"eval", "exec", "compile"}


def test_only_regular_files_are_replaced_and_links_stay(tmp_path):
    pipe, file, link, loop = (tmp_path / name for name in ("pipe", "file", "link", "loop"))
    os.mkfifo(pipe)
    file.write_bytes(b"old")
    link.symlink_to(file)
    loop.symlink_to(loop)
    for place, words in ((pipe, "not a regular file"), (tmp_path, "is a folder"), (loop, "Cannot write")):
        with pytest.raises(ArtifactError, match=words):
            check_writable(place)
        with pytest.raises(ArtifactError, match=words):
            write_atomic(place, b"new")
    assert pipe.is_fifo()
    check_writable(link)
    write_atomic(link, b"new")
    assert link.is_symlink()
    assert file.read_bytes() == b"new"
    with pytest.raises(OSError, match=re.escape(str(file / "below"))):
        write_atomic(file / "below", b"")
