"""The command line as a whole: what it imports, where output goes, how an error ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import wispprof.cli
from wispprof.cli import COMMANDS, app, console
from wispprof.errors import ArtifactMissing

RUNNER = CliRunner()
NO_COMMANDS = {"__init__", "console", "first_run", "options"}
HEAVY = ("torch", "transformers", "fastapi", "sklearn", "pandas", "matplotlib", "lightgbm")


def modules_after(*arguments: str) -> set[str]:
    """Top-level modules in a fresh interpreter after the command ran in it."""
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['wispprof', *{list(arguments)!r}]\n"
        "from wispprof.cli import app\n"
        "try:\n    app()\nexcept SystemExit:\n    pass\n"
        "print('\\n' + ' '.join(sorted({m.split('.')[0] for m in sys.modules})))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100
    )
    return set(done.stdout.splitlines()[-1].split())


def test_help_imports_nothing_heavy() -> None:
    assert not modules_after("--help").intersection((*HEAVY, "numpy", "asyncio", "msgspec"))


def test_settings_import_nothing_but_types_and_errors() -> None:
    code = (
        "import sys, pkgutil, importlib, wispprof.settings as s\n"
        "for m in pkgutil.iter_modules(s.__path__): importlib.import_module(f'wispprof.settings.{m.name}')\n"
        "print(*{m.split('.')[1] for m in sys.modules if m.startswith('wispprof.')})\n"
        "print(*{m.split('.')[0] for m in sys.modules})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    packages, modules = (set(line.split()) for line in done.stdout.splitlines())
    assert packages == {"settings", "types", "errors"}
    assert not modules.intersection(("torch", "asyncio", "websockets", "typer"))


@pytest.mark.parametrize("arguments", [("fit", "--help"), ("simulate", "--help"), ("report", "--help")])
def test_help_of_the_deciding_commands_needs_no_torch(arguments: tuple[str, ...]) -> None:
    assert not modules_after(*arguments).intersection(HEAVY)


def test_deciding_packages_need_no_torch() -> None:
    code = (
        "import sys\n"
        "import wispprof.fitting, wispprof.fitting.pipeline, wispprof.planning, wispprof.simulation\n"
        "import wispprof.policies, wispprof.sessions, wispprof.reporting, wispprof.artifacts.plan\n"
        "print(sorted(m for m in ('torch', 'asyncio', 'websockets') if m in sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torch" not in done.stdout
    assert "websockets" not in done.stdout


def test_every_command_has_help_and_a_known_panel() -> None:
    group = typer.main.get_command(app)
    panels = {command.rich_help_panel for command in group.commands.values()}  # type: ignore[attr-defined]
    assert panels <= {"Start here", "Measure", "Decide", "Run"}
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        assert command.help, name
        done = RUNNER.invoke(app, [name, "--help"])
        assert done.exit_code == 0, name


def test_overview_lists_the_first_lines_of_the_commands() -> None:
    group: Any = typer.main.get_command(app)
    shown = " ".join(RUNNER.invoke(app, ["--help"], env={"COLUMNS": "200"}).stdout.split())
    for entry in COMMANDS:
        first, *_ = group.commands[entry.name].help.split("\n\n")
        assert entry.line == " ".join(first.split()), entry.name
        assert f"│ {entry.name} {entry.line} │" in shown, entry.name
    registered = {file.stem for file in Path(wispprof.cli.__file__).parent.glob("*.py")}
    assert {entry.module or entry.name for entry in COMMANDS} == registered - NO_COMMANDS


def test_overview_loads_no_command_and_no_markdown() -> None:
    code = (
        "import sys\nfrom wispprof.cli import app\nsys.argv = ['wispprof', '--help']\n"
        "try:\n    app()\nexcept SystemExit:\n    pass\n"
        "print('\\n' + ' '.join(m for m in sys.modules if m.startswith(('wispprof', 'rich'))))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert not loaded & {f"wispprof.cli.{entry.module or entry.name}" for entry in COMMANDS}
    assert "rich.markdown" not in loaded
    assert "rich.table" in loaded


def test_a_misspelt_command_is_guessed() -> None:
    assert "'serve'" in RUNNER.invoke(app, ["serv"]).stderr


def test_version_and_unknown_command() -> None:
    assert RUNNER.invoke(app, ["--version"]).stdout.startswith("wispprof ")
    assert RUNNER.invoke(app, ["no-such-command"]).exit_code == console.USAGE


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "wispprof", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("wispprof ")


def small_app(action: object) -> typer.Typer:
    made = typer.Typer(cls=console.GuardedGroup, pretty_exceptions_enable=False)
    made.command("act")(action)  # type: ignore[type-var]
    made.command("other")(lambda: None)
    return made


def test_an_error_is_one_line_with_its_hint_and_exit_1() -> None:
    def action() -> None:
        raise ArtifactMissing("There is no plan.", "Make one.")

    done = RUNNER.invoke(small_app(action), ["act"])
    assert done.exit_code == console.FAULT
    assert done.stdout == ""
    assert done.stderr.strip() == "error: There is no plan. Make one."


def test_interruption_ends_with_130() -> None:
    def action() -> None:
        raise KeyboardInterrupt

    assert RUNNER.invoke(small_app(action), ["act"]).exit_code == console.INTERRUPTED


def test_a_defect_keeps_its_traceback() -> None:
    def action() -> None:
        raise ZeroDivisionError("a defect")

    done = RUNNER.invoke(small_app(action), ["act"])
    assert isinstance(done.exception, ZeroDivisionError)


def test_debug_keeps_the_traceback_of_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def action() -> None:
        raise ArtifactMissing("There is no plan.")

    monkeypatch.setenv("WISPPROF_DEBUG", "1")
    assert isinstance(RUNNER.invoke(small_app(action), ["act"]).exception, ArtifactMissing)


def test_json_goes_to_stdout_alone(capsys: pytest.CaptureFixture[str]) -> None:
    import numpy as np

    from wispprof.types import Slo

    document = {"slo": Slo(4.0), "where": Path("a"), "x": np.arange(2), "nan": float("nan")}
    console.result(document, "for a reader", as_json=True)
    with console.tracker("work", total=1) as report:
        report(1)
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {
        "slo": {"tokens_per_s": 4.0, "ttft_ms": None, "best_effort": False},
        "where": "a",
        "x": [0, 1],
        "nan": None,
    }


def test_what_has_no_json_form_is_refused() -> None:
    with pytest.raises(TypeError):
        console.emit_json(object())
