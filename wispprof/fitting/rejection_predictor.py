"""Rejection predictors: fit, calibrate, judge, save and load.

A scorer ranks draft tokens; a calibration maps its score to the probability that the target accepts.
Sources: isotonic regression, Zadrozny and Elkan (KDD 2002); logistic line, Platt (1999); expected
calibration error, Guo et al. (ICML 2017), with bins of equal count.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self, cast

import numpy as np

from wispprof import plugins
from wispprof.artifacts.document import from_plain, load_fitted, write_document
from wispprof.artifacts.manifest import Provenance
from wispprof.artifacts.rows import AcceptanceTrace, TracePath
from wispprof.errors import FitError, TooFewOutcomes
from wispprof.fitting.batch_totals import FloatArray
from wispprof.fitting.candidate_acceptance import (
    CandidateModel,
    CandidateRows,
    candidate_rows,
    fit_candidates,
)
from wispprof.fitting.rejection_scorers import (
    BoostedTrees,
    MarginLogistic,
    Scorer,
    Threshold,
    TokenRows,
    WispMlp,
    check_classes,
    split_prompts,
    token_rows,
)
from wispprof.policies.controllers import share_rejection
from wispprof.types import DraftFeatures

KIND = "predictor"
SCORERS: dict[str, type[Scorer]] = {c.kind: c for c in (Threshold, MarginLogistic, WispMlp, BoostedTrees)}
PREDICTOR_KINDS = tuple(SCORERS)

ISOTONIC_ROWS = 1000
"""Niculescu-Mizil and Caruana (ICML 2005): isotonic overfits below about a thousand rows."""
KNOTS = 48
LABELS = (False, True)
MIN_PROBABILITY = 0.002


@dataclass(frozen=True)
class Calibration:
    """A non-decreasing map from score to probability, linear between knots, flat beyond them."""

    method: str
    scores: tuple[float, ...]
    values: tuple[float, ...]

    @classmethod
    def fit(cls, score: FloatArray, accepted: np.ndarray, method: str = "auto") -> Self:
        """Learn from scores (n,) and outcomes (n,). ``method``: ``isotonic``, ``platt`` or ``auto``."""
        if method == "auto":
            method = "isotonic" if len(score) >= ISOTONIC_ROWS else "platt"
        knots = np.unique(np.quantile(score, np.linspace(0, 1, KNOTS)))
        if method == "platt":
            from sklearn.linear_model import LogisticRegression

            line = LogisticRegression(C=1e4).fit(score[:, None], accepted)
            slope = max(0.0, float(line.coef_[0, 0]))
            values = 1 / (1 + np.exp(-(slope * knots + float(line.intercept_[0]))))
        else:
            from sklearn.isotonic import IsotonicRegression

            # Averaging within bins of equal count first keeps single outcomes from making 0 or 1.
            place = np.clip(np.searchsorted(knots, score, side="right") - 1, 0, len(knots) - 1)
            count = np.bincount(place, minlength=len(knots)).astype(float)
            some = count > 0
            centre = np.bincount(place, score, len(knots))[some] / count[some]
            share = (np.bincount(place, accepted, len(knots))[some] + 1) / (count[some] + 2)
            values = IsotonicRegression().fit_transform(centre, share, sample_weight=count[some])
            knots = centre
        values = np.clip(values, MIN_PROBABILITY, 1 - MIN_PROBABILITY)
        return cls(method, tuple(float(s) for s in knots), tuple(float(v) for v in values))

    def __call__(self, score: float) -> float:
        scores, values = self.scores, self.values
        place = bisect_right(scores, score)
        if place == 0:
            return values[0]
        if place == len(scores):
            return values[-1]
        left = scores[place - 1]
        share = (score - left) / (scores[place] - left)
        return values[place - 1] + share * (values[place] - values[place - 1])

    def many(self, score: FloatArray) -> FloatArray:
        """The map over an array; (n,) to (n,)."""
        return np.interp(score, self.scores, self.values)

    def __post_init__(self) -> None:
        if not self.scores or len(self.scores) != len(self.values):
            raise ValueError("a calibration needs as many values as scores")


@dataclass(frozen=True)
class FittedPredictor:
    """A calibrated rejection predictor. Make one with :func:`fit_predictor`.

    ``candidates``: of a position's further candidates; ``None`` if the traces did not record them.
    """

    scorer: Scorer
    calibration: Calibration
    report: dict[str, Any] = field(default_factory=dict)
    candidates: CandidateModel | None = None

    @property
    def kind(self) -> str:
        return self.scorer.kind

    def acceptance_prob(self, features: DraftFeatures, depth: int) -> float:
        return self.calibration(self.scorer.score(features, depth))

    def acceptance_prob_batch(self, features: np.ndarray, depth: np.ndarray) -> np.ndarray:
        return self.calibration.many(self.scorer.score_many(np.asarray(features, float), depth))

    def candidate_acceptance(
        self, features: DraftFeatures, probs: Sequence[float] | np.ndarray, depth: int
    ) -> np.ndarray:
        """P(the target's token is this candidate), (w,).

        Without a model of those after the first, they share its rejection as the draft's own probabilities
        do. See :class:`~wispprof.policies.interface.CandidatePredictor`.
        """
        first = np.array(self.acceptance_prob(features, depth))
        return self._rate_others(first, np.array(features), np.asarray(probs, float), depth)

    def candidate_acceptance_batch(
        self, features: np.ndarray, probs: np.ndarray, depth: np.ndarray
    ) -> np.ndarray:
        first, rows = self.acceptance_prob_batch(features, depth), np.asarray(features, float)
        return self._rate_others(first, rows, np.asarray(probs, float), depth)

    def _rate_others(
        self, first: FloatArray, features: FloatArray, probs: FloatArray, depth: Any
    ) -> FloatArray:
        if self.candidates is None:
            return share_rejection(first, probs)
        others = (1 - first[..., None]) * self.candidates.shares(features, probs, depth)
        return np.concatenate((first[..., None], others), -1)[..., : probs.shape[-1]]

    def save(
        self, path: Path, inputs: dict[str, str] | None = None, provenance: Provenance | None = None
    ) -> str:
        """Write the predictor as one JSON document; returns its content hash."""
        payload = {
            "kind": self.kind,
            "scorer": self.scorer.payload(),
            "calibration": asdict(self.calibration),
            "report": self.report,
        }
        if self.candidates is not None:
            payload["candidates"] = self.candidates.payload()
        return write_document(Path(path), KIND, payload, inputs, provenance)


def load_predictor(path: Path) -> FittedPredictor:
    """Read a predictor. Raises the artifact errors, and :class:`ArtifactDamaged` for a bad payload."""
    return load_fitted(Path(path), KIND, _from_payload)


def _from_payload(kind: str, payload: dict[str, Any]) -> FittedPredictor:
    scorer = _scorer_class(kind).from_payload(payload["scorer"])
    calibration = from_plain(payload["calibration"], Calibration)
    known = payload.get("candidates")
    candidates = None if known is None else CandidateModel.from_payload(known)
    return FittedPredictor(scorer, calibration, dict(payload.get("report", {})), candidates)


def _scorer_class(kind: str) -> type[Scorer]:
    """Built in, an entry point, or ``MODULE:CLASS``. Raises :class:`PluginError` for an unknown name."""
    return cast("type[Scorer]", plugins.load("predictors", kind, SCORERS))


def fit_scorer(kind: str, learn: Sequence[TracePath], tune: Sequence[TracePath]) -> FittedPredictor:
    """A predictor fitted on ``learn`` and calibrated on ``tune``; its report is empty."""
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

    Three fifths of the prompts train the scorer, a fifth calibrates it, a fifth tests it; ``.report``
    holds the figures. ``auto`` keeps the kind of least log loss, cross-validated by prompt on the first
    four fifths.
    If the traces record the draft's candidates, those after the first get a model of their own.
    Raises :class:`FitError` for too few prompts or tokens of one outcome, and for traces of two pairs.
    """
    paths = paths_of(traces)
    parts = split_prompts(paths, seed=seed)
    learn, tune, test = map(token_rows, parts)
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
            "requested": kind,
            "held_out": {n: judge(fitted[n], test) for n in tried},
            "validation_log_loss": loss,
            "prompts": len({p.prompt for p in paths}),
            "tokens": {"learn": len(learn), "tune": len(tune), "test": len(test)},
        }
    )
    chosen = replace(fitted[best], candidates=fit_candidates(*parts[:2]))
    held_out = candidate_rows(parts[2])
    if chosen.candidates is not None and held_out is not None:
        chosen.report["candidates"] = judge_candidates(chosen, held_out)
    return chosen


