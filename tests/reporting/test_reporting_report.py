"""The report of a run: complete, self-contained, deterministic, and valid without some artifacts."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from report_runs import bench, parsed, step_rows, write_run

from wispprof.artifacts import save_profile, write_document
from wispprof.artifacts.manifest import Manifest
from wispprof.artifacts.profile import make_profile
from wispprof.errors import ArtifactDamaged, ArtifactMissing
from wispprof.reporting import (
    BENCH_KIND,
    Answer,
    Bench,
    load_run,
    render_report,
    verdict,
    write_report,
)
from wispprof.types import ModelInfo


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return render_report(load_run(folder))


def test_every_section_is_there(page: str) -> None:
    text = page
    sections = re.findall(r'<section id="(\w+)"', text)
    assert sections == [
        "policies",
        "answer",
        "surface",
        "accuracy",
        "acceptance",
        "plan",
        "provenance",
    ]
    assert "1.80 × the goodput of the server alone" in text
    assert "def &lt;f&gt;:" in text
    assert "a &amp; b" in text
    assert "a &lt;cpu&gt;" in text


def test_reference_measurements_are_no_shapes(folder: Path) -> None:
    run = load_run(folder)
    assert run.server is not None
    reference = replace(run.server.rows[0], key="sentinel", kind="sentinel", flags=("drift",), order=99)
    server = make_profile(run.server.manifest, [*run.server.rows, *[reference] * 3])
    assert "medians of 24 measured shapes" in render_report(replace(run, server=server))
    assert "0 rows carry a flag" in render_report(replace(run, server=server))


def test_the_page_is_well_formed_and_self_contained(page: str) -> None:
    found = parsed(page)
    assert found.stack == []
    assert found.loads == []
    assert len(found.ids) == len(set(found.ids)), "ids of two figures clash"
    for reference in re.findall(r'(?:href="#|url\(#)([^")]+)', page):
        assert reference in found.ids


def test_figures_stand_over_their_data(page: str) -> None:
    parts = page.split("<summary>The figure as a table</summary>")
    assert len(parts) == 4
    for before, after in pairwise(parts):
        assert "<svg" in before
        assert after[: after.index("</table>")].count("<tr>") > 2


def test_figures_take_their_colours_from_the_page(page: str) -> None:
    figures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(figures) == 4
    for figure in figures:
        assert "var(--ink)" in figure
        assert "#1c1b22" not in figure
        assert 'role="img"' in figure
    assert "prefers-color-scheme:dark" in page


def test_the_same_run_gives_the_same_page(folder: Path, page: str) -> None:
    assert render_report(load_run(folder)) == page


def test_a_run_with_one_artifact_is_reported(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "trace.jsonl").write_bytes((folder / "trace.jsonl").read_bytes())
    text = write_report(load_run(tmp_path), tmp_path / "report.html").read_text()
    assert re.findall(r'<section id="(\w+)"', text) == ["acceptance", "provenance"]


def test_a_changed_input_makes_its_outputs_stale(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert load_run(tmp_path).stale() == []
    save_profile(
        make_profile(Manifest("server", ModelInfo("tiny")), step_rows(seed=7)),
        tmp_path / "server",
    )
    assert load_run(tmp_path).stale() == ["estimator.json"]


def test_a_damaged_part_is_named(folder: Path, tmp_path: Path) -> None:
    text = (folder / "plan.json").read_text()
    (tmp_path / "plan.json").write_text(text.replace('"k": ', '"k": 1', 1))
    with pytest.raises(ArtifactDamaged, match=r"plan\.json"):
        load_run(tmp_path)


def test_an_empty_folder_holds_no_run(tmp_path: Path) -> None:
    (tmp_path / "notes.json").write_text("{}")
    with pytest.raises(ArtifactMissing):
        load_run(tmp_path)


@pytest.mark.parametrize(
    ("server_only", "split", "text"),
    [
        (50.0, 90.0, "pays here: wisp delivers 1.80 ×"),
        (90.0, 50.0, "does not pay here: the server alone delivers 1.80 ×"),
        (50.0, 50.5, "the same goodput"),
        (0.0, 10.0, "only split serving met an SLO"),
        (10.0, 0.0, "only the server alone met an SLO"),
        (0.0, 0.0, "no policy met any SLO"),
    ],
)
def test_the_verdict_follows_the_figures(server_only: float, split: float, text: str) -> None:
    assert text in verdict([bench("server-only", server_only, 1.0), bench("wisp", split, 1.0)])


def test_without_a_comparison_there_is_no_verdict() -> None:
    assert verdict([bench("wisp", 1.0, 1.0)]) == ""


def test_an_answer_is_the_same_from_disk(folder: Path) -> None:
    found = load_run(folder).answer
    assert found is not None
    assert Answer.of(found).text == " a & b!"


def test_unknown_figures_become_null() -> None:
    class Found:
        policy, load, steps = "wisp", {}, ()
        figures = {"goodput_tokens_per_s": float("nan"), "attainment": 1.0}

    assert Bench.of_result(Found()).figures == {"goodput_tokens_per_s": None, "attainment": 1.0}  # type: ignore[arg-type]


@pytest.mark.parametrize(("record", "field"), [(Bench, "policy"), (Answer, "prompt")])
def test_a_record_without_a_field_is_damaged(
    record: type[Bench] | type[Answer], field: str, tmp_path: Path
) -> None:
    write_document(tmp_path / "bench.json", BENCH_KIND, {"load": {}, "stats": {}})
    (document,) = load_run(tmp_path).benches
    with pytest.raises(ArtifactDamaged, match=field):
        record.of(document)
