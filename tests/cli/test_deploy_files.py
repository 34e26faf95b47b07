"""Unit, container and compose files in ``examples/deploy/``: they parse, and so do the commands in them."""

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

from wispprof.cli import app

FOLDER = Path(__file__).parents[2] / "examples" / "deploy"
UNITS = sorted(FOLDER.glob("*.service"))
CONTAINERS = sorted(FOLDER.glob("*.Dockerfile"))
GROUP: Any = typer.main.get_command(app)


def parse(words: list[str]) -> None:
    """As the command line would; ``--config`` may come before the command."""
    if words[:1] == ["--config"]:
        words = words[2:]
    if words != ["--help"]:
        GROUP.commands[words[0]].make_context(words[0], words[1:])


def execstart(unit: Path) -> list[str]:
    found = re.search(r"^ExecStart=(.*)$", unit.read_text(), re.MULTILINE)
    assert found
    return shlex.split(found[1])


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_units_start_a_command_that_parses(unit: Path) -> None:
    program, *words = execstart(unit)
    assert program.endswith("bin/wispprof")
    parse(words)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_systemd_accepts_the_units(unit: Path, tmp_path: Path) -> None:
    # The program that the unit names is not on this machine.
    copy = tmp_path / unit.name
    copy.write_text(unit.read_text().replace(execstart(unit)[0], sys.executable))
    scope = ["--user"] if unit.stem.endswith("edge") else []
    done = subprocess.run(
        ["systemd-analyze", *scope, "verify", str(copy)],
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
