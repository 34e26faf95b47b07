"""From profile rows to observations: what is refused, what is left out, what a busy machine did to them."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from synthetic_steps import synthetic_rows, true_ms

from wispprof.artifacts.rows import StepRow
from wispprof.errors import FitError, PluginError
from wispprof.fitting import fit_estimator
from wispprof.fitting.observations import Observations, check_same_model
from wispprof.types import BatchShape


def _with(rows: list[StepRow], place: int, **changes: object) -> list[StepRow]:
    return [dataclasses.replace(r, **changes) if i == place else r for i, r in enumerate(rows)]  # type: ignore[arg-type]


ROWS = synthetic_rows(30)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (ROWS[:8], "too few"),
        (_with(ROWS, 3, samples_ms=(1.0, math.nan)), "nan"),
        (_with(ROWS, 3, samples_ms=(1.0, math.inf)), "inf"),
        (_with(ROWS, 3, samples_ms=(-1.0,)), "must be positive"),
        (_with(ROWS, 3, samples_ms=()), "no samples"),
        (_with(ROWS, 3, shape=BatchShape(())), "empty batch"),
        ([dataclasses.replace(r, samples_ms=(5.0,)) for r in ROWS], "same time"),
        (
            [StepRow(f"{n}", "verify", BatchShape.of([(n, 64)]), (1.0 + n,)) for n in range(1, 20)],
            "64 cached tokens",
        ),
        (
            [StepRow(f"{n}", "verify", BatchShape.of([(4, n)]), (1.0 + n,)) for n in range(1, 20)],
            "4 new tokens",
        ),
        (
            ROWS + [dataclasses.replace(r, samples_ms=tuple(4 * s for s in r.samples_ms)) for r in ROWS],
            "two models",
        ),
    ],
)
def test_rows_that_nothing_should_be_fitted_on(rows: list[StepRow], words: str) -> None:
    with pytest.raises(FitError, match=words):
        fit_estimator(rows, "wisp-linear")


def test_profiles_of_two_models_are_refused() -> None:
    check_same_model({"a.jsonl": "m float32", "b.jsonl": "m float32"})
    with pytest.raises(FitError, match=r"a\.jsonl \(m float32\)"):
        check_same_model({"a.jsonl": "m float32", "b.jsonl": "n float32"})


def test_unknown_estimators_are_refused() -> None:
    with pytest.raises(PluginError, match="oracle"):
        fit_estimator(ROWS, "oracle")


def test_drifted_rows_are_left_out_unless_little_would_remain() -> None:
    some = [dataclasses.replace(r, flags=("drift",)) if r.order < 5 else r for r in ROWS]
    assert (Observations.of(some).left_out, Observations.of(some).flagged) == (5, 0)
    most = [dataclasses.replace(r, flags=("drift",)) if r.order < 25 else r for r in ROWS]
    assert (Observations.of(most).left_out, Observations.of(most).flagged) == (0, 25)


# --- busy machines ----------------------------------------------------------------------------------


def _busy(swing: float) -> list[StepRow]:
    """A sweep during which the machine's speed wanders, with a sentinel every eight rows."""
    rng = np.random.default_rng(8)
    sentinel = BatchShape.uniform(4, 5, 512)
    rows: list[StepRow] = []
    for order, row in enumerate(synthetic_rows(120, seed=4)):
        slow = math.exp(swing * math.sin(order / 17))
        times = tuple(t * slow for t in row.samples_ms)
        rows.append(dataclasses.replace(row, samples_ms=times, order=2 * order, flags=("drift",)))
        if order % 8 == 0:
            seen = true_ms(sentinel) * slow * np.exp(0.015 * rng.standard_normal(7))
            samples = tuple(float(t) for t in seen)
            rows.append(StepRow(f"s{order}", "sentinel", sentinel, samples, ("drift",), 24, 2 * order + 1))
    return rows


def test_drift_that_the_sentinel_saw_is_taken_out_of_medians_and_left_in_samples() -> None:
    rows = _busy(0.4)
    data = Observations.of(rows)
    assert data.drift == pytest.approx(0.8, abs=0.1)
    assert data.flagged == len(rows)
    truth = np.array([true_ms(s) for s in data.shapes])
    raw = np.array([float(np.median(s)) for s in data.samples])
    assert np.abs(np.log(data.median_ms / truth)).mean() < 0.05
    assert np.abs(np.log(raw / truth)).mean() > 0.15


def test_a_quiet_sentinel_changes_next_to_nothing() -> None:
    data = Observations.of(_busy(0.0))
    raw = np.array([float(np.median(s)) for s in data.samples])
    assert np.abs(data.median_ms / raw - 1).max() < 0.01
    without = [r for r in _busy(0.4) if r.kind != "sentinel"]
    assert Observations.of(without).drift == 0.0
