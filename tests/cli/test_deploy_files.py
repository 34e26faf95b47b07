"""Units of ``wispprof service`` and the files in ``examples/deploy/``: they parse, and so do the commands in
them."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from wispprof.cli import app

FOLDER = Path(__file__).parents[2] / "examples" / "deploy"
CONTAINERS = sorted(FOLDER.glob("*.Dockerfile"))
GROUP: Any = typer.main.get_command(app)


def parse(words: list[str]) -> None:
    """As the command line would; ``--config`` may come before the command."""
    if words[:1] == ["--config"]:
        words = words[2:]
    if words != ["--help"]:
        GROUP.commands[words[0]].make_context(words[0], words[1:])


def printed(*words: str) -> str:
    done = CliRunner().invoke(app, ["service", *words])
    assert done.exit_code == 0, done.output
    return done.stdout


def execstart(unit: str) -> list[str]:
    found = re.search(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    assert found
    return shlex.split(found[1])


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A ``wispprof`` that was typed, in a folder with a name that needs quotes."""
    script = tmp_path / "my venv" / "bin" / "wispprof"
    script.parent.mkdir(parents=True)
    script.symlink_to(sys.executable)
    monkeypatch.setattr(sys, "argv", [str(script)])
    return script


@pytest.mark.parametrize("role", ["server", "edge"])
def test_units_start_this_installation_with_a_command_that_parses(role: str, program: Path) -> None:
    started, *words = execstart(printed(role))
    assert started == str(program)
    parse(words)
    [_, config, *_] = execstart(printed(role, "--config", "/etc/some%where/it.toml"))[1:]
    assert config == "/etc/some%%where/it.toml"


def test_a_unit_names_the_user_and_the_folder_of_the_settings(program: Path) -> None:
    unit = printed("server", "--user", "llm", "--config", "/opt/llm/wispprof.toml")
    assert {"User=llm", "WorkingDirectory=/opt/llm", "ReadWritePaths=/opt/llm"} <= set(unit.splitlines())
    refused = CliRunner().invoke(app, ["service", "edge", "--user", "llm"])
    assert refused.exit_code == 2
    assert "for the server only" in refused.stderr


def test_an_installation_without_a_script_runs_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/wispprof/__main__.py"])
    monkeypatch.setattr(sys, "executable", "/usr/bin/python3-of-nobody")
    assert execstart(printed("edge"))[:3] == ["/usr/bin/python3-of-nobody", "-m", "wispprof"]


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
@pytest.mark.parametrize("role", ["server", "edge"])
def test_systemd_accepts_the_units(role: str, program: Path, tmp_path: Path) -> None:
    unit = tmp_path / {"server": "wispprof.service", "edge": "wispprof-edge.service"}[role]
    unit.write_text(printed(role))
    done = subprocess.run(
        ["systemd-analyze", *(["--user"] if role == "edge" else []), "verify", str(unit)],
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    complaints = [line for line in done.stderr.splitlines() if unit.name in line]
    assert done.returncode == 0, done.stderr
    assert complaints == []


@pytest.mark.parametrize("file", CONTAINERS, ids=lambda path: path.name)
def test_containers_copy_what_exists_and_start_a_command_that_parses(file: Path) -> None:
    text = file.read_text()
    (command,) = re.findall(r"^CMD (.*)$", text, re.MULTILINE)
    parse(json.loads(command))
    needed = Path(f"{file}.dockerignore").read_text().splitlines()
    root = FOLDER.parents[1]
    kept = [line[1:] for line in needed if line.startswith("!") and line != "!wheels"]
    assert kept
    assert [name for name in kept if not (root / name).exists()] == []


def test_compose_services_build_a_file_that_exists_and_run_commands_that_parse() -> None:
    services = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]
    assert set(services) == {"server", "edge"}
    for service in services.values():
        context = FOLDER / service["build"]["context"]
        assert (context / service["build"]["dockerfile"]).resolve() in CONTAINERS
        parse(service["command"])
