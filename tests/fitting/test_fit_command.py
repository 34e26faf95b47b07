"""The fit command: files, cards, one JSON document, and no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from synthetic_steps import random_shape, synthetic_rows, true_ms
from synthetic_traces import synthetic_trace
from typer.testing import CliRunner

from wispprof.artifacts import Manifest, make_profile, save_profile, save_trace
from wispprof.cli import app
from wispprof.errors import FitError, TooFewOutcomes
from wispprof.fitting import load_estimator, load_predictor
from wispprof.fitting.pipeline import fit_files
from wispprof.fitting.rejection_scorers import token_rows
from wispprof.types import ModelInfo


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fit")
    rows = synthetic_rows(60)
    for name, model in (("server", "small"), ("other", "large")):
        manifest = Manifest("server", ModelInfo(model, tokenizer_hash="tokenizer"))
        save_profile(make_profile(manifest, rows), path / f"{name}.jsonl")
    save_trace(synthetic_trace(16, 48), path / "trace.jsonl")
    return path


def _run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["fit", *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_everything_is_written_and_explained(folder: Path) -> None:
    out = folder / "out"
    code, shown, faults = _run(
        *("--server", str(folder / "server.jsonl"), "--trace", str(folder / "trace.jsonl")),
        *("--estimator", "wisp-linear", "--predictor", "threshold", "--out", str(out), "--json"),
    )
    assert code == 0, faults
    document = json.loads(shown)
    assert document["estimator"]["chosen"] == "wisp-linear"
    assert "whole shapes" in document["estimator"]["explanation"]
    assert "different prompts" in document["predictor"]["explanation"]
    assert {Path(f).name for f in document["files"]} == {
        f"{name}{suffix}"
        for name in ("estimator", "predictor")
        for suffix in (".json", ".card.md", ".card.json")
    }
    assert load_estimator(out / "estimator.json").kind == "wisp-linear"
    assert load_predictor(out / "predictor.json").kind == "threshold"
    card = (out / "estimator.card.md").read_text()
    assert "| wisp-linear |" in card
    assert json.loads((out / "estimator.card.json").read_text())["inputs"].keys() == {"profile", "model"}


def test_a_trace_with_too_few_rejections_leaves_the_estimator(folder: Path) -> None:
    whole = synthetic_trace(16, 48)
    sure = tuple(replace(p, accepted=np.full_like(p.accepted, p.depth)) for p in whole.paths)
    save_trace(replace(whole, paths=sure), folder / "sure.jsonl")
    out, trace = folder / "sure", ("--trace", str(folder / "sure.jsonl"))
    server = ("--server", str(folder / "server.jsonl"), "--estimator", "wisp-linear")
    code, shown, faults = _run(*server, *trace, "--out", str(out), "--json")
    assert code == 0, faults
    [note] = json.loads(shown)["notes"]
    assert "0 rejected" in note
    assert "the draft's own confidence" in note
    assert "0 rejected" in faults
    assert (out / "estimator.json").exists()
    assert not (out / "predictor.json").exists()
    short = tuple(replace(p, path=p.path[:1], accepted=p.accepted[:1]) for p in whole.paths)
    with pytest.raises(TooFewOutcomes, match="No answer is longer than a proposal"):
        token_rows(short)
    code, _, faults = _run(*trace, "--out", str(out))
    assert code == 1  # nothing was fitted
    assert "draft's own confidence" in " ".join(faults.split())


def test_step_times_known_too_roughly_are_named(folder: Path) -> None:
    """Every row gets a second half of samples that took four times as long."""
    rows = [
        replace(
            row, samples_ms=(*row.samples_ms * 2, *(4 * ms for ms in row.samples_ms * 2)), flags=("noisy",)
        )
        for row in synthetic_rows(60)
    ]
    save_profile(make_profile(Manifest("server", ModelInfo("small")), rows), folder / "busy.jsonl")
    found = fit_files(folder / "busy", [folder / "busy.jsonl"], kind="wisp-linear")
    [note] = found.notes
    assert note.startswith("Half of the step times are known to ± ")
    assert "(60 of 60 rows are noisy)" in note
    assert fit_files(folder / "calm", [folder / "server.jsonl"], kind="wisp-linear").notes == []


def test_update_recalibrates_in_place(folder: Path) -> None:
    out = folder / "updated"
    fit_files(out, [folder / "server.jsonl"], kind="wisp-linear")
    rng = np.random.default_rng(3)
    shapes = [random_shape(rng, 20) for _ in range(80)]
    log = folder / "steps.jsonl"
    lines = [json.dumps({"shape": [list(i) for i in s.items], "ms": 2 * true_ms(s)}) for s in shapes]
    log.write_text("\n".join(lines) + "\n")
    code, shown, faults = _run("--update", str(log), "--out", str(out))
    assert code == 0, faults
    assert "recalibrated on 80 steps" in " ".join(shown.split())
    assert load_estimator(out / "estimator.json").p50_scale == pytest.approx(2.0, rel=0.25)
    log.write_text('{"shape": [[1, 2]], "ms": "soon"}\n')
    code, _, faults = _run("--update", str(log), "--out", str(out))
    assert code == 1
    assert "Line 1" in " ".join(faults.split())


def test_two_models_and_nothing_to_do_are_refused(folder: Path) -> None:
    with pytest.raises(FitError, match="different models"):
        fit_files(folder / "x", [folder / "server.jsonl", folder / "other.jsonl"])
    code, _, faults = _run("--out", str(folder / "x"))
    assert code == 1
    assert "nothing to fit" in faults
    assert not (folder / "x").exists()
    assert _run("--evaluate", "--update", "x", "--out", str(folder))[0] == 2


def test_fitting_imports_no_torch(folder: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nimport wispprof.cli.fit, wispprof.fitting.pipeline as run\n"
        f"run.fit_files(Path({str(folder / 'bare')!r}), [Path({str(folder / 'server.jsonl')!r})], "
        "kind='wisp-linear')\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_fit_on_modelled_times_never_calls_them_measured(tmp_path: Path) -> None:
    """By the name of a shipped profile, which plan, simulate and profile take too."""
    name = "a100-sxm-llama-3.1-8b-vllm-bf16-tp1"
    code, out, err = _run("--server", name, "--estimator", "wisp-linear", "--out", str(tmp_path))
    assert code == 0, err
    card = (tmp_path / "estimator.card.md").read_text()
    for text in (card, " ".join(out.split())):
        assert "232 batch shapes are modelled from measured operators" in text
        assert "not how near they are to real hardware" in text
        assert "Repeating a measurement" not in text
        assert "timed steps" not in text
    assert "## Fitted domain" in card
    assert "- source: modelled from measured operators" in card
    assert "- citation: aiconfigurator-core 0.12.0: a100_sxm" in card
    data = json.loads((tmp_path / "estimator.card.json").read_text())
    assert data["report"]["sources"] == ["modelled from measured operators"]
    assert len(data["report"]["citations"]) >= 1


def test_the_card_of_measured_times_is_as_before(folder: Path, tmp_path: Path) -> None:
    fit_files(tmp_path, [folder / "server.jsonl"], kind="wisp-linear")
    card = (tmp_path / "estimator.card.md").read_text()
    assert "60 batch shapes (" in card
    assert "timed steps) were fitted" in card
    assert "Repeating a measurement moves its median" in card
    assert "## Measured domain" in card
    assert "source" not in card
