"""Bad input through the command line: one line with a hint, an exit code, no torn files."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from wispprof.artifacts import load_server, make_profile, save_profile, write_document
from wispprof.artifacts.manifest import Manifest
from wispprof.artifacts.rows import StepRow
from wispprof.cli import app, console
from wispprof.types import BatchShape, ModelInfo

RUNNER = CliRunner()


def run(*arguments: object) -> Result:
    return RUNNER.invoke(app, [str(a) for a in arguments])


def assert_one_line(done: Result, *expected: str) -> None:
    assert done.exit_code == console.FAULT, done.output
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, done.stderr
    assert "Traceback" not in done.stderr
    for words in expected:
        assert words in errors[0], errors[0]


def server_profile(folder: Path, shapes: int = 24) -> Path:
    """A profile as a linear machine would give it."""
    rows = []
    for number in range(shapes):
        shape = BatchShape.uniform(1 + number % 6, 1 + number % 3, 64 * (1 + number // 4))
        taken = 2.0 + 0.2 * shape.new_tokens + 0.003 * shape.cached_tokens
        rows.append(StepRow(f"r{number}", "verify", shape, (taken, taken * 1.01), order=number))
    path = folder / "server"
    save_profile(make_profile(Manifest("server", ModelInfo("tiny")), rows), path)
    return path.with_suffix(".jsonl")


# --- models -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("profile-server", "--model"),
        ("profile-edge", "--draft"),
        ("serve", "--port", "0", "--target"),
    ],
)
def test_a_missing_model_folder(arguments: tuple[str, ...], tmp_path: Path) -> None:
    out = tmp_path / "out" / "profile"
    more = () if arguments[0] == "serve" else ("--out", out)
    done = run(*arguments, tmp_path / "no-model", *more)
    assert_one_line(done, "no-model")
    assert not out.parent.exists()


# --- artifacts --------------------------------------------------------------------------------------


def test_a_missing_profile(tmp_path: Path) -> None:
    done = run("fit", "--server", tmp_path / "none.jsonl", "--out", tmp_path / "fit")
    assert_one_line(done, "none")
    assert not (tmp_path / "fit").exists()


def test_a_damaged_profile_names_the_line(tmp_path: Path) -> None:
    path = server_profile(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[4] = lines[4].replace(b'"samples_ms":[', b'"samples_ms":[9')
    path.write_bytes(b"".join(lines))
    done = run("fit", "--server", path, "--out", tmp_path / "fit")
    assert_one_line(done, "line 5")
    assert not (tmp_path / "fit").exists()


def test_a_torn_profile(tmp_path: Path) -> None:
    path = server_profile(tmp_path)
    path.write_bytes(path.read_bytes()[:-9])
    assert_one_line(run("fit", "--server", path, "--out", tmp_path / "fit"), "torn")


def test_a_newer_artifact_says_upgrade(tmp_path: Path) -> None:
    write_document(tmp_path / "bench.json", "bench", {"policy": "wisp", "load": {}, "figures": {}})
    text = json.loads((tmp_path / "bench.json").read_text())
    text["schema"] = 99
    (tmp_path / "bench.json").write_text(json.dumps(text, indent=1))
    done = run("report", tmp_path)
    assert_one_line(done, "schema 99", "Upgrade")
    assert not (tmp_path / "report.html").exists()


def test_a_newer_profile_says_upgrade(tmp_path: Path) -> None:
    path = server_profile(tmp_path)
    manifest = path.with_name("server.manifest.json")
    text = json.loads(manifest.read_text())
    text["schema"] = 99
    manifest.write_text(json.dumps(text))
    assert_one_line(run("fit", "--server", path, "--out", tmp_path / "fit"), "schema 99")


def test_negative_control_a_whole_profile_fits(tmp_path: Path) -> None:
    path = server_profile(tmp_path)
    done = run("fit", "--server", path, "--out", tmp_path / "fit", "--estimator", "wisp-linear", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["estimator"]["chosen"] == "wisp-linear"


def test_an_empty_folder_has_no_report(tmp_path: Path) -> None:
    assert_one_line(run("report", tmp_path), "holds no artifact")
    assert_one_line(run("report", tmp_path / "nowhere"), "no folder")


# --- ports ------------------------------------------------------------------------------------------


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_a_port_in_use(taken_port: int, tmp_path: Path) -> None:
    done = run("serve", "--target", tmp_path, "--port", taken_port)
    assert_one_line(done, str(taken_port), "--port")


def test_listening_beyond_loopback_needs_a_key(tmp_path: Path) -> None:
    done = run("serve", "--target", tmp_path, "--host", "0.0.0.0", "--port", "0")
    assert_one_line(done, "API key")


# --- Ctrl-C -----------------------------------------------------------------------------------------


def test_ctrl_c_while_profiling_keeps_whole_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted in the middle of a run: exit 130, rows on disk are complete, and --resume ends it."""
    from wispprof.profiling.server_profiler import EngineRunner

    out = tmp_path / "server"
    arguments = (
        *("profile-server", "--shape", "tiny-llama", "--grid", "quick", "--repeats", "3"),
        *("--items", "1,4", "--new", "1,4", "--cached", "16,64", "--out", out),
    )
    run_once, workloads = EngineRunner.run_once, 0

    def interrupted(runner: EngineRunner) -> float:
        nonlocal workloads
        workloads += 1
        if workloads > 90:
            raise KeyboardInterrupt
        return run_once(runner)

    monkeypatch.setattr("wispprof.profiling.server_profiler.check_physics", lambda *_: _Physics())
    monkeypatch.setattr(EngineRunner, "run_once", interrupted)
    done = run(*arguments)
    assert done.exit_code == console.INTERRUPTED, done.output
    assert "Traceback" not in done.stderr
    assert not out.with_suffix(".jsonl").exists(), "an unfinished profile must not be complete"
    journal = tmp_path / "server.journal.jsonl"
    rows = len(journal.read_bytes().splitlines()) - 1
    assert rows > 0
    assert journal.read_bytes().endswith(b"\n")

    monkeypatch.setattr(EngineRunner, "run_once", run_once)
    done = run(*arguments, "--resume")
    assert done.exit_code == 0, done.output
    profile = load_server(out)
    keys = [row.key for row in profile.rows if row.kind != "sentinel"]
    assert len(keys) == len(set(keys)) > rows / 2
    assert not journal.exists()


