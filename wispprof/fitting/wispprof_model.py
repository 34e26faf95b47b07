"""The ``wispprof`` step-time model: physical terms, corrected by a monotone boosted residual.

Inside the measured box it predicts ``physical^α · exp(residual)``. With α = 1 the residual can only raise
the ratio as work grows. A smaller α lets the residual lower the ratio while the product never falls.
Held-out error chooses the knots of the physical curves, α and the number of boosting rounds (0 included).

Outside the box the totals are cut to it, and the physical terms add the cost of the excess. Both parts
never fall if work is added, so neither does their sum.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from operator import le
from typing import Annotated, NamedTuple, Self

import numpy as np

from wispprof.artifacts.files import Meta
from wispprof.fitting.batch_totals import ArrayTotals, FloatArray, Totals, clipped, upper_corner
from wispprof.fitting.monotone_tables import MonotoneTables, ResidualFeatures
from wispprof.fitting.observations import Observations
from wispprof.fitting.physical_terms import PhysicalTerms, padded_many, sampled_tokens
from wispprof.fitting.step_time_models import StepTimeModel
from wispprof.types import BatchTotals

ROUNDS = (0, 15, 30, 60, 120)
ALPHAS = (1.0, 0.85, 0.6)
KNOTS = ((0, 0), (2, 1), (4, 2), (8, 4), (128, 6))
"""Knots of the physical curves in new and cached tokens. Noisy profiles support few; the last choice puts one
at (almost) every measured row count, which keeps the tile edges of a GPU."""
MIN_ERROR_RATIO = 0.97
"""A more complicated choice must lower the held-out error at least to this share."""


def residual_features(totals: ArrayTotals, physical: PhysicalTerms, sampled: FloatArray) -> ResidualFeatures:
    """Features of n batches, arrays (n,)."""
    return ResidualFeatures(
        padded_many(totals.sum_new, np.array(physical.buckets_)),
        totals.sum_cached,
        totals.items,
        totals.max_cached,
        totals.max_new,
        totals.prefill,
        physical.p50_many(totals, sampled),
    )


class ModelChoice(NamedTuple):
    """Settings of the model: knots of the physical curves, exponent α, boosting rounds."""

    knots: tuple[int, int] = KNOTS[0]
    alpha: float = ALPHAS[0]
    rounds: int = ROUNDS[0]


class WispprofStepTime(StepTimeModel):
    """``physical_``, ``residual_``, ``alpha_``; ``high_``, the upper corner of the measured box, and
    ``max_sampled_``, the most sampled tokens of a step in it.

    ``choice``: settings; if None, held-out error chooses them.
    """

    kind = "wispprof"
    physical_: PhysicalTerms
    residual_: MonotoneTables
    alpha_: Annotated[float, Meta(gt=0, le=1)]
    high_: Totals
    max_sampled_: int

    def __init__(self, choice: ModelChoice | None = None) -> None:
        self.choice = choice

    def fit(self, data: Observations) -> Self:
        choice = self.choice_ = self.choice or _choose(data)
        self.physical_ = PhysicalTerms(*choice.knots).fit(data)
        sampled = sampled_tokens(data.totals)
        features = residual_features(data.totals, self.physical_, sampled)
        target = np.log(data.median_ms) - choice.alpha * np.log(features.physical_ms)
        self.residual_ = MonotoneTables(choice.rounds).fit(features, target)
        self.alpha_ = choice.alpha
        self.high_ = upper_corner(data.totals)
        self.max_sampled_ = int(sampled.max())
        return self

    def clone_unfitted(self) -> Self:
        return type(self)(self.choice_)

    def p50(self, totals: Totals) -> float:
        sampled = sampled_tokens(totals)
        physical_ms = self.physical_.p50(totals, sampled)
        if sampled <= self.max_sampled_ and all(map(le, totals, self.high_)):
            return self._corrected(totals, physical_ms)
        cut, cut_ms = self._cut(totals, sampled)
        return self._corrected(cut, cut_ms) + (physical_ms - cut_ms)

    def clipped(self, totals: Totals, high: Totals) -> float:
        """Milliseconds of the batch cut to the measured box, whose corner is ``high_``, not ``high``."""
        return self._corrected(*self._cut(totals, sampled_tokens(totals)))

    def _cut(self, totals: Totals, sampled: int) -> tuple[Totals, float]:
        """The totals cut to the box, and their physical milliseconds."""
        cut: Totals = BatchTotals(*map(min, totals, self.high_))
        return cut, self.physical_.p50(cut, min(sampled, self.max_sampled_))

    def _corrected(self, totals: Totals, physical_ms: float) -> float:
        items, new, cached, _, _, max_cached, max_new, prefill = totals
        tokens = self.physical_.padded(new)
        # In the order of ResidualFeatures; a plain tuple, because this runs once per candidate.
        features = (tokens, cached, items, max_cached, max_new, prefill, physical_ms)
        value = math.exp(self.residual_.value(features))
        return value * (physical_ms if self.alpha_ == 1.0 else float(physical_ms**self.alpha_))

    def p50_many(self, totals: ArrayTotals) -> FloatArray:
        sampled = sampled_tokens(totals)
        features = residual_features(totals, self.physical_, sampled)
        if not (
            any(column.max(initial=0) > most for column, most in zip(totals, self.high_, strict=True))
            or sampled.max(initial=0) > self.max_sampled_
        ):
            return self._corrected_many(features)
        cut = self._cut_features(totals, sampled)
        excess: FloatArray = features.physical_ms - cut.physical_ms
        return self._corrected_many(cut) + excess

    def clipped_many(self, totals: ArrayTotals, high: Totals) -> FloatArray:
        """:meth:`clipped` of n batches, (n,)."""
        return self._corrected_many(self._cut_features(totals, sampled_tokens(totals)))

    def _cut_features(self, totals: ArrayTotals, sampled: FloatArray) -> ResidualFeatures:
        cut = clipped(totals, self.high_)
        return residual_features(cut, self.physical_, np.minimum(sampled, self.max_sampled_))

    def _corrected_many(self, features: ResidualFeatures) -> FloatArray:
        physical_ms: FloatArray = features.physical_ms
        base = physical_ms if self.alpha_ == 1.0 else physical_ms**self.alpha_
        result: FloatArray = base * np.exp(self.residual_.value_many(features))
        return result


def _choose(data: Observations) -> ModelChoice:
    folds = list(_inner_folds(data))
    errors = {knots: _physical_error(data, folds, knots) for knots in KNOTS}
    knots = min(errors, key=lambda k: errors[k])
    corrected = _corrected_errors(data, folds, knots)
    best = min(corrected, key=lambda c: corrected[c])
    simple = ModelChoice(knots)
    return best if corrected[best] < MIN_ERROR_RATIO * corrected[simple] else simple


def _physical_error(data: Observations, folds: Sequence[np.ndarray], knots: tuple[int, int]) -> float:
    """Mean absolute log error of the physical part alone on held-out shapes."""
    errors = []
    for held in folds:
        test = data.take(held)
        physical = PhysicalTerms(*knots).fit(data.take(~held))
        ratio = physical.p50_many(test.totals, sampled_tokens(test.totals)) / test.median_ms
        errors.append(float(np.abs(np.log(ratio)).mean()))
    return float(np.mean(errors))


def _corrected_errors(
    data: Observations, folds: Sequence[np.ndarray], knots: tuple[int, int]
) -> dict[ModelChoice, float]:
    """Mean absolute log error on held-out shapes, for each α and number of rounds."""
    errors: dict[ModelChoice, list[float]] = {}
    for held in folds:
        learn, test = data.take(~held), data.take(held)
        physical = PhysicalTerms(*knots).fit(learn)
        learn_sampled = sampled_tokens(learn.totals)
        test_sampled = sampled_tokens(test.totals)
        features = residual_features(learn.totals, physical, learn_sampled)
        cut = clipped(test.totals, upper_corner(learn.totals))
        cut_sampled = np.minimum(test_sampled, learn_sampled.max())
        cut_features = residual_features(cut, physical, cut_sampled)
        table, cut_log = np.column_stack(cut_features), np.log(cut_features.physical_ms)
        excess = physical.p50_many(test.totals, test_sampled) - cut_features.physical_ms
        for alpha in ALPHAS:
            target = np.log(learn.median_ms) - alpha * np.log(features.physical_ms)
            offset = float(target.mean())
            booster = MonotoneTables(max(ROUNDS)).train(features, target - offset)
            for rounds in ROUNDS:
                if rounds == 0 and alpha != 1.0:
                    continue
                # One thread: for a few hundred rows, starting more costs more than it saves.
                extra = booster.predict(table, num_iteration=rounds, num_threads=1) if rounds else 0.0
                predicted = np.exp(alpha * cut_log + offset + extra) + excess
                error = float(np.abs(np.log(predicted / test.median_ms)).mean())
                errors.setdefault(ModelChoice(knots, alpha, rounds), []).append(error)
    return {choice: float(np.mean(values)) for choice, values in errors.items()}


def _inner_folds(data: Observations) -> Iterator[np.ndarray]:
    """Masks of held-out shapes: four random quarters, and the middle thirds by items and by depth.

    Random folds alone would favour a residual that knows its neighbours; the thirds ask it to bridge gaps.
    """
    ranks = np.array([zlib.crc32(f"inner0:{key}".encode()) for key in data.groups])
    fold = np.argsort(np.argsort(ranks, kind="stable"), kind="stable") % 4
    for number in range(4):
        yield fold == number
    for column in (data.totals.items, data.totals.max_cached):
        low, high = np.quantile(column, (1 / 3, 2 / 3))
        middle = (column > low) & (column <= high)
        if 0 < middle.sum() < len(data) - 8:
            yield middle
