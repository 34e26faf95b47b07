"""Fit, judge, keep and load rejection predictors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from wispprof.artifacts.document import BAD_PAYLOAD, read_document, write_document
from wispprof.artifacts.manifest import Provenance
from wispprof.artifacts.rows import AcceptanceTrace, TracePath
from wispprof.errors import ArtifactDamaged, FitError
from wispprof.fitting.batch_totals import FloatArray
from wispprof.fitting.predictors.boosted_trees import BoostedTrees
from wispprof.fitting.predictors.calibration import (
    Calibration,
    expected_calibration_error,
    reliability,
)
from wispprof.fitting.predictors.scorers import MarginLogistic, Scorer, Threshold, WispMlp
from wispprof.fitting.predictors.training_rows import (
    TokenRows,
    check_classes,
    split_prompts,
    token_rows,
)
from wispprof.types import DraftFeatures

__all__ = [
    "PREDICTOR_KINDS",
    "FittedPredictor",
    "fit_predictor",
    "fit_scorer",
    "judge",
    "load_predictor",
]

KIND = "predictor"
SCORERS: dict[str, type[Scorer]] = {
    c.kind: c for c in (Threshold, MarginLogistic, WispMlp, BoostedTrees)
}
PREDICTOR_KINDS = tuple(SCORERS)


@dataclass(frozen=True)
class FittedPredictor:
    """A calibrated rejection predictor. Make one with :func:`fit_predictor`."""

    scorer: Scorer
    calibration: Calibration
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return self.scorer.kind

    def acceptance_prob(self, features: DraftFeatures, depth: int) -> float:
        return self.calibration(self.scorer.score(features, depth))

    def acceptance_prob_batch(self, features: np.ndarray, depth: np.ndarray) -> np.ndarray:
        return self.calibration.many(self.scorer.score_many(np.asarray(features, float), depth))

    def save(
        self, path: Path, inputs: dict[str, str] | None = None, provenance: Provenance | None = None
    ) -> str:
        """Write the predictor as one JSON document; returns its content hash."""
        payload = {
            "kind": self.kind,
            "scorer": self.scorer.payload(),
            "calibration": self.calibration.payload(),
            "report": self.report,
        }
        return write_document(Path(path), KIND, payload, inputs, provenance)


def load_predictor(path: Path) -> FittedPredictor:
    """Read a predictor. Raises the artifact errors, :class:`ArtifactDamaged` for a bad payload."""
    payload = read_document(Path(path), KIND).payload
    try:
        scorer = _scorer_class(str(payload["kind"])).from_payload(payload["scorer"])
        calibration = Calibration.from_payload(payload["calibration"])
        return FittedPredictor(scorer, calibration, dict(payload.get("report", {})))
    except (*BAD_PAYLOAD, FitError) as err:
        raise ArtifactDamaged(
            f"{path} is not a complete predictor ({err}).", "Fit it anew with `wispprof fit`."
        ) from err


def _scorer_class(kind: str) -> type[Scorer]:
    if kind not in SCORERS:
        raise FitError(
            f"There is no predictor called {kind!r}.", f"Choose one of {', '.join(SCORERS)}."
        )
    return SCORERS[kind]


def fit_scorer(kind: str, learn: Sequence[TracePath], tune: Sequence[TracePath]) -> FittedPredictor:
    """A predictor of one kind that learns from some paths and is calibrated on others; no report."""
    rows = token_rows(learn)
    check_classes(rows)
    scorer = _scorer_class(kind)().fit(rows)
    return FittedPredictor(scorer, _calibrate(scorer, token_rows(tune)))


def fit_predictor(
    traces: AcceptanceTrace | Sequence[AcceptanceTrace] | Sequence[TracePath],
    kind: str = "auto",
    seed: int = 0,
    kinds: Sequence[str] = PREDICTOR_KINDS,
) -> FittedPredictor:
    """Fit a rejection predictor on acceptance traces, split by prompt.

    Three fifths of the prompts teach the score, a fifth calibrates it, a fifth judges it; the figures
    stand in ``.report``. ``auto`` keeps the kind of least log loss, cross-validated by
    prompt on the other four fifths.
    Raises :class:`FitError` for too few prompts or tokens of one outcome, and for traces of two pairs.
    """
    paths = paths_of(traces)
    learn, tune, test = (token_rows(part) for part in split_prompts(paths, seed=seed))
    check_classes(learn)
    tried = tuple(kinds) if kind == "auto" else (kind,)
    fitted: dict[str, FittedPredictor] = {}
    for name in tried:
        scorer = _scorer_class(name)().fit(learn)
        fitted[name] = FittedPredictor(scorer, _calibrate(scorer, tune))
    loss = {} if len(tried) == 1 else _cross_validate(tried, learn, tune)
    best = min(tried, key=lambda n: loss.get(n, 0.0))
    fitted[best].report.update(
        {
            "chosen": best,
            "asked": kind,
            "held_out": {n: judge(fitted[n], test) for n in tried},
            "validation_log_loss": loss,
            "prompts": len({p.prompt for p in paths}),
            "tokens": {"learn": len(learn), "tune": len(tune), "test": len(test)},
        }
    )
    return fitted[best]


def _calibrate(scorer: Scorer, rows: TokenRows) -> Calibration:
    if np.unique(rows.accepted).size < 2:
        raise FitError("All draft tokens of one part have one outcome.", "Take a longer trace.")
    return Calibration.fit(scorer.score_many(rows.features, rows.depth), rows.accepted)


def _cross_validate(
    kinds: Sequence[str], learn: TokenRows, tune: TokenRows, folds: int = 4
) -> dict[str, float]:
    """Mean log loss of each kind on prompts it saw neither in learning nor in calibration.

    Fold f is judged, fold f + 1 calibrates, the others teach.
    """
    both = learn.joined(tune)
    fold = both.prompt % folds
    loss = dict.fromkeys(kinds, 0.0)
    for number in range(folds):
        judged, calibrating = fold == number, fold == (number + 1) % folds
        rows = both.take(judged)
        if not len(rows) or not calibrating.any():
            continue
        for name in kinds:
            scorer = _scorer_class(name)().fit(both.take(~(judged | calibrating)))
            predictor = FittedPredictor(scorer, _calibrate(scorer, both.take(calibrating)))
            probability = predictor.acceptance_prob_batch(rows.features, rows.depth)
            loss[name] += log_loss(probability, rows.accepted) * len(rows) / len(both)
    return loss


def paths_of(
    traces: AcceptanceTrace | Sequence[AcceptanceTrace] | Sequence[TracePath],
) -> list[TracePath]:
    """All paths of some traces; refuses traces of different pairs."""
    if isinstance(traces, AcceptanceTrace):
        return list(traces.paths)
    paths: list[TracePath] = []
    pairs: set[tuple[str, str]] = set()
    for trace in traces:
        if isinstance(trace, TracePath):
            paths.append(trace)
        else:
            pairs.add((trace.target, trace.draft))
            paths.extend(trace.paths)
    if len(pairs) > 1:
        raise FitError(
            f"Traces of {len(pairs)} draft-target pairs cannot be fitted together.",
            "Fit each pair alone.",
        )
    return paths


def log_loss(probability: FloatArray, accepted: np.ndarray) -> float:
    """Mean negative log likelihood in nats."""
    return float(-np.log(np.where(accepted, probability, 1 - probability)).mean())


def judge(predictor: FittedPredictor, rows: TokenRows, recall: float = 0.8) -> dict[str, Any]:
    """AUC, ECE, log loss, reliability curve, and false acceptance at a recall of accepted tokens.

    False acceptance: share of rejected tokens that pass a threshold which ``recall`` of the accepted
    ones pass. All NaN-free: with one outcome alone AUC and false acceptance are None.
    """
    probability = predictor.acceptance_prob_batch(rows.features, rows.depth)
    score = predictor.scorer.score_many(rows.features, rows.depth)
    good, bad = score[rows.accepted], score[~rows.accepted]
    report: dict[str, Any] = {
        "auc": None,
        "false_acceptance": None,
        "recall": recall,
        "ece": expected_calibration_error(probability, rows.accepted),
        "log_loss": log_loss(probability, rows.accepted),
        "accepted_share": float(rows.accepted.mean()),
        "reliability": reliability(probability, rows.accepted),
    }
    if len(good) and len(bad):
        report["auc"] = auc(good, bad)
        report["false_acceptance"] = float((bad >= np.quantile(good, 1 - recall)).mean())
    return report


def auc(good: FloatArray, bad: FloatArray) -> float:
    """Chance that an accepted token scores above a rejected one; ties count half."""
    ordered = np.sort(bad)
    below = np.searchsorted(ordered, good, side="left")
    upto = np.searchsorted(ordered, good, side="right")
    return float((below + upto).mean() / 2 / len(bad))
