"""The tabulated residual equals LightGBM's trees, never falls, and refuses damaged tables."""

from __future__ import annotations

import numpy as np
import pytest

from wispprof.fitting.monotone_tables import FEATURES, GROUPS, MonotoneTables, ResidualFeatures


def _features(table: np.ndarray) -> ResidualFeatures:
    return ResidualFeatures(*table.T)


def _learn(rounds: int) -> tuple[MonotoneTables, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    table = np.exp(rng.normal(0, 1, (300, FEATURES)))
    target = 0.2 * np.log(table[:, 0]) * np.log1p(table[:, 1]) + 0.1 * table[:, 4]
    return MonotoneTables(rounds).fit(_features(table), target), table, target


def test_tables_equal_the_trees() -> None:
    tables, table, target = _learn(40)
    booster = MonotoneTables(40).train(_features(table), target - target.mean())
    expected = booster.predict(table, num_threads=1) + target.mean()
    assert tables.value_many(_features(table)) == pytest.approx(expected, abs=1e-9)
    alone = [tables.value(row) for row in table.tolist()]
    assert alone == pytest.approx(expected, abs=1e-9)


def test_tables_never_fall_and_learn_something() -> None:
    tables, table, target = _learn(80)
    rng = np.random.default_rng(1)
    more = table + rng.exponential(1.0, table.shape) * (rng.random(table.shape) < 0.4)
    values = tables.value_many(_features(table))
    assert (tables.value_many(_features(more)) >= values).all()
    spread = np.abs(target - target.mean()).mean()
    assert np.abs(values - target).mean() < 0.6 * spread


def test_no_rounds_is_a_constant() -> None:
    tables, table, target = _learn(0)
    assert np.ptp(tables.value_many(_features(table))) == 0
    assert tables.value([1.0] * FEATURES) == pytest.approx(target.mean())


def test_payload_round_trip_and_refusals() -> None:
    tables, table, _ = _learn(40)
    loaded = MonotoneTables.from_payload(tables.payload())
    assert (loaded.value_many(_features(table)) == tables.value_many(_features(table))).all()
    bad = tables.payload()
    place = next(i for i, g in enumerate(GROUPS) if np.size(bad["tables"][i]) > 1 and len(g) == 2)
    bad["tables"][place][0][0] = 9.0
    with pytest.raises(ValueError, match="fall"):
        MonotoneTables.from_payload(bad)
    bad = tables.payload()
    bad["edges"][0] = bad["edges"][0][:-1]
    with pytest.raises(ValueError, match="edges"):
        MonotoneTables.from_payload(bad)
