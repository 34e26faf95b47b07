"""The doctor reports each injected fault with a hint, and none for a healthy context."""

from __future__ import annotations

import json
import os
import socket
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from wispprof import doctor
from wispprof.artifacts import write_document
from wispprof.cli import app
from wispprof.doctor import DoctorContext, Finding, examine, machine_checks, serving_checks

HEALTHY = DoctorContext(environ={})


def one(check: Callable[[DoctorContext], Finding], context: DoctorContext) -> Finding:
    return next(iter(examine(context, [check])))


def assert_fault(finding: Finding, *words: str, status: str = "fail") -> None:
    assert finding.status == status, finding
    assert finding.hint, finding
    for word in words:
        assert word in finding.message + finding.hint, finding


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.mark.parametrize(
    "check",
    [
        doctor.installation,
        doctor.threads,
        doctor.clock,
        doctor.api_keys,
        doctor.tls,
        doctor.server,
        doctor.artifacts,
    ],
)
def test_a_healthy_context_has_no_fault(check: Callable[[DoctorContext], Finding]) -> None:
    finding = one(check, HEALTHY)
    assert finding.status in ("ok", "skip"), finding


# --- planted faults ---------------------------------------------------------------------------------


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "msgspec":
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.0.1" if name == "numpy" else real(name)

    monkeypatch.setattr(machine_checks.importlib.metadata, "version", version)
    assert_fault(one(doctor.installation, HEALTHY), "msgspec is missing", "numpy 0.0.1", "pip")


@pytest.mark.parametrize("asked", ["0", "4096", "many"])
def test_wrong_threads(asked: str) -> None:
    context = replace(HEALTHY, environ={"OMP_NUM_THREADS": asked})
    assert_fault(one(doctor.threads, context), asked, status="warn")


def test_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    class Little:
        available = 100 << 20

    monkeypatch.setattr(psutil, "virtual_memory", Little)
    assert_fault(one(doctor.memory, HEALTHY), "GiB", status="warn")


def test_a_busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (1e3, 1e3, 1e3))
    assert_fault(one(doctor.load, HEALTHY), "other programs", status="warn")


def test_a_wrong_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_checks.time, "time", lambda: 0.0)
    assert_fault(one(doctor.clock, HEALTHY), "certificates", status="warn")


def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken = replace(HEALTHY, port=int(listener.getsockname()[1]))
        assert_fault(one(doctor.port, taken), "--port")
        named = replace(taken, server=f"ws://localhost:{taken.port}")
        assert one(doctor.port, named).status == "ok"  # what listens is what is asked about
        for other in ("localhost:1", f"elsewhere:{taken.port}"):
            assert_fault(one(doctor.port, replace(taken, server=other)), "--port")
    assert one(doctor.port, replace(HEALTHY, port=free_port())).status == "ok"


def test_no_key_beyond_loopback() -> None:
    assert_fault(one(doctor.api_keys, replace(HEALTHY, host="0.0.0.0")), "--api-key-file")


