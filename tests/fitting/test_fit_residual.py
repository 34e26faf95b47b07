"""The tabulated residual: what LightGBM says, never falling, and refused where a file says otherwise."""

from __future__ import annotations

import numpy as np
import pytest

from wispprof.fitting.monotone_tables import FEATURES, GROUPS, MonotoneTables


def _learn(rounds: int) -> tuple[MonotoneTables, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    features = np.exp(rng.normal(0, 1, (300, FEATURES)))
    target = 0.2 * np.log(features[:, 0]) * np.log1p(features[:, 1]) + 0.1 * features[:, 4]
    return MonotoneTables(rounds).fit(features, target), features, target


def test_tables_say_what_the_trees_say() -> None:
    tables, features, target = _learn(40)
    booster = MonotoneTables(40).train(features, target - target.mean())
    wanted = booster.predict(features, num_threads=1) + target.mean()
    assert tables.value_many(features) == pytest.approx(wanted, abs=1e-9)
    alone = [tables.value(row.tolist()) for row in features]
    assert alone == pytest.approx(wanted, abs=1e-9)


def test_tables_never_fall_and_learn_something() -> None:
    tables, features, target = _learn(80)
    rng = np.random.default_rng(1)
    more = features + rng.exponential(1.0, features.shape) * (rng.random(features.shape) < 0.4)
    assert (tables.value_many(more) >= tables.value_many(features)).all()
    spread = np.abs(target - target.mean()).mean()
    assert np.abs(tables.value_many(features) - target).mean() < 0.6 * spread


def test_no_rounds_is_a_constant() -> None:
    tables, features, target = _learn(0)
    assert np.ptp(tables.value_many(features)) == 0
    assert tables.value([1.0] * FEATURES) == pytest.approx(target.mean())


def test_payload_round_trip_and_refusals() -> None:
    tables, features, _ = _learn(40)
    again = MonotoneTables.from_payload(tables.payload())
    assert (again.value_many(features) == tables.value_many(features)).all()
    bad = tables.payload()
    place = next(i for i, g in enumerate(GROUPS) if np.size(bad["tables"][i]) > 1 and len(g) == 2)
    bad["tables"][place][0][0] = 9.0
    with pytest.raises(ValueError, match="fall"):
        MonotoneTables.from_payload(bad)
    bad = tables.payload()
    bad["edges"][0] = bad["edges"][0][:-1]
    with pytest.raises(ValueError, match="edges"):
        MonotoneTables.from_payload(bad)
