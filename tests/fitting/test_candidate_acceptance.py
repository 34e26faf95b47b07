"""Acceptance of a position's further candidates: calibrated, consistent with chains, the same from a file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from synthetic_traces import synthetic_trace

from wispprof.artifacts.document import read_document, write_document
from wispprof.artifacts.rows import AcceptanceTrace, TracePath
from wispprof.errors import ArtifactDamaged
from wispprof.fitting import FittedPredictor, fit_predictor, load_predictor
from wispprof.fitting.candidate_acceptance import candidate_rows
from wispprof.fitting.model_card import explain_predictor
from wispprof.fitting.rejection_predictor import judge_candidates
from wispprof.fitting.rejection_scorers import token_rows
from wispprof.policies.controllers import ConfidenceAcceptance
from wispprof.types import DraftFeatures

WIDTH = 8


def with_candidates(path: TracePath, rng: np.random.Generator) -> TracePath:
    """After a rejected first candidate the others are the target's by half the odds of their own share."""
    rows = len(path.path)
    probs = np.sort(rng.dirichlet(np.full(WIDTH + 2, 0.4), rows), axis=1)[:, ::-1][:, :WIDTH]
    left = 1 - probs.cumsum(axis=1)[:, :-1]
    share = np.clip(probs[:, 1:] / left, 0, 1)
    hit = rng.random(share.shape) < 0.6 * share
    first = np.where(hit.any(axis=1), hit.argmax(axis=1) + 1, WIDTH)
    ranks = np.where(path.accepted > 0, 0, first)
    return dataclasses.replace(path, target_ranks=ranks, candidate_probs=probs)


@pytest.fixture(scope="module")
def trace() -> AcceptanceTrace:
    plain, rng = synthetic_trace(40, 80, depth=1), np.random.default_rng(1)
    return dataclasses.replace(plain, paths=tuple(with_candidates(path, rng) for path in plain.paths))


@pytest.fixture(scope="module")
def fitted(trace: AcceptanceTrace) -> FittedPredictor:
    return fit_predictor(trace, "margin-logistic")


def test_rows_are_those_of_the_rejection_predictor(trace: AcceptanceTrace) -> None:
    rows, tokens = candidate_rows(trace.paths), token_rows(trace.paths)
    assert rows is not None
    assert (rows.features == tokens.features).all()
    assert (rows.depth == tokens.depth).all()
    assert ((rows.rank == 0) == tokens.accepted).all()
    assert candidate_rows([trace.paths[0], synthetic_trace(1).paths[0]]) is None


def test_further_candidates_are_calibrated_and_beat_the_drafts_probabilities(
    fitted: FittedPredictor, trace: AcceptanceTrace
) -> None:
    report = fitted.report["candidates"]
    assert report["width"] == WIDTH
    assert report["log_loss"] < report["plain_log_loss"] - 0.05
    assert report["ece"] < 0.02 < report["plain_ece"]
    assert "For draft trees" in explain_predictor(fitted)
    # Negative control: the model of one trace does not fit ranks that have nothing to do with it.
    rows = candidate_rows(trace.paths)
    assert rows is not None
    blind = dataclasses.replace(rows, rank=np.random.default_rng(0).permutation(rows.rank))
    assert judge_candidates(fitted, blind)["log_loss"] > report["log_loss"] + 0.1


@pytest.mark.parametrize("known", [True, False])
def test_probabilities_of_a_position(fitted: FittedPredictor, trace: AcceptanceTrace, known: bool) -> None:
    """They begin with the chain's, sum to at most 1, and do not depend on how many are asked for."""
    predictor = fitted if known else dataclasses.replace(fitted, candidates=None)
    rows = candidate_rows(trace.paths[:3])
    assert rows is not None
    batch = predictor.candidate_acceptance_batch(rows.features, rows.probs, rows.depth)
    assert batch.shape == rows.probs.shape
    assert (batch >= 0).all()
    assert (batch.sum(axis=1) <= 1 + 1e-9).all()
    for place in range(0, len(rows.rank), 9):
        features, depth = DraftFeatures(*rows.features[place].tolist()), int(rows.depth[place])
        for width in (0, 1, 2, WIDTH):
            one = predictor.candidate_acceptance(features, rows.probs[place, :width].tolist(), depth)
            assert one == pytest.approx(batch[place, :width])
            assert width == 0 or one[0] == predictor.acceptance_prob(features, depth)
    excluded = predictor.candidate_acceptance(features, [0.7, 0.3, 0.0, 0.0], 0)
    assert (excluded[2:] == 0).all()
    assert excluded[1] > 0


def test_without_a_fit_the_others_share_by_their_probabilities() -> None:
    rule, features = ConfidenceAcceptance(), DraftFeatures(0.6, 1.0, 1.0, 1.0)
    expected = [0.6, 0.4 * 0.3 / 0.5, 0.4 * 0.1 / 0.5]
    assert rule.candidate_acceptance(features, [0.5, 0.3, 0.1], 0) == pytest.approx(expected)
    batch = rule.candidate_acceptance_batch(np.array([features]), np.array([[0.5, 0.3, 0.1]]), np.zeros(1))
    assert batch[0] == pytest.approx(expected)


def test_a_file_keeps_the_candidates_and_older_files_have_none(
    fitted: FittedPredictor, trace: AcceptanceTrace, tmp_path: Path
) -> None:
    path = tmp_path / "predictor.json"
    fitted.save(path)
    loaded = load_predictor(path)
    features = DraftFeatures(*trace.paths[0].features[0, 0].tolist())
    probs = trace.paths[0].candidate_probs
    assert probs is not None
    ours, theirs = (p.candidate_acceptance(features, probs[0], 0) for p in (fitted, loaded))
    assert theirs == pytest.approx(ours)
    payload = read_document(path, "predictor").payload
    payload["candidates"]["weights"] = payload["candidates"]["weights"][1:]
    write_document(path, "predictor", payload)
    with pytest.raises(ArtifactDamaged):
        load_predictor(path)
    del payload["candidates"]
    write_document(path, "predictor", payload)
    assert load_predictor(path).candidates is None


def test_traces_without_candidates_give_no_model(trace: AcceptanceTrace) -> None:
    plain = [dataclasses.replace(p, target_ranks=None, candidate_probs=None) for p in trace.paths]
    predictor = fit_predictor(plain, "margin-logistic")
    assert predictor.candidates is None
    assert "candidates" not in predictor.report
    # Nothing to learn from if the target's token is never one of the others.
    never = [dataclasses.replace(p, target_ranks=np.where(p.target_ranks, WIDTH, 0)) for p in trace.paths]
    assert fit_predictor(never, "margin-logistic").candidates is None