def test_keys_that_are_short_missing_or_readable_by_others(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    context = replace(HEALTHY, api_key_file=file)
    assert_fault(one(doctor.api_keys, context), "not exist")
    file.write_text("short\n")
    assert_fault(one(doctor.api_keys, context), "16")
    file.write_text("k" * 32)
    file.chmod(0o644)
    assert_fault(one(doctor.api_keys, context), "chmod 600", status="warn")
    file.chmod(stat.S_IRUSR)
    assert one(doctor.api_keys, context).status == "ok"


def test_tls_halves_and_nonsense(tmp_path: Path) -> None:
    cert = tmp_path / "cert.pem"
    cert.write_text("nonsense")
    assert_fault(one(doctor.tls, replace(HEALTHY, tls_cert=cert)), "missing")
    assert_fault(one(doctor.tls, replace(HEALTHY, tls_cert=cert, tls_key=cert)), "Cannot use")
    assert_fault(one(doctor.tls, replace(HEALTHY, host="0.0.0.0")), "--tls-cert", status="warn")


def test_a_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wispprof.doctor.serving_checks.CONNECT_MS", 50.0)
    away = replace(HEALTHY, server=f"127.0.0.1:{free_port()}")
    assert_fault(one(doctor.server, away), "wispprof serve")
    assert_fault(one(doctor.server, replace(HEALTHY, server="ftp://x")), "address")


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    assert_fault(one(doctor.output_folder, replace(HEALTHY, out=tmp_path / "out" / "a")), "--out")


def test_damaged_and_newer_artifacts(tmp_path: Path) -> None:
    context = replace(HEALTHY, run=tmp_path)
    write_document(tmp_path / "bench.json", "bench", {"policy": "wisp"})
    assert one(doctor.artifacts, context).status == "ok"
    whole = json.loads((tmp_path / "bench.json").read_text())
    (tmp_path / "bench.json").write_text(json.dumps({**whole, "schema": 99}, indent=1))
    assert_fault(one(doctor.artifacts, context), "Upgrade")
    (tmp_path / "bench.json").write_text(json.dumps({**whole, "payload": {"x": 1}}, indent=1))
    assert_fault(one(doctor.artifacts, context), "changed")
    assert_fault(one(doctor.artifacts, replace(context, run=tmp_path / "none")), "--run")


def test_a_missing_model(tmp_path: Path) -> None:
    context = replace(HEALTHY, target=str(tmp_path / "none"), draft=str(tmp_path / "none"))
    assert_fault(one(doctor.models, context), "none")


def test_models_that_are_no_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    def loaded(path: str, draft: bool = False) -> object:
        pairs = {
            "big": (9, "a"),
            "equal": (9, "a"),
            "small": (1, "a"),
            "other": (1, "b"),
            "bare": (1, ""),
            "base": (1, "a"),
        }
        size, tokenizer = pairs[path]
        info = SimpleNamespace(id=path, family="llama", parameters=size, tokenizer_hash=tokenizer)
        ends = SimpleNamespace(eos_token="<|end|>" if path == "base" else "<|im_end|>")
        return SimpleNamespace(info=info, tokenizer=ends)

    monkeypatch.setattr(serving_checks, "_load", loaded)

    def both(target: str, draft: str) -> DoctorContext:
        return replace(HEALTHY, target=target, draft=draft)

    fine = one(doctor.models, both("big", "small"))
    assert (fine.status, fine.message) == (
        "ok",
        "target big: llama, 0.0 M parameters; draft small: llama, 0.0 M",
    )
    assert one(doctor.tokenizers, both("big", "small")).status == "ok"
    assert_fault(one(doctor.models, both("small", "big")), "smaller draft", status="warn")
    assert_fault(one(doctor.models, both("big", "equal")), "smaller draft", status="warn")
    quantised = SimpleNamespace(info=loaded("equal").info)  # type: ignore[attr-defined]
    monkeypatch.setattr(serving_checks, "_gguf", lambda path, settings: quantised)
    assert one(doctor.models, both("big", "big.gguf")).status == "ok"
    assert_fault(one(doctor.tokenizers, both("big", "other")), "different tokenizers")
    assert_fault(one(doctor.tokenizers, both("big", "bare")), "no tokenizer")
    base = one(doctor.tokenizers, both("big", "base"))
    assert (base.status, "ends a text with <|im_end|>" in base.message) == ("warn", True)


def test_vllm_that_is_missing_untested_or_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    from wispprof.engines.vllm import versions

    chosen = replace(HEALTHY, engine="vllm")
    monkeypatch.setattr(versions, "installed_vllm", lambda: None)
    assert one(doctor.vllm, HEALTHY).status == "skip"
    assert_fault(one(doctor.vllm, chosen), "not installed", "pip install vllm==")
    monkeypatch.setattr(versions, "installed_vllm", lambda: "9.9")
    monkeypatch.setattr(versions, "changed_functions", list)
    assert_fault(one(doctor.vllm, HEALTHY), "9.9", "--vllm-untested", status="warn")
    monkeypatch.setattr(versions, "changed_functions", lambda: ["step(self)"])
    assert_fault(one(doctor.vllm, HEALTHY), "step(self)")


def test_vllm_on_a_cpu_without_intels_openmp(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from wispprof.engines.vllm import cpu_workers

    monkeypatch.setattr(cpu_workers, "on_cpu_build", lambda: True)
    monkeypatch.setattr(cpu_workers, "openmp_library", lambda: None)
    assert_fault(one(doctor.vllm_on_cpu, HEALTHY), "pip install intel-openmp", status="warn")
    monkeypatch.setattr(cpu_workers, "openmp_library", lambda: tmp_path / "libiomp5.so")
    assert one(doctor.vllm_on_cpu, HEALTHY).status == "ok"


# --- the command ------------------------------------------------------------------------------------


def test_the_command_prints_one_json_document_and_fails_where_something_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "CHECKS", (doctor.clock, doctor.output_folder))
    done = CliRunner().invoke(app, ["doctor", "--json", "--out", str(tmp_path)])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["ok"] is True
    (tmp_path / "file").write_text("")
    done = CliRunner().invoke(app, ["doctor", "--json", "--out", str(tmp_path / "file")])
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    assert [f["status"] for f in found["findings"]] == ["ok", "fail"]
