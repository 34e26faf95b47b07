"""How good an estimator could be on a profile: what its own measurements say of each other.

Two oracles stand beside the estimators. One knows what another measurement of each very shape found, of as
many visits as the row has: its error is repeat noise and nothing else. The other knows the quantile of each
shape's own single steps: no bound of one number per shape that holds as often for each of them can lie lower.
One that holds as often over all of them can, where a few shapes stalled.

Held-out evaluation: groups of whole shapes left out, every estimator side by side.

Leaving random shapes out flatters whoever interpolates between neighbours. Here every shape of a block
goes at once: all with a number of items, a draft length, a context, or a corner of all three. What falls
outside the box that remains is scored apart, because there an estimator extrapolates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from wispprof.fitting.batch_totals import FloatArray, Totals
from wispprof.fitting.conformal import REGIMES
from wispprof.fitting.estimator import FittedEstimator
from wispprof.fitting.observations import MINIMUM_SHAPES, Observations
from wispprof.fitting.registry import ESTIMATOR_KINDS, model_class
from wispprof.fitting.selection import assemble, out_of_fold, relative_errors

__all__ = [
    "Evaluation",
    "Progress",
    "bound_floor",
    "evaluate",
    "fit_on",
    "groups_of",
    "measured_again",
    "paced_floor",
]

HALVINGS = 20


def measured_again(data: Observations, seed: int = 0) -> dict[str, float] | None:
    """Percentage errors of one measurement as a prediction of another; None without rows of several visits.

    A shape's visits are halved at random, again and again. Two halves differ more than two whole rows
    would, by a factor that their numbers of visits give.
    """
    rng = np.random.default_rng(seed)
    again: list[float] = []
    actual: list[float] = []
    for blocks in data.blocks:
        count = len(blocks)
        if count < 2:
            continue
        first = count // 2
        shrink = np.sqrt(2 * first * (count - first)) / count
        for _ in range(HALVINGS):
            order = rng.permutation(count)
            one, other = blocks[order[:first]], blocks[order[first:]]
            away = float(np.log(np.median(one) / np.median(other))) * shrink
            again.append(float(np.exp(away)))
            actual.append(1.0)
    return relative_errors(np.array(again), np.array(actual)) if again else None


def bound_floor(data: Observations, levels: Sequence[float]) -> dict[float, float]:
    """Mean of each shape's own quantile of single steps ÷ its median, by level."""
    return {level: _mean_quantile(data.samples, data, level) for level in levels}


def paced_floor(data: Observations, levels: Sequence[float]) -> dict[float, float]:
    """The same, did one know at every step how slow the machine is at that moment."""
    return {level: _mean_quantile(data.speed_corrected, data, level) for level in levels}


def _mean_quantile(samples: Sequence[FloatArray], data: Observations, level: float) -> float:
    each = [
        float(np.quantile(own, level, method="inverted_cdf")) / median
        for own, median in zip(samples, data.median_ms.tolist(), strict=True)
    ]
    return float(np.mean(each))


Progress = Callable[[int, int, str], None]

COLUMNS = {"items": 0, "new": 6, "cached": 5}
MAX_BLOCKS = 5
INNER_FOLDS = 5
LEVELS = (0.95, 0.99)


@dataclass
class Evaluation:
    """What held-out evaluation found. All tables are lists of flat records.

    ``groups``: per estimator, scheme and domain; ``regimes``: per estimator and regime, over all groups
    in domain; ``splits``: per estimator and level over random splits; ``learning``: per estimator and
    number of shapes; ``points``: (estimator, scheme, predicted, bound, actual, in domain) for plots.
    ``noise``: standard error of a shape's median, percent, over shapes. ``again``: errors of a second
    measurement of the same shapes as a prediction, None where none was visited twice; ``floor``: mean of each
    shape's own quantile ÷ its median, by level, and ``paced_floor`` for one who knows the machine's pace.
    """

    noise: dict[str, float]
    again: dict[str, float] | None = None
    floor: dict[float, float] = field(default_factory=dict)
    paced_floor: dict[float, float] = field(default_factory=dict)
    groups: list[dict[str, Any]] = field(default_factory=list)
    regimes: list[dict[str, Any]] = field(default_factory=list)
    splits: list[dict[str, Any]] = field(default_factory=list)
    learning: list[dict[str, Any]] = field(default_factory=list)
    points: list[dict[str, Any]] = field(default_factory=list)

    def overall(self, kind: str, in_domain: bool = True) -> dict[str, Any]:
        """The record of one estimator over all block schemes."""
        return next(
            r
            for r in self.groups
            if r["estimator"] == kind and r["scheme"] == "all" and r["in_domain"] == in_domain
        )


