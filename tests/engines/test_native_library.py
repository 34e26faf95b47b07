"""Compiling a C source on first use: where it is kept, what is loaded, and what a user is told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from wispprof.engines.torch import native_library, ragged_attention
from wispprof.engines.torch.native_library import NotBuilt, load

needs_gcc = pytest.mark.skipif(ragged_attention.kernel().function is None, reason="no gcc here")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "answer.c"
    path.write_text("int answer(void) { return 42; }\n", encoding="utf-8")
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "of a user"))
    return tmp_path / "of a user" / "wispprof"


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that compiled something."""
    commands: list[list[str]] = []
    run = native_library._run

    def noted(command: list[str], timeout_s: float) -> bytes:
        if "-shared" in command:
            commands.append(command)
        return run(command, timeout_s)

    monkeypatch.setattr(native_library, "_run", noted)
    return commands


@pytest.fixture
def kept_elsewhere(source: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library of the source's name in the cache folder of another user, with other content.

    A path is loaded once in a process, whatever lies there later.
    """
    load(source)
    (kept,) = cache.iterdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    folder = tmp_path / "elsewhere" / "wispprof"
    folder.mkdir(mode=0o700, parents=True)
    other = folder / kept.name
    other.write_bytes(b"not a library: loading it fails")
    return other


def script(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


@needs_gcc
def test_a_library_is_built_once(source: Path, cache: Path, compilations: list[list[str]]) -> None:
    assert [load(source).answer(), load(source).answer()] == [42, 42]
    assert len(compilations) == 1
    (kept,) = cache.iterdir()
    assert (cache.stat().st_mode & 0o777, kept.stat().st_mode & 0o777) == (0o700, 0o600)


@needs_gcc
def test_another_source_is_another_library(source: Path, cache: Path, compilations: list[list[str]]) -> None:
    load(source)
    source.write_text("int answer(void) { return 43; }\n", encoding="utf-8")
    assert load(source).answer() == 43
    assert len(compilations) == len(list(cache.iterdir())) == 2


@needs_gcc
def test_a_damaged_library_is_built_again(
    source: Path, kept_elsewhere: Path, compilations: list[list[str]]
) -> None:
    damaged = kept_elsewhere.read_bytes()
    assert load(source).answer() == 42
    assert len(compilations) == 1
    assert kept_elsewhere.read_bytes() != damaged


@needs_gcc
@pytest.mark.parametrize("others_write", ["folder", "library"])
def test_code_that_others_may_have_written_is_not_loaded(
    source: Path,
    kept_elsewhere: Path,
    compilations: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    others_write: str,
) -> None:
    (kept_elsewhere.parent if others_write == "folder" else kept_elsewhere).chmod(0o777)
    loaded: list[str] = []
    library = native_library.ctypes.CDLL
    monkeypatch.setattr(native_library.ctypes, "CDLL", lambda path: loaded.append(path) or library(path))
    planted = kept_elsewhere.read_bytes()
    assert load(source).answer() == 42
    assert len(compilations) == 1
    assert len(loaded) == 1  # not the planted one first
    assert (kept_elsewhere.read_bytes() == planted) == (others_write == "folder")


@needs_gcc
@pytest.mark.parametrize("home", ["none", "a file"])
def test_without_a_cache_folder_each_process_compiles(
    source: Path, compilations: list[list[str]], monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    if home == "none":
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", no_home)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", str(source))
    assert [load(source).answer(), load(source).answer()] == [42, 42]
    assert len(compilations) == 2
    assert not any(Path(command[command.index("-o") + 1]).exists() for command in compilations)


@needs_gcc
def test_a_compiler_may_have_arguments(
    source: Path, cache: Path, compilations: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "cc -DNOTHING='a b'")
    assert load(source).answer() == 42
    assert compilations[0][:2] == ["cc", "-DNOTHING=a b"]


@pytest.mark.parametrize(
    ("says", "why"),
    [
        pytest.param(None, "there is no C compiler no-such-compiler", id="no compiler"),
        pytest.param("exit 3", "the compiler failed: exit status 3", id="fails"),
        pytest.param(
            "echo first >&2; echo 'no space left' >&2; exit 1", "failed: no space left", id="says why"
        ),
        pytest.param("echo Apple clang version 16", "is clang, and only gcc shares", id="clang"),
        pytest.param("sleep 30", "took more than 0 s", id="hangs"),
    ],
)
def test_a_library_that_cannot_be_built_says_why(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, says: str | None, why: str
) -> None:
    monkeypatch.setattr(native_library, "_ASK_S", 0.2 if says == "sleep 30" else 10.0)
    compiler = "no-such-compiler" if says is None else str(script(tmp_path, "compiler", says))
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(NotBuilt, match=why):
        load(source)
    assert not cache.exists() or not os.listdir(cache)
