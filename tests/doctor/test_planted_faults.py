"""Faults planted in the world, not in the doctor: the whole command finds each, and names its fix.

A small healthy installation is made once: a pair of models, keys, a certificate, a folder of artifacts.
Every case breaks one thing in it. Against the healthy run exactly that one finding must change.
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
from wispprof.doctor import model_checks, server_checks

# What may change between two runs on a machine that others use.
WEATHER = {"memory", "load", "sensors", "devices"}


class World:
    """Where a server would stand, and the command line that has it examined."""

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


def examine(world: World) -> tuple[int, dict[str, tuple[str, str]]]:
    """Exit code; check → (status, what was found and its fix)."""
    model_checks._load.cache_clear()
    words = [word for name, value in world.options.items() for word in (f"--{name}", value)]
    done = CliRunner().invoke(app, ["doctor", "--json", *words], env=world.environ)
    assert done.exit_code in (0, 1), done.output
    found: list[dict[str, Any]] = json.loads(done.stdout)["findings"]
    for finding in found:
        assert finding["hint"] or finding["status"] in ("ok", "skip"), finding
    return done.exit_code, {
        f["what"]: (f["status"], f"{f['found']} {f['hint']}")
        for f in found
        if f["what"] not in WEATHER
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
def installation(tmp_path_factory: pytest.TempPathFactory) -> Path:
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
def world(installation: Path, tmp_path: Path) -> Iterator[World]:
    copy = tmp_path / "copy"
    shutil.copytree(installation, copy)
    made = World(copy)
    yield made
    for listener in made.held:
        listener.close()


# --- the faults -----------------------------------------------------------------------------------


def no_weights(world: World) -> None:
    (world.root / "target" / "model.safetensors").unlink()


def cut_weights(world: World) -> None:
    file = world.root / "target" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def weights_of_nan(world: World) -> None:
    from safetensors.torch import load_file, save_file

    file = world.root / "target" / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"].fill_(float("nan"))
    save_file(weights, file, metadata={"format": "pt"})


def swapped_pair(world: World) -> None:
    options = world.options
    options["target"], options["draft"] = options["draft"], options["target"]


def another_tokenizer(world: World) -> None:
    shutil.rmtree(world.root / "draft")
    make_model(world.root / "draft", layers=1, words=50)


def no_tokenizer(world: World) -> None:
    for file in (world.root / "draft").glob("tokenizer*"):
        file.unlink()


def port_taken(world: World) -> None:
    listener = socket.create_server(("0.0.0.0", 0))
    world.held.append(listener)
    world.options["port"] = str(listener.getsockname()[1])


def no_key(world: World) -> None:
    del world.options["api-key-file"]


def short_key(world: World) -> None:
    (world.root / "keys").write_text("secret\n")


def keys_that_are_not_text(world: World) -> None:
    (world.root / "keys").write_bytes(b"\xff\xfe" * 20)


def open_keys(world: World) -> None:
    (world.root / "keys").chmod(0o644)


def strangers_certificate(world: World) -> None:
    key = (world.root / "key.pem").read_text()
    make_certificate(world.root)
    (world.root / "key.pem").write_text(key)


def ending_certificate(world: World) -> None:
    make_certificate(world.root, days=3)


def no_server(world: World) -> None:
    world.options["server"] = f"127.0.0.1:{free_port()}"


def out_is_a_file(world: World) -> None:
    (world.root / "out").write_text("")


def edited_result(world: World) -> None:
    file = world.root / "run" / "bench.json"
    file.write_text(file.read_text().replace('"rows": []', '"rows": [1]'))


def result_of_the_future(world: World) -> None:
    file = world.root / "run" / "bench.json"
    text = file.read_text()
    assert f'"schema": {SCHEMA}' in text
    file.write_text(text.replace(f'"schema": {SCHEMA}', f'"schema": {SCHEMA + 5}'))


def refitted_since(world: World) -> None:
    write_document(world.root / "run" / "predictor.json", "predictor", {"of": "another trace"})


def too_many_threads(world: World) -> None:
    world.environ["OMP_NUM_THREADS"] = "4096"


FAULTS: dict[Callable[[World], None], tuple[str, str, str]] = {
    # fault: (the check that finds it, its status, words of the finding or its fix)
    no_weights: ("models", "fail", "download"),
    cut_weights: ("models", "fail", "download is complete"),
    weights_of_nan: ("engine", "fail", "restore them"),
    swapped_pair: ("models", "warn", "Swap --target and --draft"),
    another_tokenizer: ("tokenizers", "fail", "target's own family"),
    no_tokenizer: ("tokenizers", "fail", "Copy the tokenizer files"),
    port_taken: ("port", "fail", "choose another --port"),
    no_key: ("API keys", "fail", "--api-key-file"),
    short_key: ("API keys", "fail", "at least 16"),
    keys_that_are_not_text: ("API keys", "fail", "one key per line"),
    open_keys: ("API keys", "warn", "chmod 600"),
    strangers_certificate: ("TLS", "fail", "belongs to it"),
    ending_certificate: ("TLS", "warn", "Renew it"),
    no_server: ("server", "fail", "wispprof serve"),
    out_is_a_file: ("output folder", "fail", "--out"),
    edited_result: ("artifacts", "fail", "make it anew"),
    result_of_the_future: ("artifacts", "fail", "Upgrade"),
    refitted_since: ("artifacts", "warn", "Fit and plan again"),
    too_many_threads: ("threads", "warn", "oversubscribed"),
}


def test_the_healthy_installation_is_healthy(world: World) -> None:
    code, found = examine(world)
    assert code == 0
    assert {status for status, _ in found.values()} <= {"ok", "skip"}, found


@pytest.mark.parametrize("err", FAULTS, ids=lambda err: err.__name__)
def test_each_fault_is_found_and_its_fix_named(
    world: World, err: Callable[[World], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_checks, "DIAL_MS", 100.0)
    _, healthy = examine(world)
    check, status, words = FAULTS[err]
    err(world)
    code, found = examine(world)
    assert code == (status == "fail")
    assert found[check][0] == status, found[check]
    assert words in found[check][1], found[check]
    ill = {what for what, (how, _) in found.items() if how in ("warn", "fail")}
    # A target that cannot be loaded is missed by every check that needs it.
    followers = {"tokenizers", "engine"} if check == "models" and status == "fail" else set()
    assert ill - followers == {check}
    assert {what for what, (how, _) in healthy.items() if how in ("warn", "fail")} == set()


def test_an_expired_certificate(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    later = server_checks.time.time() + 200 * 86_400
    monkeypatch.setattr(server_checks.time, "time", lambda: later)
    assert examine(world)[1]["TLS"][0] == "fail"


def test_there_are_more_than_ten() -> None:
    assert len(FAULTS) >= 10


def test_a_check_that_breaks_hides_no_other(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from wispprof import doctor

    def broken(_: object) -> doctor.Finding:
        raise ZeroDivisionError("of its own")

    monkeypatch.setattr(doctor, "CHECKS", (broken, doctor.clock))
    code, found = examine(world)
    assert code == 1
    assert found["broken"][0] == "fail"
    assert "ZeroDivisionError" in found["broken"][1]
    assert found["clock"][0] == "ok"
