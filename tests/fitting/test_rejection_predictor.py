"""Rejection predictors: labels, split by prompt, calibration, the same answer after a round trip."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from synthetic_traces import synthetic_trace

from wispprof.artifacts.document import read_document, write_document
from wispprof.artifacts.rows import AcceptanceTrace
from wispprof.errors import ArtifactDamaged, FitError, PluginError
from wispprof.fitting import PREDICTOR_KINDS, FittedPredictor, fit_predictor, load_predictor
from wispprof.fitting.model_card import explain_predictor
from wispprof.fitting.rejection_predictor import (
    Calibration,
    auc,
    expected_calibration_error,
    reliability,
)
from wispprof.fitting.rejection_scorers import split_prompts, token_rows
from wispprof.types import DraftFeatures


@pytest.fixture(scope="module")
def trace() -> AcceptanceTrace:
    return synthetic_trace(24, 64)


@pytest.fixture(scope="module")
def fitted(trace: AcceptanceTrace) -> dict[str, FittedPredictor]:
    return {kind: fit_predictor(trace, kind) for kind in PREDICTOR_KINDS}


def test_rows_end_at_the_first_rejection(trace: AcceptanceTrace) -> None:
    path = trace.paths[0]
    rows = token_rows([path])
    expected = [
        (depth, depth < int(path.accepted[i]))
        for i in range(path.scored_rows())
        for depth in range(min(int(path.accepted[i]) + 1, path.depth))
    ]
    assert list(zip(rows.depth.tolist(), rows.accepted.tolist(), strict=True)) == expected
    assert rows.features[0] == pytest.approx(path.features[0, 0])


def test_prompts_are_never_divided(trace: AcceptanceTrace) -> None:
    doubled = [*trace.paths, *trace.paths]
    parts = split_prompts(doubled, seed=3)
    prompts = [{p.prompt for p in part} for part in parts]
    assert not prompts[0] & prompts[1]
    assert not prompts[1] & prompts[2]
    assert not prompts[0] & prompts[2]
    assert sum(map(len, parts)) == len(doubled)


@pytest.mark.parametrize("kind", PREDICTOR_KINDS)
def test_predictors_beat_chance_and_are_calibrated(kind: str, fitted: dict[str, FittedPredictor]) -> None:
    report = fitted[kind].report["held_out"][kind]
    assert report["auc"] > 0.75
    assert report["false_acceptance"] < 0.45
    assert report["ece"] < 0.06


@pytest.mark.parametrize("kind", PREDICTOR_KINDS)
def test_one_token_batch_and_loaded_file_agree(
    kind: str, fitted: dict[str, FittedPredictor], trace: AcceptanceTrace, tmp_path: object
) -> None:
    path = tmp_path / "predictor.json"  # type: ignore[operator]
    fitted[kind].save(path, {"trace": "blake2b:0"})
    loaded = load_predictor(path)
    assert loaded.kind == kind
    rows = token_rows(trace.paths[:3])
    batch = fitted[kind].acceptance_prob_batch(rows.features, rows.depth)
    assert ((batch > 0) & (batch < 1)).all()
    for place in range(0, len(rows), 7):
        features = DraftFeatures(*rows.features[place].tolist())
        assert loaded.acceptance_prob(features, int(rows.depth[place])) == pytest.approx(
            batch[place], abs=1e-9
        )


def test_outcomes_shuffled_leave_nothing_to_learn(trace: AcceptanceTrace) -> None:
    rng = np.random.default_rng(0)
    blind = [
        dataclasses.replace(p, features=rng.permutation(p.features.reshape(-1, 4)).reshape(p.features.shape))
        for p in trace.paths
    ]
    report = fit_predictor(blind, "lightgbm").report["held_out"]["lightgbm"]
    assert abs(report["auc"] - 0.5) < 0.12


def test_auto_keeps_the_least_log_loss(trace: AcceptanceTrace) -> None:
    report = fit_predictor(trace, kinds=("threshold", "margin-logistic")).report
    loss = report["validation_log_loss"]
    assert report["chosen"] == min(loss, key=lambda k: loss[k])
    assert set(report["held_out"]) == {"threshold", "margin-logistic"}


def test_the_card_states_the_reason_of_the_choice(trace: AcceptanceTrace) -> None:
    """Test prompts do not influence the choice; if they disagree with it, the card states so."""
    predictor = fit_predictor(trace, kinds=("threshold", "margin-logistic"))
    report = predictor.report
    other = next(kind for kind in report["held_out"] if kind != report["chosen"])
    for kind, loss in (("chosen", 0.2), ("other", 0.1)):
        report["held_out"][report["chosen"] if kind == "chosen" else other]["log_loss"] = loss
    explained = explain_predictor(predictor)
    for kind, loss in report["validation_log_loss"].items():
        assert f"`{kind}` {loss:.3f}" in explained
    assert f"`{other}` did better: 0.100 against 0.200" in explained
    report["held_out"][other]["log_loss"] = 0.3
    assert "did better" not in explain_predictor(predictor)


def test_unusable_traces_are_refused(trace: AcceptanceTrace) -> None:
    with pytest.raises(FitError, match="prompts"):
        fit_predictor(trace.paths[:3], "threshold")
    sure = [dataclasses.replace(p, accepted=np.full_like(p.accepted, p.depth)) for p in trace.paths]
    with pytest.raises(FitError, match="0 rejected"):
        fit_predictor(sure, "threshold")
    damaged = dataclasses.replace(trace.paths[0], features=np.full_like(trace.paths[0].features, np.nan))
    with pytest.raises(FitError, match="not finite"):
        fit_predictor([damaged, *trace.paths[1:]], "threshold")
    with pytest.raises(FitError, match="2 draft-target pairs"):
        fit_predictor([trace, dataclasses.replace(trace, draft="other")], "threshold")
    with pytest.raises(PluginError, match="oracle"):
        fit_predictor(trace, "oracle")


def test_damaged_predictors_are_refused(fitted: dict[str, FittedPredictor], tmp_path: object) -> None:
    path = tmp_path / "predictor.json"  # type: ignore[operator]
    for kind, name in (("lightgbm", "feature"), ("wisp-mlp", "layers")):
        fitted[kind].save(path)
        payload = read_document(path, "predictor").payload
        payload["scorer"][name] = payload["scorer"][name][:-1]
        write_document(path, "predictor", payload)
        with pytest.raises(ArtifactDamaged):
            load_predictor(path)


@pytest.mark.parametrize("method", ["isotonic", "platt"])
def test_calibration_is_monotone_and_finds_the_truth(method: str) -> None:
    rng = np.random.default_rng(2)
    score = rng.normal(0, 2, 6000)
    truth = 1 / (1 + np.exp(-score))
    seen = rng.random(6000) < truth
    calibration = Calibration.fit(score, seen, method)
    grid = np.linspace(-9, 9, 200)
    assert (np.diff(calibration.many(grid)) >= 0).all()
    assert [calibration(float(x)) for x in grid] == pytest.approx(calibration.many(grid).tolist())
    assert np.abs(calibration.many(score) - truth).mean() < 0.03
    assert expected_calibration_error(calibration.many(score), seen) < 0.02
    # Negative control: probabilities that are half of what they should be are found out.
    assert expected_calibration_error(calibration.many(score) / 2, seen) > 0.15
    assert sum(n for _, _, n in reliability(truth, seen)) == 6000


def test_auc_counts_ties_half() -> None:
    assert auc(np.array([1.0, 2.0]), np.array([0.0])) == 1.0
    assert auc(np.array([1.0]), np.array([1.0])) == 0.5
    assert auc(np.array([0.0]), np.array([1.0, 2.0])) == 0.0
