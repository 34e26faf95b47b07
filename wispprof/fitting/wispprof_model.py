"""The project's own estimator: physical terms, corrected by a monotone boosted residual.

Inside the measured box: ``physical^α · exp(residual)``. With α = 1 the residual can only raise the
ratio as work grows; a smaller α leaves it room to lower the ratio while the product still never falls.
The bends of the physical curves, α and the number of boosting rounds are chosen by held-out error, and
zero rounds is a candidate.

Beyond the box the totals are cut to it and the physical terms add what the excess costs. The sum of two
parts that never fall never falls, and nothing is clamped in silence.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from wispprof.fitting.batch_totals import FloatArray, Totals, bucket_many
from wispprof.fitting.monotone_tables import MonotoneTables
from wispprof.fitting.observations import Observations
from wispprof.fitting.physical_terms import PhysicalTerms, emitting, emitting_many

__all__ = ["WispprofStepTime", "residual_features"]

ROUNDS = (0, 15, 30, 60, 120)
ALPHAS = (1.0, 0.85, 0.6)
KNOTS = ((0, 0), (2, 1), (4, 2))
"""Bends of the physical curves in new and cached tokens; noisy profiles can afford few."""
WORTH = 0.97
"""A more complicated choice must cut the held-out error at least to this share."""


def residual_features(totals: FloatArray, physical: PhysicalTerms, emit: FloatArray) -> FloatArray:
    """(n, 7): padded tokens, cached, items, deepest, widest, prefill tokens, physical ms."""
    tokens = bucket_many(totals[:, 1], np.array(physical.buckets_))
    features = np.empty((len(totals), 7), order="F")
    features[:, 0] = tokens
    for place, column in enumerate((2, 0, 5, 6, 7), 1):
        features[:, place] = totals[:, column]
    features[:, 6] = physical.p50_many(totals, emit)
    return features


class ModelChoice(NamedTuple):
    """Settings of a surface: bends of the physical curves, exponent α, boosting rounds."""

    knots: tuple[int, int] = KNOTS[0]
    alpha: float = ALPHAS[0]
    rounds: int = ROUNDS[0]


class WispprofStepTime:
    """``physical_``, ``residual_``, ``alpha_``; ``high_``, the upper corner of the measured box, and
    ``most_``, the most tokens that emitted.

    ``choice``: settings; without them they are chosen by held-out error.
    """

    kind = "wispprof"
    monotone = True

    def __init__(self, seed: int = 0, choice: ModelChoice | None = None) -> None:
        self.seed = seed
        self.choice = choice
        self.choice_ = choice
        self.physical_ = PhysicalTerms()
        self.residual_ = MonotoneTables(0)
        self.alpha_ = 1.0
        self.high_ = Totals(0, 0, 0, 0, 0, 0, 0, 0)
        self.most_ = 0

    def fit(self, data: Observations) -> Self:
        choice = self.choice_ = self.choice or self._choose(data)
        self.physical_ = PhysicalTerms(*choice.knots).fit(data)
        emit = emitting_many(data.totals)
        features = residual_features(data.totals, self.physical_, emit)
        target = np.log(data.median_ms) - choice.alpha * np.log(features[:, 6])
        self.residual_ = MonotoneTables(choice.rounds).fit(features, target)
        self.alpha_ = choice.alpha
        self.high_ = Totals(*(int(v) for v in data.totals.max(axis=0)))
        self.most_ = int(emit.max())
        return self

    def again(self) -> Self:
        return type(self)(self.seed, self.choice_)

    def _choose(self, data: Observations) -> ModelChoice:
        folds = list(_inner_folds(data, self.seed))
        errors = {knots: _physical_error(data, folds, knots) for knots in KNOTS}
        knots = min(errors, key=lambda k: errors[k])
        corrected = _corrected_errors(data, folds, knots)
        best = min(corrected, key=lambda c: corrected[c])
        simple = ModelChoice(knots)
        return best if corrected[best] < WORTH * corrected[simple] else simple

    # --- asking -----------------------------------------------------------------------------------

    def p50(self, totals: Totals) -> float:
        emit = emitting(totals)
        base = self.physical_.p50(totals, emit)
        high = self.high_
        if not (
            totals[1] > high[1]
            or totals[2] > high[2]
            or totals[0] > high[0]
            or totals[5] > high[5]
            or totals[6] > high[6]
            or totals[7] > high[7]
            or totals[3] > high[3]
            or totals[4] > high[4]
            or emit > self.most_
        ):
            return self._corrected(totals, base)
        cut, inside = self._cut(totals, emit)
        return self._corrected(cut, inside) + (base - inside)

    def inside(self, totals: Totals, high: Totals) -> float:
        """Milliseconds of the batch cut to the measured box, whose corner is ``high_`` whatever is asked."""
        return self._corrected(*self._cut(totals, emitting(totals)))

    def _cut(self, totals: Totals, emit: int) -> tuple[Totals, float]:
        """The totals cut to the box, and what the physical terms say there."""
        cut = Totals(*(min(a, b) for a, b in zip(totals, self.high_, strict=True)))
        return cut, self.physical_.p50(cut, min(emit, self.most_))

    def _corrected(self, totals: Totals, base: float) -> float:
        items, new, cached, _, _, deep, wide, prefill = totals
        row = (self.physical_.tokens(new), cached, items, deep, wide, prefill, base)
        value = math.exp(self.residual_.value(row))
        return value * (base if self.alpha_ == 1.0 else float(base**self.alpha_))

    def p50_many(self, totals: FloatArray) -> FloatArray:
        emit = emitting_many(totals)
        if not ((totals > np.array(self.high_)).any() or (emit > self.most_).any()):
            return self._inside(residual_features(totals, self.physical_, emit))
        features = self._cut_features(totals, emit)
        excess = self.physical_.p50_many(totals, emit) - features[:, 6]
        return self._inside(features) + excess

    def inside_many(self, totals: FloatArray, high: FloatArray) -> FloatArray:
        """:meth:`inside` over rows (n, 8)."""
        return self._inside(self._cut_features(totals, emitting_many(totals)))

    def _cut_features(self, totals: FloatArray, emit: FloatArray) -> FloatArray:
        high = np.array(self.high_, dtype=np.float64)
        return residual_features(
            np.minimum(totals, high), self.physical_, np.minimum(emit, self.most_)
        )

    def _inside(self, features: FloatArray) -> FloatArray:
        base = features[:, 6] if self.alpha_ == 1.0 else features[:, 6] ** self.alpha_
        result: FloatArray = base * np.exp(self.residual_.value_many(features))
        return result

    def payload(self) -> dict[str, Any]:
        return {
            "physical": self.physical_.payload(),
            "residual": self.residual_.payload(),
            "alpha": self.alpha_,
            "high": list(self.high_),
            "most": self.most_,
        }

    @classmethod
    def from_payload(cls, payload: dict[str, Any]) -> Self:
        step_model = cls()
        step_model.physical_ = PhysicalTerms.from_payload(payload["physical"])
        step_model.residual_ = MonotoneTables.from_payload(payload["residual"])
        step_model.alpha_ = float(payload["alpha"])
        if not 0 < step_model.alpha_ <= 1:
            raise ValueError("alpha must lie in (0, 1]")
        step_model.high_ = Totals(*(int(v) for v in payload["high"]))
        step_model.most_ = int(payload["most"])
        return step_model


def _physical_error(
    data: Observations, folds: Sequence[np.ndarray], knots: tuple[int, int]
) -> float:
    """Mean absolute log error of the physical part alone on shapes held out."""
    errors = []
    for held in folds:
        test = data.take(held)
        physical = PhysicalTerms(*knots).fit(data.take(~held))
        ratio = physical.p50_many(test.totals, emitting_many(test.totals)) / test.median_ms
        errors.append(float(np.abs(np.log(ratio)).mean()))
    return float(np.mean(errors))


def _corrected_errors(
    data: Observations, folds: Sequence[np.ndarray], knots: tuple[int, int]
) -> dict[ModelChoice, float]:
    """Mean absolute log error on shapes held out, for each α and number of rounds."""
    errors: dict[ModelChoice, list[float]] = {}
    for held in folds:
        learn, test = data.take(~held), data.take(held)
        physical = PhysicalTerms(*knots).fit(learn)
        learnt, emit = emitting_many(learn.totals), emitting_many(test.totals)
        features = residual_features(learn.totals, physical, learnt)
        cut = np.minimum(test.totals, learn.totals.max(axis=0))
        asked = residual_features(cut, physical, np.minimum(emit, learnt.max()))
        inside = np.log(asked[:, 6])
        excess = physical.p50_many(test.totals, emit) - asked[:, 6]
        for alpha in ALPHAS:
            target = np.log(learn.median_ms) - alpha * np.log(features[:, 6])
            offset = float(target.mean())
            booster = MonotoneTables(max(ROUNDS)).train(features, target - offset)
            for rounds in ROUNDS:
                if rounds == 0 and alpha != 1.0:
                    continue
                extra = _boosted(booster, asked, rounds) if rounds else 0.0
                predicted = np.exp(alpha * inside + offset + extra) + excess
                size = np.abs(np.log(predicted / test.median_ms))
                errors.setdefault(ModelChoice(knots, alpha, rounds), []).append(float(size.mean()))
    return {choice: float(np.mean(values)) for choice, values in errors.items()}


def _boosted(booster: Any, features: FloatArray, rounds: int) -> FloatArray:
    # One thread: for a few hundred rows, starting more of them costs far more than it saves.
    value: FloatArray = booster.predict(features, num_iteration=rounds, num_threads=1)
    return value


def _inner_folds(data: Observations, seed: int) -> Iterator[np.ndarray]:
    """Masks of held-out shapes: four random fifths, and the thirds by items and by depth in turn.

    Random folds alone would favour a residual that knows its neighbours; blocks ask it to bridge gaps.
    """
    ranks = np.array([zlib.crc32(f"inner{seed}:{key}".encode()) for key in data.groups])
    fold = np.argsort(np.argsort(ranks, kind="stable"), kind="stable") % 4
    for number in range(4):
        yield fold == number
    for column in (0, 5):
        low, high = np.quantile(data.totals[:, column], (1 / 3, 2 / 3))
        middle = (data.totals[:, column] > low) & (data.totals[:, column] <= high)
        if 0 < middle.sum() < len(data) - 8:
            yield middle