def _calibrate(scorer: Scorer, rows: TokenRows) -> Calibration:
    if np.unique(rows.accepted).size < 2:
        raise TooFewOutcomes("All draft tokens of the prompts that calibrate have one outcome.")
    return Calibration.fit(scorer.score_many(rows.features, rows.depth), rows.accepted)


def _cross_validate(
    kinds: Sequence[str], learn: TokenRows, tune: TokenRows, folds: int = 4
) -> dict[str, float]:
    """Mean log loss of each kind on prompts used neither to train nor to calibrate it.

    Fold f is tested, fold f + 1 calibrates, the others train.
    """
    both = learn.joined(tune)
    fold = both.prompt % folds
    loss = dict.fromkeys(kinds, 0.0)
    from sklearn.metrics import log_loss

    for number in range(folds):
        judged, calibrating = fold == number, fold == (number + 1) % folds
        rows = both.take(judged)
        if not len(rows) or not calibrating.any():
            continue
        for name in kinds:
            scorer = _scorer_class(name)().fit(both.take(~(judged | calibrating)))
            predictor = FittedPredictor(scorer, _calibrate(scorer, both.take(calibrating)))
            probability = predictor.acceptance_prob_batch(rows.features, rows.depth)
            loss[name] += log_loss(rows.accepted, probability, labels=LABELS) * len(rows) / len(both)
    return loss


