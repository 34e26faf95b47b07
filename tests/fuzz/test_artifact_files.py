"""Whatever a file holds, its reader returns it or raises one of the project's own errors.

Two kinds of change: bytes, as disks and editors damage them; and values inside, with the checksums corrected
afterwards, as an attacker would.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from artifact_samples import PROVENANCE, Reader, write_samples
from fuzzing import counts, fuzz
from hypothesis import given
from hypothesis import strategies as st

from wispprof.artifacts import files, write_document
from wispprof.artifacts.rows import open_line, seal_line
from wispprof.errors import WispprofError

Samples = dict[str, tuple[Path, Reader]]

NAMES = (
    *(f"{kind} {part}" for kind in ("server", "edge", "link") for part in ("rows", "manifest")),
    "trace",
    *(f"estimator {kind}" for kind in ("wisp-linear", "staircase", "forest", "wispprof")),
    *(f"predictor {kind}" for kind in ("threshold", "margin-logistic", "wisp-mlp", "lightgbm")),
    "plan",
    "bench",
    "journal",
    "step log",
    "request log",
)
SEALED = ("server rows", "edge rows", "link rows", "trace", "journal")
MANIFESTS = tuple(n for n in NAMES if n.endswith("manifest"))
DOCUMENTS = tuple(n for n in NAMES if n.startswith(("estimator", "predictor", "plan")))


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    return write_samples(tmp_path_factory.mktemp("originals"))


@pytest.fixture
def samples(originals: Samples, tmp_path: Path) -> Samples:
    """A copy of all files, since profiles are read as pairs."""
    folder = tmp_path / "samples"
    if not folder.exists():
        shutil.copytree(next(iter(originals.values()))[0].parent, folder)
    return {name: (folder / path.name, reader) for name, (path, reader) in originals.items()}


def read(reader: Reader, path: Path) -> Any:
    """What was read, or the project's own error; anything else is a defect."""
    counts["files"] += 1
    found: Any
    try:
        found = reader(path)
    except WispprofError as err:
        found = err
    if isinstance(found, WispprofError):
        assert found.hint, f"{found!r} does not say what to do"
    return found


def test_every_kind_is_here_and_readable(samples: Samples) -> None:
    assert set(NAMES) == set(samples)
    for name, (path, reader) in samples.items():
        assert not isinstance(read(reader, path), WispprofError), name


# --- bytes ----------------------------------------------------------------------------------------


DAMAGE = st.tuples(
    st.sampled_from(["flip", "cut", "hole", "double", "insert", "zero"]),
    st.floats(0, 1, exclude_max=True),
    st.sampled_from([1, 2, 7, 64, 4096]),
    st.binary(min_size=1, max_size=8),
)


def damaged(data: bytes, how: str, where: float, size: int, junk: bytes) -> bytes:
    """What disks, editors and transfers do: flipped bytes, cut ends, holes, repeated parts."""
    at = int(where * len(data))
    if how == "flip":
        return data[:at] + bytes([data[at] ^ (junk[0] or 1)]) + data[at + 1 :]
    if how == "cut":
        return data[:at]
    if how == "hole":
        return data[:at] + data[at + size :]
    if how == "double":
        return data[: at + size] + data[at:]
    if how == "zero":
        return data[:at] + bytes(size) + data[at + size :]
    return data[:at] + junk + data[at:]


@pytest.mark.parametrize("name", NAMES)
@fuzz(60, len(NAMES))
@given(damage=DAMAGE)
def test_damaged_bytes(samples: Samples, originals: Samples, name: str, damage: Any) -> None:
    path, reader = samples[name]
    whole = originals[name][0].read_bytes()
    path.write_bytes(damaged(whole, *damage))
    read(reader, path)
    path.write_bytes(whole)


# --- values ---------------------------------------------------------------------------------------

STRANGE = st.sampled_from(
    [None, True, -1, 0, 10**400, 1e308, -0.0, "", "x", "9" * 30, [], [[]], {}, {"": None}, [None]]
)


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something could be changed: paths of keys and indices, of long lists only both ends."""
    if at:
        yield at
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*at, key))
    elif isinstance(value, list):
        for index in sorted({0, 1, len(value) - 1} & set(range(len(value)))):
            yield from places(value[index], (*at, index))


def changed(data: Any, value: Any) -> Any:
    """The value with one place removed, replaced by something strange, or lengthened."""
    value = copy.deepcopy(value)
    place = data.draw(st.sampled_from(sorted(places(value), key=repr)))
    holder = value
    for step in place[:-1]:
        holder = holder[step]
    how = data.draw(st.sampled_from(["replace", "replace", "remove", "lengthen"]))
    old = holder[place[-1]]
    if how == "remove":
        del holder[place[-1]]
    elif how == "lengthen" and isinstance(old, list):
        holder[place[-1]] = old + old[:1]
    else:
        holder[place[-1]] = data.draw(STRANGE)
    return value


@pytest.mark.parametrize("name", DOCUMENTS)
@fuzz(60, len(DOCUMENTS))
@given(data=st.data())
def test_wrong_values_with_a_right_hash(samples: Samples, originals: Samples, name: str, data: Any) -> None:
    path, reader = samples[name]
    document = json.loads(originals[name][0].read_bytes())
    kind = document["format"].removeprefix("wispprof/")
    payload = changed(data, document["payload"])
    write_document(path, kind, payload, document["inputs"], PROVENANCE)
    read(reader, path)


@pytest.mark.parametrize("name", SEALED)
@fuzz(60, len(SEALED))
@given(data=st.data())
def test_wrong_values_in_sealed_lines(samples: Samples, originals: Samples, name: str, data: Any) -> None:
    path, reader = samples[name]
    lines = originals[name][0].read_bytes().splitlines(keepends=True)
    number = data.draw(st.integers(0, len(lines) - 1))
    body = changed(data, open_line(lines[number], "here"))
    lines[number] = seal_line(body)
    if name == "trace" and number:
        # The header holds the hash of all lines: make it right too.
        header = open_line(lines[0], "here")
        lines[0] = seal_line({**header, "hash": files.content_hash(b"".join(lines[1:]))})
    path.write_bytes(b"".join(lines))
    if name.endswith("rows"):
        manifest = path.with_name(path.name.replace(".jsonl", ".manifest.json"))
        stated = json.loads(originals[name.replace("rows", "manifest")][0].read_bytes())
        stated["rows_hash"] = files.content_hash(path.read_bytes())
        manifest.write_text(json.dumps(stated))
    read(reader, path)


@pytest.mark.parametrize("name", MANIFESTS)
@fuzz(60, len(MANIFESTS))
@given(data=st.data())
def test_wrong_values_in_manifests(samples: Samples, originals: Samples, name: str, data: Any) -> None:
    path, reader = samples[name]
    stated = json.loads(originals[name][0].read_bytes())
    path.write_text(json.dumps(changed(data, stated)))
    read(reader, path)


@fuzz(60)
@given(data=st.data())
def test_strange_step_records(samples: Samples, originals: Samples, data: Any) -> None:
    path, reader = samples["step log"]
    lines = originals["step log"][0].read_text().splitlines()
    lines[-1] = json.dumps(changed(data, json.loads(lines[-1])))
    path.write_text("\n".join(lines) + "\n")
    read(reader, path)


def test_a_reader_that_raises_another_error_fails_these_tests(samples: Samples) -> None:
    path, _ = samples["plan"]
    path.write_bytes(b"{")
    with pytest.raises(json.JSONDecodeError):
        read(lambda file: json.loads(file.read_bytes()), path)
