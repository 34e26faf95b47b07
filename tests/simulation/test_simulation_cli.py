"""The simulate and reproduce commands: one JSON document, one line per fault."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from wispprof.cli import app
from wispprof.cli.console import output
from wispprof.cli.simulate import comparison_table
from wispprof.settings.fleet_settings import SimulationSettings
from wispprof.simulation.reproduce import Figure, ReproducedTable, read_setup
from wispprof.simulation.scenario_inputs import scenarios_of

QUICK = ["--devices", "3", "--seconds", "4", "--warmup", "1", "--prompt", "20", "--output", "12"]


def run(*arguments: str):  # type: ignore[no-untyped-def]
    return CliRunner().invoke(app, list(arguments))


def test_two_systems_give_one_document() -> None:
    found = run("simulate", *QUICK, "--policy", "fcfs", "--policy", "wisp", "--jobs", "1", "--json")
    assert found.exit_code == 0, found.output
    document = json.loads(found.stdout)
    assert [r["system"] for r in document["runs"]] == ["fcfs", "wisp"]
    assert all(r["throughput"] > 0 for r in document["runs"])


def test_the_warm_up_follows_the_time_and_eighty_columns_hold_the_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    output.cache_clear()
    found = run(
        "simulate", *QUICK[:4], *QUICK[6:], "--policy", "fcfs", "--policy", "sled-nocache", "--jobs", "1"
    )
    output.cache_clear()
    assert found.exit_code == 0, found.output
    assert max(map(len, found.stdout.splitlines())) <= 80
    assert "…" not in found.stdout
    assert {"goodput", "accepted"} <= set(found.stdout.split())
    assert SimulationSettings(seconds=20).uncounted_s == pytest.approx(20 / 6)
    assert SimulationSettings().uncounted_s == 20.0


def test_a_controller_replaces_that_of_edges_which_draft() -> None:
    ways = ("fcfs", "server-only", "wispprof")
    controller = "wispprof.policies.controllers:FixedController"
    scenarios, _ = scenarios_of(SimulationSettings(systems=ways, controller=controller))
    assert [scenario.system.controller for scenario in scenarios] == [controller, None, controller]
    assert scenarios[0].system.label == f"fcfs with {controller}"
    found = run("simulate", *QUICK, "--policy", "fcfs", "--controller", "magic", "--jobs", "1")
    assert found.exit_code == 1
    assert "magic" in found.output


def test_capacity_and_a_replayed_trace(tmp_path: Path) -> None:
    found = run("simulate", *QUICK, "--capacity", "--policy", "server-only", "--slo", "12", "--jobs", "1")
    assert found.exit_code == 0, found.output
    trace = tmp_path / "t.jsonl"
    rows = [{"timestamp": 500 * i, "input_length": 9, "output_length": 5} for i in range(6)]
    trace.write_text("\n".join(map(json.dumps, rows)))
    found = run("simulate", *QUICK, "--arrivals", str(trace), "--policy", "fcfs", "--json")
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["runs"][0]["sessions"] > 2


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["simulate", "--policy", "magic"], "magic"),
        (["simulate", "--server", "abacus"], "abacus"),
        (["simulate", "--arrivals", "nowhere.csv"], "nowhere.csv"),
        (["simulate", "--capacity", "--arrivals", "poisson"], "closed"),
        (["simulate", "--out", "x.json"], "--capacity"),
        (["reproduce", "nobody"], "nobody"),
    ],
)
def test_faults_are_one_line(arguments: list[str], word: str) -> None:
    found = run(*arguments)
    assert found.exit_code == 1
    assert word in " ".join(found.output.split())


def test_a_comparison_fits_eighty_columns() -> None:
    names = ("capacity at 2 tok/s, wisp", "capacity at 2 tok/s, wisp / server-only", "speed, alone")
    figures = tuple(Figure(name, 1.691, {f"setup {i}": 1.6 + i for i in range(5)}) for name in names)
    found = ReproducedTable("t", "c", 0.2, {f"setup {i}": "why " * 40 for i in range(5)}, figures)
    console = Console(width=80, file=StringIO())
    console.print(comparison_table(found))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= 80
    (row,) = (line for line in lines if "wisp / server-only" in line)
    assert row.split() == [
        "wisp",
        "/",
        "server-only",
        "1.69",
        "1.60",
        "2.60",
        "3.60",
        "4.60",
        "5.60",
        "A",
    ]
    # What stands alone has no heading, what has none near says how far the nearest is.
    assert sum("capacity at 2 tok/s" in line for line in lines) == 1
    assert any("speed, alone" in line for line in lines)
    far = replace(found, figures=(replace(figures[0], published=4.0),))
    console.print(comparison_table(far))
    assert "no: D +15%" not in console.file.getvalue()  # type: ignore[attr-defined]
    console.print(comparison_table(replace(far, within=0.01)))
    assert "no: C -10%" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("paper", ["specedge", "wisp", "configspec"])
def test_each_paper_fits_eighty_columns_with_every_number(paper: str) -> None:
    setup = read_setup(paper)
    names = {one["name"]: "why" for one in setup["assumption"]}
    figures = tuple(
        Figure(f"cost efficiency of 8B on A100, thousand tokens/$, {i}", 1234.5, dict.fromkeys(names, 11.23))
        for i in range(2)
    )
    found = ReproducedTable(setup["title"], setup["citation"], setup["within"], names, figures)
    console = Console(width=80, file=StringIO())
    console.print(comparison_table(found))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text
    assert text.split().count("11.2") == 2 * len(names)
    assert text.split().count("1234") == 2


def test_without_a_terminal_lines_are_long() -> None:
    code = "from wispprof.cli.console import console, output; print(output().width, console().width)"
    plain = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    seen = subprocess.run([sys.executable, "-c", code], env=plain, capture_output=True, text=True, check=True)
    assert seen.stdout.split() == ["160", "160"]


def test_configspec_as_json() -> None:
    found = run("reproduce", "configspec", "--jobs", "1", "--json")
    assert found.exit_code == 0
    figures = json.loads(found.stdout)["figures"]
    assert all(f["verdict"].startswith("met:") for f in figures)
