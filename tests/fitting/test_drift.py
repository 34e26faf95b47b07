"""Drift: no alarm without change, a quick alarm after one, and the right cells named."""

from __future__ import annotations

import numpy as np
import pytest
from synthetic_steps import random_shape, synthetic_rows, true_ms

from wispprof.fitting import FittedEstimator
from wispprof.fitting.batch_totals import totals_of
from wispprof.fitting.drift import DriftMonitor, cell_of
from wispprof.fitting.evaluation import fit_on
from wispprof.fitting.observations import Observations
from wispprof.types import BatchShape


@pytest.fixture(scope="module")
def estimator() -> FittedEstimator:
    return fit_on("wispprof", Observations.of(synthetic_rows(140)))


class Stream:
    """Steps of a server with timing noise, ``factor`` times as slow as it was."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.shapes = [random_shape(self.rng, 24) for _ in range(120)]
        self.times = [true_ms(s) for s in self.shapes]

    def step(self, factor: float = 1.0) -> tuple[BatchShape, float]:
        place = int(self.rng.integers(len(self.shapes)))
        noise = np.exp(0.015 * self.rng.standard_normal() + 0.005 * self.rng.exponential())
        return self.shapes[place], float(self.times[place] * factor * noise)


def test_quiet_over_ten_thousand_undisturbed_steps(estimator: FittedEstimator) -> None:
    stream, monitor = Stream(1), DriftMonitor(estimator)
    for _ in range(10_000):
        assert monitor.observe(*stream.step()) is None
    status = monitor.status()
    assert not status.re_profile
    assert status.reason == ""
    assert abs(status.ratio - 1) < 0.03
    assert abs(status.coverage - 0.95) < 0.03


@pytest.mark.parametrize("coverage", [0.95, 0.99])
def test_coverage_returns_within_two_hundred_steps(estimator: FittedEstimator, coverage: float) -> None:
    stream, monitor = Stream(2), DriftMonitor(estimator.with_coverage(coverage))
    for _ in range(400):
        monitor.observe(*stream.step())
    stale = []
    for _ in range(200):
        shape, taken = stream.step(1.2)
        stale.append(taken <= monitor.estimator.predict(shape)[1])
        monitor.observe(shape, taken)
    assert np.mean(stale) < 0.2
    covered, above = [], []
    for _ in range(600):
        shape, taken = stream.step(1.2)
        p50, bound = monitor.corrected().predict(shape)
        covered.append(taken <= bound)
        above.append(taken > p50)
        monitor.observe(shape, taken)
    assert abs(np.mean(covered) - coverage) < 0.03
    assert abs(np.mean(above) - 0.5) < 0.15
    assert monitor.status().re_profile


def test_it_comes_down_again_when_the_server_recovers(estimator: FittedEstimator) -> None:
    stream, monitor = Stream(3), DriftMonitor(estimator)
    for factor in (1.0, 1.2, 1.0):
        for _ in range(700):
            monitor.observe(*stream.step(factor))
    status = monitor.status()
    assert status.ratio == pytest.approx(1.0, abs=0.04)
    assert status.bound_scale < 1.1


def test_the_detector_raises_one_alarm_with_the_ratio(estimator: FittedEstimator) -> None:
    stream, monitor = Stream(4), DriftMonitor(estimator)
    for _ in range(300):
        monitor.observe(*stream.step())
    alarms = [s for s in (monitor.observe(*stream.step(1.2)) for _ in range(400)) if s]
    assert len(alarms) == 1
    assert "longer than fitted" in alarms[0].reason
    assert alarms[0].reason.endswith("Check the machine's load; if it is as usual, re-profile.")
    assert "20 %" in monitor.status().reason or "19 %" in monitor.status().reason


def test_it_names_the_cells_that_went_wrong(estimator: FittedEstimator) -> None:
    stream, monitor = Stream(5), DriftMonitor(estimator)
    slow = {cell_of(totals_of(s.items)) for s in stream.shapes if s.max_cached > 4096}
    assert 0 < len(slow) < len({cell_of(totals_of(s.items)) for s in stream.shapes})
    for step in range(6000):
        shape, taken = stream.step()
        late = step > 2500 and cell_of(totals_of(shape.items)) in slow
        monitor.observe(shape, taken * (1.25 if late else 1.0))
    status = monitor.status()
    named = {cell for cell, _ in status.cells}
    assert named
    assert named <= slow
    assert all(ratio == pytest.approx(1.25, abs=0.08) for _, ratio in status.cells)


def test_one_stall_is_no_drift(estimator: FittedEstimator) -> None:
    stream, monitor = Stream(6), DriftMonitor(estimator)
    for step in range(1500):
        shape, taken = stream.step()
        assert monitor.observe(shape, taken * (40 if step % 300 == 299 else 1)) is None
    assert monitor.status().ratio == pytest.approx(1.0, abs=0.05)


def test_impossible_times_are_no_evidence(estimator: FittedEstimator) -> None:
    monitor = DriftMonitor(estimator)
    shape = BatchShape.uniform(2, 5, 100)
    for taken in (float("nan"), float("inf"), 0.0, -1.0):
        assert monitor.observe(shape, taken) is None
    assert monitor.observe(BatchShape(()), 1.0) is None
    assert monitor.status().steps == 0
    assert monitor.corrected().predict(shape) == estimator.predict(shape)


def test_an_estimator_that_was_wrong_from_the_first_step_is_reported(
    estimator: FittedEstimator,
) -> None:
    """What the first steps take is no level to compare with where it is beyond the estimator's own error."""
    stream, monitor = Stream(11), DriftMonitor(estimator)
    fired = [monitor.observe(*stream.step(1.6)) for _ in range(200)]
    status = next(status for status in fired if status is not None)
    assert "longer than fitted" in status.reason
    near = DriftMonitor(estimator)
    assert all(near.observe(*stream.step(1.03)) is None for _ in range(2000))


def test_stalls_in_the_first_steps_hide_no_later_drift(estimator: FittedEstimator) -> None:
    stream, monitor = Stream(12), DriftMonitor(estimator)
    for number in range(100):
        shape, taken = stream.step()
        assert monitor.observe(shape, taken * (30.0 if number % 9 == 0 else 1.0)) is None
    assert any(monitor.observe(*stream.step(1.2)) is not None for _ in range(150))
