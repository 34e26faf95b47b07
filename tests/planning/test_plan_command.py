"""``wispprof plan`` from files, as a user calls it, and its refusals."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from wispprof.artifacts import EdgeRow, Manifest, bundled_path, make_profile, save_profile, save_trace
from wispprof.artifacts.plan import load_plan
from wispprof.artifacts.rows import AcceptanceTrace, TracePath
from wispprof.cli import app
from wispprof.fitting.batch_totals import EMPTY
from wispprof.fitting.conformal import LEVELS, RatioBound
from wispprof.fitting.estimator import Domain, FittedEstimator
from wispprof.fitting.step_time_models import WispLinear
from wispprof.planning.explain import explain
from wispprof.types import BatchTotals, ModelInfo, Sampling


@pytest.fixture
def folder(tmp_path):
    step_model = WispLinear()
    step_model.coef_ = (0.2, 0.0, 1e-4, 20.0)
    ratio = RatioBound(40.0, ((1.1,) * len(LEVELS),) * 4, (99, 99, 99, 99))
    domain = Domain(EMPTY, BatchTotals(*(1 << 20 for _ in range(8))))
    FittedEstimator(step_model, ratio, domain).save(tmp_path / "estimator.json")
    rng = np.random.default_rng(0)
    paths = []
    for _ in range(6):
        hits = rng.random((40, 4)) < 0.75
        drafts = np.where(hits, 1, 0)
        accepted = np.cumprod(hits, axis=1).sum(axis=1)
        features = np.ones((40, 4, 4), dtype=np.float32)
        paths.append(TracePath((1, 2), (1,) * 40, drafts, features, accepted))
    trace = AcceptanceTrace("target", "draft", "tok", Sampling(), tuple(paths))
    save_trace(trace, tmp_path / "trace.jsonl")
    return tmp_path


def call(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def make(folder, *more: object):
    return call(
        "plan",
        *("--estimator", folder / "estimator.json", "--trace", folder / "trace.jsonl"),
        *("--device", "laptop=60", "--rtt", 20, "--slo", 4, "--slo", 8, "--sessions", 32),
        *("--k-max", 4, "--out", folder / "plan.json", *more),
    )


def test_make_show_explain_diff_export(folder):
    made = make(folder, "--json")
    assert made.exit_code == 0, made.output
    plan = json.loads(made.stdout)
    assert {"estimator", "trace"} <= set(plan["inputs"])
    file = folder / "plan.json"
    shown = call("plan", "show", file).stdout
    assert "laptop" in shown
    assert "4 … 8" in shown, "SLOs with the same decision share a line"
    explained = call("plan", "explain", "laptop/20/0/4", "--plan", file)
    assert "20 ms round trip" in explained.stdout
    assert "without drafts (the largest number that was planned for)" in " ".join(explained.stdout.split())
    same = call("plan", "diff", file, file, "--json")
    assert json.loads(same.stdout) == {"changes": []}
    ranges = json.loads(call("plan", "export", file, "--format", "vllm").stdout)
    assert "num_speculative_tokens_per_batch_size" in ranges


def test_a_profile_of_another_tokenizer_is_refused_in_one_line(folder):
    profile = bundled_path("profiles/epyc-2core-reference-draft.jsonl")
    planned = make(folder, "--edge", f"mine={profile}")
    simulated = call("simulate", "--edge", profile, "--trace", folder / "trace.jsonl")
    for refused in (planned, simulated):
        assert refused.exit_code == 1
        assert "another tokenizer" in " ".join(refused.output.split())


def test_a_plan_says_which_machine_its_times_are_of(folder):
    path = folder / "estimator.json"
    document = json.loads(path.read_text())
    document["inputs"]["machine"] = "NVIDIA H200"
    path.write_text(json.dumps(document))
    made = make(folder, "--json")
    assert made.exit_code == 0, made.output
    plan = json.loads(made.stdout)
    assert plan["inputs"]["machine"] == "NVIDIA H200"
    assert any("NVIDIA H200" in remark for remark in plan["notes"])


@pytest.mark.parametrize(
    ("more", "word", "code"),
    [
        (("--mix", "4:8"), "class mix", 1),
        (("--device", "laptop=30"), "called laptop", 1),
        (("--device", "nonsense"), "TOKENS_PER_S", 1),
        (("--slo", "0"), "--slo", 2),
        (("--trace", "nowhere.jsonl"), "nowhere.jsonl", 1),
        (("--objective", "fame"), "fame", 1),
    ],
)
def test_bad_input_is_one_clear_line(folder, more, word, code):
    result = make(folder, *more)
    assert result.exit_code == code
    assert word in result.output.replace("\n", " ")
    assert not (folder / "plan.json").exists()


def edge_profile(folder, name, spread):
    """Draft steps of 10 ms whose samples differ by ``spread`` either way; one of two rows is flagged."""
    samples = tuple(10.0 * (1 + spread * side) for side in (-1, 0, 1) for _ in range(6))
    rows = [
        EdgeRow("sentinel", "sentinel", 256, samples, flags=("noisy",), order=0),
        EdgeRow("draft_step 1@256", "draft_step", 256, samples, flags=("noisy",), order=1),
        EdgeRow("draft_step 1@1024", "draft_step", 1024, samples, order=2),
    ]
    manifest = Manifest("edge", ModelInfo("draft", tokenizer_hash="tok"))
    save_profile(make_profile(manifest, rows), folder / name)
    return folder / f"{name}.jsonl"


def test_a_draft_step_known_too_roughly_is_named_by_plan_and_explain(folder):
    noisy, calm = edge_profile(folder, "noisy", 0.6), edge_profile(folder, "calm", 0.1)
    made = make(folder, "--edge", f"phone={noisy}", "--edge", f"tablet={calm}", "--json")
    assert made.exit_code == 0, made.output
    said = (
        "The draft step of phone is known to ± 60% only (1 of 2 rows are noisy), so its draft lengths are a "
        "guess. Run `wispprof profile-edge` again on an idle machine."
    )
    notes = json.loads(made.stdout)["notes"]
    assert said in notes
    assert not any("The draft step of tablet" in note for note in notes)
    cell = ("--plan", folder / "plan.json", "--json")
    assert said in json.loads(call("plan", "explain", "phone/20/0/4", *cell).stdout)["words"]
    assert said not in json.loads(call("plan", "explain", "tablet/20/0/4", *cell).stdout)["words"]


def test_a_missing_estimator_names_the_command_that_makes_one(folder):
    (folder / "estimator.json").unlink()
    said = " ".join(make(folder).stderr.split())
    assert "Check the path, or make it with `wispprof fit`." in said


def test_a_capacity_without_drafts_is_one_number(folder):
    assert make(folder).exit_code == 0
    loaded = load_plan(folder / "plan.json")
    rows = tuple(replace(row, k=0, split=row.server_only - 1) for row in loaded.capacity)
    words = " ".join(explain(replace(loaded, capacity=rows), loaded.draft[0].cell))
    assert f": {rows[0].server_only} devices without drafts (" in words
    assert "k = 0" not in words.partition("Capacity if all")[2].partition(".")[0]