class _Physics:
    """Times of a model this small are all overhead: the physics check has a test of its own."""

    def as_dict(self) -> dict[str, object]:
        return {}


# --- places and certificates ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("profile-server", "--model", "nowhere"),
        ("profile-edge", "--draft", "nowhere"),
        ("trace", "--model", "nowhere"),
    ],
)
def test_a_place_that_takes_no_file_is_refused_before_models_load(
    arguments: tuple[str, ...], tmp_path: Path
) -> None:
    for name in ("pipe", "pipe.jsonl"):
        os.mkfifo(tmp_path / name)
    assert_one_line(run(*arguments, "--out", tmp_path / "pipe"), "is not a regular file")
    assert (tmp_path / "pipe").is_fifo()


def test_a_folder_that_takes_no_files_is_one_line(tmp_path: Path) -> None:
    server_profile(tmp_path)
    assert_one_line(run("report", tmp_path, "--out", "/proc/x"), "/proc/x")
    assert_one_line(run("report", tmp_path, "--out", tmp_path / "server.jsonl" / "x"), "server.jsonl/x")


def test_certificate_and_key_swapped(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    cert.write_text("-----BEGIN PRIVATE KEY-----\nAA==\n-----END PRIVATE KEY-----\n")
    key.write_text("-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n")
    served = ("serve", "--target", "nowhere", "--port", "0", "--tls-cert", cert, "--tls-key", key)
    assert_one_line(run(*served), "cert.pem holds a private key", "Swap --tls-cert and --tls-key.")


@pytest.mark.parametrize("command", [("serve", "--target"), ("edge", "--server", "127.0.0.1:1", "--draft")])
def test_a_port_in_use_is_found_before_models_load(command: tuple[str, ...]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert_one_line(run(*command, "nowhere", "--port", port), f"Cannot listen on 127.0.0.1:{port}")


def test_progress_without_a_terminal_is_a_line_every_ten_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    console.console.cache_clear()
    with console.tracker("sweep", 40, clock=lambda: now) as report:
        for number in range(40):
            now += 1.0
            report(number, status="ETA 0:30")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sweep  ")]
    assert lines == [f"sweep  {number}/40  ETA 0:30" for number in (9, 19, 29, 39)]
    console.console.cache_clear()
