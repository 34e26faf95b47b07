"""Two runs side by side: one file, each figure over its data, differences as B against A."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from report_runs import parsed, write_run
from typer.testing import CliRunner

from wispprof.cli import app
from wispprof.reporting import load_run, render_comparison


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    made = tmp_path_factory.mktemp("runs")
    paths = made / "before", made / "after"
    for path, goodput, seed in zip(paths, (90.0, 108.0), (0, 1), strict=True):
        path.mkdir()
        write_run(path, goodput, seed)
    return paths


@pytest.fixture(scope="module")
def page(folders: tuple[Path, Path]) -> str:
    return render_comparison(*map(load_run, folders))


def test_every_common_subject_is_compared(page: str) -> None:
    assert re.findall(r"<h2>([^<]*)</h2>", page) == [
        "One load, every policy",
        "What a step costs",
        "How many drafts are accepted",
        "How well step times are predicted",
        "How far to draft",
        "What was compared",
    ]
    assert "Best goodput (wisp): B 20% above A" in page
    row = page[page.index("wisp: goodput") :][:300]
    assert re.findall(r'class="n">([^<]*)<', row)[:3] == ["90.00", "108.00", "+20.0%"]


def test_each_figure_stands_over_its_data_and_nothing_is_loaded(page: str) -> None:
    found = parsed(page)
    assert found.stack == []
    assert found.loads == []
    assert len(found.ids) == len(set(found.ids)), "ids of two figures clash"
    parts = page.split("<section>")[1:-1]
    assert len(parts) == 5
    for part in parts:
        assert part.count("<svg") == 1
        assert part.index("<svg") < part.index("<table")
        assert part.count("<tr>") > 2


def test_a_run_against_itself_differs_in_nothing(folders: tuple[Path, Path]) -> None:
    run = load_run(folders[0])
    page = render_comparison(run, run)
    assert "differs" not in page.split("What was compared")[1]
    changes = re.findall(r"[+-]\d+\.\d%", page)
    assert changes
    assert set(changes) == {"+0.0%"}


def test_what_one_run_lacks_is_left_out(folders: tuple[Path, Path]) -> None:
    a, b = map(load_run, folders)
    page = render_comparison(a, replace(b, trace=None, plan=None, benches=()))
    assert "How many drafts are accepted" not in page
    assert "What a step costs" in page
    assert "things can be compared" in page


def test_the_command_writes_one_file(folders: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    arguments = ["report", "--compare", *map(str, folders), "--out", str(out)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "One load, every policy" in out.read_text()
    assert (
        CliRunner().invoke(app, ["report", "--compare", str(folders[0]), str(tmp_path / "none")]).exit_code
        != 0
    )
