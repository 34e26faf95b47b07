"""The `doctor` command finds each fault injected into an installation, and says what to do.

A small healthy installation is made once: a pair of models, keys, a certificate and artifacts. Each case
breaks one thing in it. Exactly that finding must then differ from the healthy run.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from wispprof.artifacts import read_document, write_document
from wispprof.artifacts.document import SCHEMA
from wispprof.cli import app
from wispprof.doctor import serving_checks

VARIABLE_CHECKS = {"memory", "load", "sensors", "devices"}
"""Findings that may differ between two runs on a shared machine."""


class Installation:
    """Files of an installation, and the options and environment of the command that checks it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.options: dict[str, str] = {
            "target": str(root / "target"),
            "draft": str(root / "draft"),
            "host": "0.0.0.0",
            "port": str(free_port()),
            "api-key-file": str(root / "keys"),
            "tls-cert": str(root / "cert.pem"),
            "tls-key": str(root / "key.pem"),
            "out": str(root / "out"),
            "run": str(root / "run"),
        }
        self.environ = {"OMP_NUM_THREADS": "1"}
        self.held: list[socket.socket] = []


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def examine(installation: Installation) -> tuple[int, dict[str, tuple[str, str]]]:
    """Exit code; check → (status, message and hint)."""
    serving_checks._load.cache_clear()
    words = [word for name, value in installation.options.items() for word in (f"--{name}", value)]
    done = CliRunner().invoke(app, ["doctor", "--json", *words], env=installation.environ)
    assert done.exit_code in (0, 1), done.output
    found: list[dict[str, Any]] = json.loads(done.stdout)["findings"]
    for finding in found:
        assert finding["hint"] or finding["status"] in ("ok", "skip"), finding
    return done.exit_code, {
        f["check"]: (f["status"], f"{f['message']} {f['hint']}")
        for f in found
        if f["check"] not in VARIABLE_CHECKS
    }


def make_model(folder: Path, layers: int, words: int = 94) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from wispprof.engines.loading import random_model
    from wispprof.engines.model_shapes import PRESETS

    config = {**PRESETS["tiny-llama"], "num_hidden_layers": layers}
    random_model(config, device="cpu").model.save_pretrained(folder)
    vocabulary = {"<s>": 0, "</s>": 1} | {f"w{i}": i + 2 for i in range(words)}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="</s>").save_pretrained(folder)


def make_certificate(folder: Path, days: int = 90) -> None:
    files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    options = ["-nodes", "-subj", "/CN=localhost", "-days", str(days)]
    subprocess.run([*command, *options, *files], check=True, capture_output=True)


@pytest.fixture(scope="module")
def healthy_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl for a certificate")
    root = tmp_path_factory.mktemp("healthy")
    make_model(root / "target", layers=2)
    make_model(root / "draft", layers=1)
    make_certificate(root)
    (root / "keys").write_text("k" * 32 + "\n")
    (root / "keys").chmod(0o600)
    (root / "run").mkdir()
    write_document(root / "run" / "predictor.json", "predictor", {"of": "a trace"})
    made_from = read_document(root / "run" / "predictor.json", "predictor").hash
    write_document(root / "run" / "bench.json", "bench", {"rows": []}, {"predictor": made_from})
    return root


@pytest.fixture
def installation(healthy_files: Path, tmp_path: Path) -> Iterator[Installation]:
    copy = tmp_path / "copy"
    shutil.copytree(healthy_files, copy)
    copied = Installation(copy)
    yield copied
    for listener in copied.held:
        listener.close()


# --- the faults -----------------------------------------------------------------------------------


def no_weights(installation: Installation) -> None:
    (installation.root / "target" / "model.safetensors").unlink()


def cut_weights(installation: Installation) -> None:
    file = installation.root / "target" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def weights_of_nan(installation: Installation) -> None:
    from safetensors.torch import load_file, save_file

    file = installation.root / "target" / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"].fill_(float("nan"))
    save_file(weights, file, metadata={"format": "pt"})


def swapped_pair(installation: Installation) -> None:
    options = installation.options
    options["target"], options["draft"] = options["draft"], options["target"]


def another_tokenizer(installation: Installation) -> None:
    shutil.rmtree(installation.root / "draft")
    make_model(installation.root / "draft", layers=1, words=50)


def no_tokenizer(installation: Installation) -> None:
    for file in (installation.root / "draft").glob("tokenizer*"):
        file.unlink()


def port_taken(installation: Installation) -> None:
    listener = socket.create_server(("0.0.0.0", 0))
    installation.held.append(listener)
    installation.options["port"] = str(listener.getsockname()[1])


def no_key(installation: Installation) -> None:
    del installation.options["api-key-file"]


def short_key(installation: Installation) -> None:
    (installation.root / "keys").write_text("secret\n")


