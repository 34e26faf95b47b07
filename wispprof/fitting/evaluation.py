"""Held-out evaluation: groups of whole shapes left out, every estimator side by side.

Random held-out shapes favour models that interpolate between neighbours. Here a group leaves together: all
shapes of some numbers of items, of some draft lengths, of some contexts, or a corner of all three. Shapes
outside the box of the rest are scored apart, because there an estimator extrapolates.

Two noise floors stand beside the estimators. :func:`repeat_error` predicts a shape by another measurement
of it. :func:`noise_floor` knows each shape's own quantile of single steps: a bound of one number per shape
that covers each shape alike cannot be lower.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from wispprof.fitting.batch_totals import FloatArray, select
from wispprof.fitting.conformal import REGIMES, RatioBound
from wispprof.fitting.estimator import ESTIMATOR_KINDS, Domain, FittedEstimator, model_class
from wispprof.fitting.observations import MINIMUM_SHAPES, Observations
from wispprof.fitting.step_time_models import StepTimeModel
from wispprof.types import BatchTotals

FOLDS = 10
HALVINGS = 20
MAX_GROUPS = 5
INNER_FOLDS = 5
LEVELS = (0.95, 0.99)
LEARNING_REPEATS = 3

Progress = Callable[[int, int, str], None]
"""Called with (done, total, what)."""


def folds_of(data: Observations, folds: int = FOLDS, seed: int = 0) -> np.ndarray:
    """Fold of each shape, (n,), by a hash of its key: whole shapes, the same on every run."""
    ranks = np.array([zlib.crc32(f"{seed}:{key}".encode()) for key in data.groups])
    fold = np.empty(len(data), dtype=np.int64)
    fold[np.argsort(ranks, kind="stable")] = np.arange(len(data)) % folds
    return fold


def out_of_fold(
    kind: str, data: Observations, folds: int = FOLDS, seed: int = 0, nested: bool = True
) -> tuple[FloatArray, StepTimeModel]:
    """Predictions made without their own shape, (n,), and the model fitted on all shapes.

    Without ``nested`` the settings (not the weights) are those that the fit on all shapes chose. That is
    much quicker, and precise enough for a bound whose coverage is then tested on other shapes.
    """
    whole = model_class(kind)().fit(data)
    fold = folds_of(data, min(folds, len(data)), seed)
    predicted = np.empty(len(data))
    for number in np.unique(fold):
        held = fold == number
        part = (model_class(kind)() if nested else whole.clone_unfitted()).fit(data.take(~held))
        predicted[held] = part.p50_many(select(data.totals, held))
    return predicted, whole


def relative_errors(predicted: FloatArray, actual: FloatArray) -> dict[str, float]:
    """MAPE, median, p90, p99 absolute percentage error and signed bias, all in percent."""
    signed = 100.0 * (predicted / actual - 1.0)
    size = np.abs(signed)
    p50, p90, p99 = np.quantile(size, (0.5, 0.9, 0.99))
    return {
        "mape": float(size.mean()),
        "median_ape": float(p50),
        "p90_ape": float(p90),
        "p99_ape": float(p99),
        "bias": float(signed.mean()),
    }


def assemble(
    step_model: StepTimeModel, predicted: FloatArray, data: Observations, coverage: float = 0.95
) -> FittedEstimator:
    """An estimator from a model fitted on all of ``data`` and out-of-fold predictions."""
    ratio = RatioBound.calibrate(np.maximum(predicted, 1e-9), data.samples, data.totals.prefill > 0)
    return FittedEstimator(step_model, ratio, Domain.of(data.totals), coverage)


def repeat_error(data: Observations, seed: int = 0) -> dict[str, float] | None:
    """Percentage errors of one measurement as a prediction of another; None without rows of several blocks.

    A shape's blocks are halved at random, many times. Two halves differ more than two whole rows would,
    by a factor that their numbers of blocks give.
    """
    rng = np.random.default_rng(seed)
    ratios: list[float] = []
    for block_ms in data.block_ms:
        count = len(block_ms)
        if count < 2:
            continue
        first = count // 2
        shrink = np.sqrt(2 * first * (count - first)) / count
        for _ in range(HALVINGS):
            order = rng.permutation(count)
            one, other = block_ms[order[:first]], block_ms[order[first:]]
            difference = float(np.log(np.median(one) / np.median(other))) * shrink
            ratios.append(float(np.exp(difference)))
    return relative_errors(np.array(ratios), np.ones(len(ratios))) if ratios else None


def noise_floor(
    data: Observations, levels: Sequence[float], speed_corrected: bool = False
) -> dict[float, float]:
    """Mean of each shape's own quantile of single steps ÷ its median, by level.

    ``speed_corrected``: as if machine speed were known at every step.
    """
    samples = data.speed_corrected if speed_corrected else data.samples
    floor = {}
    for level in levels:
        own = [float(np.quantile(times, level, method="inverted_cdf")) for times in samples]
        floor[level] = float(np.mean(np.array(own) / data.median_ms))
    return floor


@dataclass
class Evaluation:
    """Result of a held-out evaluation. All tables are lists of flat records.

    ``groups``: per estimator, scheme and domain; ``regimes``: per estimator and regime, over all groups
    in domain; ``splits``: per estimator and level over random splits; ``learning``: per estimator and
    number of shapes; ``points``: (estimator, scheme, predicted, bound, measured, in domain) for plots.
    ``noise``: standard error of a shape's median, percent, over shapes. ``repeat_error``: see the
    function; ``noise_floor`` and ``speed_corrected_floor``: by level.
    """

    noise: dict[str, float]
    repeat_error: dict[str, float] | None = None
    noise_floor: dict[float, float] = field(default_factory=dict)
    speed_corrected_floor: dict[float, float] = field(default_factory=dict)
    groups: list[dict[str, Any]] = field(default_factory=list)
    regimes: list[dict[str, Any]] = field(default_factory=list)
    splits: list[dict[str, Any]] = field(default_factory=list)
    learning: list[dict[str, Any]] = field(default_factory=list)
    points: list[dict[str, Any]] = field(default_factory=list)


def groups_of(data: Observations) -> Iterator[tuple[str, np.ndarray]]:
    """(scheme, mask of held-out shapes) of every group; each leaves enough to learn from."""
    totals = data.totals
    columns = {"items": totals.items, "new": totals.max_new, "cached": totals.max_cached}
    for scheme, values in columns.items():
        distinct = np.unique(values)
        for part in np.array_split(distinct, min(MAX_GROUPS, len(distinct))):
            held = np.isin(values, part)
            if held.any() and (~held).sum() >= MINIMUM_SHAPES:
                yield scheme, held
    high = np.stack([values > np.median(values) for values in columns.values()], axis=1)
    octant = high @ np.array([4, 2, 1])
    for corner in np.unique(octant):
        held = octant == corner
        if held.sum() >= 3 and (~held).sum() >= MINIMUM_SHAPES:
            yield "corner", held


def fit_on(kind: str, data: Observations, coverage: float = 0.95) -> FittedEstimator:
    """An estimator with its bound from these observations."""
    predicted, step_model = out_of_fold(kind, data, INNER_FOLDS, nested=False)
    return assemble(step_model, predicted, data, coverage)


def evaluate(
    data: Observations,
    kinds: Sequence[str] = ESTIMATOR_KINDS,
    splits: int = 20,
    seed: int = 0,
    progress: Progress | None = None,
) -> Evaluation:
    """Score ``kinds`` by groups, by random splits of the bound, and by learning curve."""
    noise = 100 * data.repeat_noise()
    found = Evaluation(
        {"median": float(np.median(noise)), "p90": float(np.quantile(noise, 0.9))},
        repeat_error(data, seed),
        noise_floor(data, LEVELS),
        noise_floor(data, LEVELS, speed_corrected=True),
    )
    groups = list(groups_of(data))
    sizes = _sizes(len(data))
    total = len(kinds) * (len(groups) + splits + len(sizes) * LEARNING_REPEATS)
    done = 0

    def step(what: str) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total, what)

    for kind in kinds:
        scored: list[_Scored] = []
        for scheme, held in groups:
            scored.append(_score(kind, scheme, data.take(~held), data.take(held)))
            step(f"{kind}: {scheme}")
        _summarise_groups(found, kind, scored)
        _random_splits(found, kind, data, splits, seed, partial(step, f"{kind}: coverage"))
        for size in sizes:
            found.learning.append(_learning_point(kind, data, size, seed))
            for _ in range(LEARNING_REPEATS):
                step(f"{kind}: {size} shapes")
    return found


@dataclass(frozen=True)
class _Scored:
    scheme: str
    p50: FloatArray
    bound: FloatArray
    actual: FloatArray
    samples: tuple[FloatArray, ...]
    inside: np.ndarray
    regime: np.ndarray


def _score(kind: str, scheme: str, learn: Observations, test: Observations) -> _Scored:
    estimator = fit_on(kind, learn)
    p50, bound = estimator.predict_many(test.totals, test.decode)
    regime = (p50 >= estimator.ratio.split_ms).astype(int) + 2 * (test.totals.prefill > 0)
    rows = np.column_stack(test.totals).astype(int).tolist()
    inside = np.array([BatchTotals(*row) in estimator.domain for row in rows])
    return _Scored(scheme, p50, bound, test.median_ms, test.samples, inside, regime)


def _summarise_groups(found: Evaluation, kind: str, scored: list[_Scored]) -> None:
    for scheme in (*dict.fromkeys(s.scheme for s in scored), "all"):
        chosen = [s for s in scored if scheme in (s.scheme, "all")]
        for inside in (True, False):
            record = {"estimator": kind, "scheme": scheme, "in_domain": inside}
            found.groups += _figures(record, chosen, [s.inside == inside for s in chosen])
    for number, name in enumerate(REGIMES):
        masks = [s.inside & (s.regime == number) for s in scored]
        found.regimes += _figures({"estimator": kind, "regime": name}, scored, masks)
    for s in scored:
        columns = (c.tolist() for c in (s.p50, s.bound, s.actual, s.inside))
        for point in zip(*columns, strict=True):
            named = zip(("p50_ms", "bound_ms", "actual_ms", "in_domain"), point, strict=True)
            found.points.append({"estimator": kind, "scheme": s.scheme, **dict(named)})


def _figures(
    record: dict[str, Any], scored: Sequence[_Scored], masks: Sequence[np.ndarray]
) -> list[dict[str, Any]]:
    """The record with errors of medians, and coverage of single samples, a shape's samples having one
    vote together; nothing without shapes under the masks."""
    pairs = list(zip(scored, masks, strict=True))
    p50 = np.concatenate([s.p50[m] for s, m in pairs])
    if not len(p50):
        return []
    bound = np.concatenate([s.bound[m] for s, m in pairs])
    actual = np.concatenate([s.actual[m] for s, m in pairs])
    samples = [s.samples[i] for s, m in pairs for i in np.flatnonzero(m)]
    return [
        {
            **record,
            "shapes": len(p50),
            **relative_errors(p50, actual),
            "coverage": coverage_of(bound, samples),
            "sharpness": float((bound / p50).mean()),
        }
    ]


def coverage_of(bound: FloatArray, samples: Sequence[FloatArray]) -> float:
    """Share of samples at or below their bound, each shape weighing the same."""
    return float(np.mean([(s <= b).mean() for s, b in zip(samples, bound, strict=True)]))


def _random_splits(
    found: Evaluation, kind: str, data: Observations, splits: int, seed: int, step: Callable[[], None]
) -> None:
    rng = np.random.default_rng(seed)
    seen: dict[float, list[tuple[float, float]]] = {level: [] for level in LEVELS}
    for _ in range(splits):
        held = np.zeros(len(data), dtype=bool)
        held[rng.permutation(len(data))[: max(4, len(data) // 4)]] = True
        estimator = fit_on(kind, data.take(~held))
        test = data.take(held)
        for level in LEVELS:
            p50, bound = estimator.with_coverage(level).predict_many(test.totals, test.decode)
            seen[level].append((coverage_of(bound, test.samples), float((bound / p50).mean())))
        step()
    for level, values in seen.items() if splits else ():
        coverage, sharpness = np.array(values).T
        found.splits.append(
            {
                "estimator": kind,
                "level": level,
                "splits": splits,
                "coverage": float(coverage.mean()),
                "worst_split": float(coverage.min()),
                "sharpness": float(sharpness.mean()),
            }
        )


def _sizes(shapes: int) -> list[int]:
    most = int(shapes * 0.75)
    sizes = [round(most * 0.5**i) for i in range(5)]
    return sorted(s for s in set(sizes) if s >= MINIMUM_SHAPES)


def _learning_point(kind: str, data: Observations, size: int, seed: int) -> dict[str, Any]:
    """Error on a quarter of the shapes after learning from ``size`` of the others."""
    errors = []
    for repeat in range(LEARNING_REPEATS):
        order = np.random.default_rng((seed, repeat)).permutation(len(data))
        test = data.take(order[: len(data) // 4])
        learn = data.take(order[len(data) // 4 :][:size])
        model = model_class(kind)().fit(learn)
        errors.append(relative_errors(model.p50_many(test.totals), test.median_ms))
    names = ("mape", "median_ape", "p90_ape")
    means = {name: float(np.mean([e[name] for e in errors])) for name in names}
    return {"estimator": kind, "shapes": size, **means}