def groups_of(data: Observations) -> Iterator[tuple[str, np.ndarray]]:
    """(scheme, mask of held-out shapes) for every block; each leaves enough to learn from."""
    for scheme, column in COLUMNS.items():
        values = data.totals[:, column]
        distinct = np.unique(values)
        for part in np.array_split(distinct, min(MAX_BLOCKS, len(distinct))):
            held = np.isin(values, part)
            if held.any() and (~held).sum() >= MINIMUM_SHAPES:
                yield scheme, held
    high = np.stack(
        [data.totals[:, c] > np.median(data.totals[:, c]) for c in COLUMNS.values()], axis=1
    )
    octant = high @ np.array([4, 2, 1])
    for corner in np.unique(octant):
        held = octant == corner
        if held.sum() >= 3 and (~held).sum() >= MINIMUM_SHAPES:
            yield "corner", held


def fit_on(kind: str, data: Observations, coverage: float = 0.95) -> FittedEstimator:
    """An estimator with its bound, from these observations alone."""
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
        measured_again(data, seed),
        bound_floor(data, LEVELS),
        paced_floor(data, LEVELS),
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
        _random_splits(found, kind, data, splits, seed, lambda k=kind: step(f"{k}: coverage"))  # type: ignore[misc]
        for size in sizes:
            found.learning.append(_learning_point(kind, data, size, seed))
            for _ in range(LEARNING_REPEATS):
                step(f"{kind}: {size} shapes")
    return found


# --- groups ---------------------------------------------------------------------------------------


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
    regime = (p50 >= estimator.ratio.split_ms).astype(int) + 2 * (test.totals[:, 7] > 0)
    inside = np.array([shape in estimator.domain for shape in _as_totals(test)])
    return _Scored(scheme, p50, bound, test.median_ms, test.samples, inside, regime)


def _as_totals(data: Observations) -> list[Totals]:
    return [Totals(*(int(v) for v in row)) for row in data.totals]


def _summarise_groups(found: Evaluation, kind: str, scored: list[_Scored]) -> None:
    for scheme in (*dict.fromkeys(s.scheme for s in scored), "all"):
        chosen = [s for s in scored if scheme in (s.scheme, "all")]
        for inside in (True, False):
            masks = [s.inside == inside for s in chosen]
            if sum(int(m.sum()) for m in masks) == 0:
                continue
            record = {"estimator": kind, "scheme": scheme, "in_domain": inside}
            found.groups.append(record | _figures(chosen, masks))
    for number, name in enumerate(REGIMES):
        masks = [s.inside & (s.regime == number) for s in scored]
        if sum(int(m.sum()) for m in masks):
            record = {"estimator": kind, "regime": name}
            found.regimes.append(record | _figures(scored, masks))
    for s in scored:
        for values in zip(s.p50, s.bound, s.actual, s.inside, strict=True):
            p50, bound, actual, inside = (v.item() for v in values)
            found.points.append(
                {
                    "estimator": kind,
                    "scheme": s.scheme,
                    "p50_ms": p50,
                    "bound_ms": bound,
                    "actual_ms": actual,
                    "in_domain": inside,
                }
            )


def _figures(scored: Sequence[_Scored], masks: Sequence[np.ndarray]) -> dict[str, Any]:
    """Errors of medians; coverage of single samples, a shape's samples having one vote together."""
    p50 = np.concatenate([s.p50[m] for s, m in zip(scored, masks, strict=True)])
    bound = np.concatenate([s.bound[m] for s, m in zip(scored, masks, strict=True)])
    actual = np.concatenate([s.actual[m] for s, m in zip(scored, masks, strict=True)])
    samples = [s.samples[i] for s, m in zip(scored, masks, strict=True) for i in np.flatnonzero(m)]
    return {
        "shapes": len(p50),
        **relative_errors(p50, actual),
        "coverage": coverage_of(bound, samples),
        "sharpness": float((bound / p50).mean()),
    }


def coverage_of(bound: FloatArray, samples: Sequence[FloatArray]) -> float:
    """Share of samples at or below their bound, each shape weighing the same."""
    return float(np.mean([(s <= b).mean() for s, b in zip(samples, bound, strict=True)]))


# --- coverage over random splits ------------------------------------------------------------------


def _random_splits(
    found: Evaluation,
    kind: str,
    data: Observations,
    splits: int,
    seed: int,
    step: Callable[[], None],
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
    for level, values in seen.items():
        if values:
            table = np.array(values)
            found.splits.append(
                {
                    "estimator": kind,
                    "level": level,
                    "splits": splits,
                    "coverage": float(table[:, 0].mean()),
                    "worst_split": float(table[:, 0].min()),
                    "sharpness": float(table[:, 1].mean()),
                }
            )


# --- learning curve -------------------------------------------------------------------------------

LEARNING_REPEATS = 3


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
        step_model = model_class(kind)().fit(learn)
        errors.append(relative_errors(step_model.p50_many(test.totals), test.median_ms))
    return {
        "estimator": kind,
        "shapes": size,
        **{
            name: float(np.mean([e[name] for e in errors]))
            for name in ("mape", "median_ape", "p90_ape")
        },
    }