def keys_that_are_not_text(installation: Installation) -> None:
    (installation.root / "keys").write_bytes(b"\xff\xfe" * 20)


def open_keys(installation: Installation) -> None:
    (installation.root / "keys").chmod(0o644)


def another_keys_certificate(installation: Installation) -> None:
    key = (installation.root / "key.pem").read_text()
    make_certificate(installation.root)
    (installation.root / "key.pem").write_text(key)


def expiring_certificate(installation: Installation) -> None:
    make_certificate(installation.root, days=3)


def no_server(installation: Installation) -> None:
    installation.options["server"] = f"127.0.0.1:{free_port()}"


def out_is_a_file(installation: Installation) -> None:
    (installation.root / "out").write_text("")


def edited_result(installation: Installation) -> None:
    file = installation.root / "run" / "bench.json"
    file.write_text(file.read_text().replace('"rows": []', '"rows": [1]'))


def result_of_a_newer_version(installation: Installation) -> None:
    file = installation.root / "run" / "bench.json"
    text = file.read_text()
    assert f'"schema": {SCHEMA}' in text
    file.write_text(text.replace(f'"schema": {SCHEMA}', f'"schema": {SCHEMA + 5}'))


def refitted_since(installation: Installation) -> None:
    write_document(installation.root / "run" / "predictor.json", "predictor", {"of": "another trace"})


def too_many_threads(installation: Installation) -> None:
    installation.environ["OMP_NUM_THREADS"] = "4096"


FAULTS: dict[Callable[[Installation], None], tuple[str, str, str]] = {
    # fault: (the check that finds it, its status, words of its message or hint)
    no_weights: ("models", "fail", "download"),
    cut_weights: ("models", "fail", "download is complete"),
    weights_of_nan: ("models", "fail", "Download them again"),
    swapped_pair: ("models", "warn", "Swap --target and --draft"),
    another_tokenizer: ("tokenizers", "fail", "target's family"),
    no_tokenizer: ("tokenizers", "fail", "Copy the tokenizer files"),
    port_taken: ("port", "fail", "choose another --port"),
    no_key: ("API keys", "fail", "--api-key-file"),
    short_key: ("API keys", "fail", "at least 16"),
    keys_that_are_not_text: ("API keys", "fail", "one key per line"),
    open_keys: ("API keys", "warn", "chmod 600"),
    another_keys_certificate: ("TLS", "fail", "its private key"),
    expiring_certificate: ("TLS", "warn", "Renew it"),
    no_server: ("server", "fail", "wispprof serve"),
    out_is_a_file: ("output folder", "fail", "--out"),
    edited_result: ("artifacts", "fail", "make it anew"),
    result_of_a_newer_version: ("artifacts", "fail", "Upgrade"),
    refitted_since: ("artifacts", "warn", "Fit and plan again"),
    too_many_threads: ("threads", "warn", "oversubscribed"),
}


def test_the_healthy_installation_is_healthy(installation: Installation) -> None:
    code, found = examine(installation)
    assert code == 0
    assert {status for status, _ in found.values()} <= {"ok", "skip"}, found


@pytest.mark.parametrize("err", FAULTS, ids=lambda err: err.__name__)
def test_each_fault_is_found_with_a_hint(
    installation: Installation, err: Callable[[Installation], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving_checks, "CONNECT_MS", 100.0)
    _, healthy = examine(installation)
    check, status, words = FAULTS[err]
    err(installation)
    code, found = examine(installation)
    assert code == (status == "fail")
    assert found[check][0] == status, found[check]
    assert words in found[check][1], found[check]
    failing = {name for name, (how, _) in found.items() if how in ("warn", "fail")}
    # Every check that needs the target fails if it cannot be loaded.
    dependent = {"tokenizers", "engine"} if check == "models" and status == "fail" else set()
    assert failing - dependent == {check}
    assert {name for name, (how, _) in healthy.items() if how in ("warn", "fail")} == set()


def test_an_expired_certificate(installation: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    later = serving_checks.time.time() + 200 * 86_400
    monkeypatch.setattr(serving_checks.time, "time", lambda: later)
    assert examine(installation)[1]["TLS"][0] == "fail"


def test_there_are_at_least_ten_faults() -> None:
    assert len(FAULTS) >= 10


def test_a_check_that_raises_does_not_stop_the_others(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wispprof import doctor

    def broken(_: object) -> doctor.Finding:
        raise ZeroDivisionError("of its own")

    monkeypatch.setattr(doctor, "CHECKS", (broken, doctor.clock))
    code, found = examine(installation)
    assert code == 1
    assert found["broken"][0] == "fail"
    assert "ZeroDivisionError" in found["broken"][1]
    assert found["clock"][0] == "ok"
