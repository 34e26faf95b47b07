"""The simulate and reproduce commands: one JSON document, one line per fault."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from wispprof.cli import app

QUICK = ["--devices", "3", "--seconds", "4", "--warmup", "1", "--prompt", "20", "--output", "12"]


def run(*arguments: str):  # type: ignore[no-untyped-def]
    return CliRunner().invoke(app, list(arguments))


def test_two_systems_give_one_document() -> None:
    found = run("simulate", *QUICK, "--policy", "fcfs", "--policy", "wisp", "--jobs", "1", "--json")
    assert found.exit_code == 0, found.output
    document = json.loads(found.stdout)
    assert [r["system"] for r in document["runs"]] == ["fcfs", "wisp"]
    assert all(r["throughput"] > 0 for r in document["runs"])


def test_capacity_and_a_replayed_trace(tmp_path: Path) -> None:
    found = run(
        "simulate", *QUICK, "--capacity", "--policy", "centralized", "--slo", "12", "--jobs", "1"
    )
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


def test_configspec_as_json() -> None:
    found = run("reproduce", "configspec", "--jobs", "1", "--json")
    assert found.exit_code == 0
    figures = json.loads(found.stdout)["figures"]
    assert all(f["verdict"].startswith("met:") for f in figures)