def paths_of(traces: AcceptanceTrace | Sequence[AcceptanceTrace] | Sequence[TracePath]) -> list[TracePath]:
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
            f"Traces of {len(pairs)} draft-target pairs cannot be fitted together.", "Fit each pair alone."
        )
    return paths


def judge(predictor: FittedPredictor, rows: TokenRows, recall: float = 0.8) -> dict[str, Any]:
    """AUC, ECE, log loss, reliability curve, and false acceptance at a recall of accepted tokens.

    False acceptance: share of rejected tokens above the score that ``recall`` of the accepted ones
    exceed. If all outcomes are alike, AUC and false acceptance are None.
    """
    from sklearn.metrics import log_loss

    probability = predictor.acceptance_prob_batch(rows.features, rows.depth)
    score = predictor.scorer.score_many(rows.features, rows.depth)
    good, bad = score[rows.accepted], score[~rows.accepted]
    report: dict[str, Any] = {
        "auc": None,
        "false_acceptance": None,
        "recall": recall,
        "ece": expected_calibration_error(probability, rows.accepted),
        "log_loss": float(log_loss(rows.accepted, probability, labels=LABELS)),
        "accepted_share": float(rows.accepted.mean()),
        "reliability": reliability(probability, rows.accepted),
    }
    if len(good) and len(bad):
        report["auc"] = auc(good, bad)
        report["false_acceptance"] = float((bad >= np.quantile(good, 1 - recall)).mean())
    return report


def judge_candidates(predictor: FittedPredictor, rows: CandidateRows) -> dict[str, Any]:
    """Log loss of which candidate the target takes, or none, and expected calibration error over all
    candidates; beside both, what the draft's own probabilities (``plain``) give."""
    judged = {
        "": predictor.candidate_acceptance_batch(rows.features, rows.probs, rows.depth),
        "plain_": rows.probs,
    }
    right = rows.rank[:, None] == np.arange(rows.probs.shape[1])
    report: dict[str, Any] = {"rows": len(rows.rank), "width": rows.probs.shape[1]}
    for name, probs in judged.items():
        outcomes = np.column_stack([probs, 1 - probs.sum(axis=1)])
        chosen = outcomes[np.arange(len(rows.rank)), rows.rank]
        report[f"{name}log_loss"] = float(-np.log(np.clip(chosen, MIN_PROBABILITY, 1)).mean())
        report[f"{name}ece"] = expected_calibration_error(probs.ravel(), right.ravel())
    return report


def auc(good: FloatArray, bad: FloatArray) -> float:
    """Probability that an accepted token scores above a rejected one; ties count half."""
    ordered = np.sort(bad)
    below = np.searchsorted(ordered, good, side="left")
    upto = np.searchsorted(ordered, good, side="right")
    return float((below + upto).mean() / 2 / len(bad))


def reliability(
    probability: FloatArray, accepted: np.ndarray, bins: int = 10
) -> list[tuple[float, float, int]]:
    """(mean predicted, share accepted, rows) of bins of equal count, by rising prediction."""
    order = np.argsort(probability, kind="stable")
    parts = np.array_split(order, min(bins, len(order)))
    return [(float(probability[p].mean()), float(accepted[p].mean()), len(p)) for p in parts if len(p)]


def expected_calibration_error(probability: FloatArray, accepted: np.ndarray, bins: int = 10) -> float:
    """Mean distance between predicted and observed acceptance over bins of equal count."""
    curve = reliability(probability, accepted, bins)
    total = sum(n for _, _, n in curve)
    return sum(abs(p - a) * n for p, a, n in curve) / total
