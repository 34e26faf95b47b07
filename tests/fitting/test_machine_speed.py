"""Rows of several blocks: each block was measured at the machine speed that the sentinel shows."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from synthetic_steps import random_shape, true_ms

from wispprof.artifacts import StepRow
from wispprof.fitting.evaluation import noise_floor, repeat_error
from wispprof.fitting.machine_speed import MachineSpeed, blocks_of, slowdown_of_rows
from wispprof.fitting.observations import Observations
from wispprof.types import BatchShape

SHAPE = BatchShape.uniform(4, 5, 256)


def test_a_row_takes_the_mean_of_its_visits_not_the_pace_of_the_first():
    reference_samples = [
        StepRow("s", "sentinel", SHAPE, tuple(ms * f for f in (0.999, 1.0, 1.001)), order=order)
        for order, ms in ((0, 1.0), (10, 1.0), (20, 1.0), (30, 2.0), (40, 2.0), (50, 1.0))
    ]
    quiet = StepRow("q", "verify", SHAPE, (1.0,) * 4, order=5)
    split = StepRow("v", "verify", SHAPE, (1.0,) * 4, order=5, blocks=((5, 2), (35, 2)))
    late = StepRow("l", "verify", SHAPE, (2.0,) * 4, order=35)
    *_, at_rest, between, slow = slowdown_of_rows([*reference_samples, quiet, split, late])
    assert slow / at_rest == pytest.approx(2.0, rel=0.01)
    assert between == pytest.approx(np.sqrt(at_rest * slow))


# --- a sweep on a machine whose pace wanders, a look beside every visit ---------------------------


def sweep(share: float = 1.0, swing: float = 0.2, aside: bool = False) -> list[StepRow]:
    """Sixty shapes, eight visits of three samples each, in turns; what a shape shows of the pace is ``share``
    of it. ``aside``: visits on a slow machine are set aside."""
    rng = np.random.default_rng(3)
    shapes = [random_shape(rng, 16) for _ in range(60)]
    pace, order = 0.0, 0
    reference_samples: list[StepRow] = []
    blocks: dict[int, list[tuple[int, tuple[float, ...], bool]]] = {}

    def fire(ms: float, slow: float) -> tuple[float, ...]:
        return tuple(float(v) for v in ms * np.exp(slow + 0.02 * rng.standard_normal(3)))

    for _ in range(8):
        for number in rng.permutation(len(shapes)).tolist():
            reference_samples.append(StepRow("s", "sentinel", SHAPE, fire(true_ms(SHAPE), pace), order=order))
            slow = share * pace
            block = (order + 1, fire(true_ms(shapes[number]), slow), aside and pace > 0.1)
            blocks.setdefault(number, []).append(block)
            order += 2
            pace = 0.8 * pace + 0.6 * swing * rng.standard_normal()
    rows = []
    for number, made in blocks.items():
        kept, off = [v for v in made if not v[2]], [v for v in made if v[2]]
        if not kept:
            kept, off = off, []
        rows.append(
            StepRow(
                f"v{number}",
                "verify",
                shapes[number],
                tuple(ms for _, samples, _ in kept for ms in samples),
                order=made[0][0],
                blocks=tuple((at, len(samples)) for at, samples, _ in kept),
                set_aside_ms=tuple(ms for _, samples, _ in off for ms in samples),
                set_aside_blocks=tuple((at, len(samples)) for at, samples, _ in off),
            )
        )
    return [*reference_samples, *rows]


def errors(data: Observations) -> np.ndarray:
    """Log error of each shape's median but the sentinel's, whose own samples are many."""
    truth = np.array([true_ms(shape) for shape in data.shapes])
    away = np.log(data.median_ms / truth)[np.array(data.groups) != SHAPE.key()]
    return np.asarray(away - np.median(away))


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_sensitivity_to_the_sentinel_is_learned_and_removed(share: float) -> None:
    rows = sweep(share)
    speed = MachineSpeed.of(rows)
    assert speed is not None
    assert (speed.learned, speed.dense) == (True, True)
    assert speed.sensitivity == pytest.approx(share, abs=0.12)
    data = Observations.of(rows)
    blind = Observations.of([row for row in rows if row.kind != "sentinel"])
    assert np.abs(errors(data)).mean() < 0.4 * np.abs(errors(blind)).mean()
    # A bound is learned from times as they were measured.
    raw = {row.shape.key(): sorted(row.samples_ms) for row in rows if row.kind != "sentinel"}
    for key, samples in zip(data.groups, data.samples, strict=True):
        if key in raw and key != SHAPE.key():
            assert sorted(samples) == raw[key]


def test_shapes_that_do_not_follow_the_sentinel_are_left_as_they_are() -> None:
    """Negative control: a sentinel that moves alone moves nothing else."""
    data, speed = Observations.of(sweep(share=0.0)), MachineSpeed.of(sweep(share=0.0))
    assert speed is not None
    assert abs(speed.sensitivity) < 0.03
    assert np.abs(errors(data)).mean() < 0.01


def test_what_was_set_aside_counts_once_its_pace_is_known() -> None:
    whole, parted = Observations.of(sweep()), Observations.of(sweep(aside=True))
    assert np.allclose(np.sort(whole.median_ms), np.sort(parted.median_ms), rtol=1e-6)
    by_key = dict(zip(parted.groups, parted.samples, strict=True))
    for key, samples in zip(whole.groups, whole.samples, strict=True):
        assert len(by_key[key]) == len(samples)
    row = next(r for r in sweep(aside=True) if r.set_aside_ms)
    assert sum(len(s) for _, s in blocks_of(row)) == len(row.samples_ms) + len(row.set_aside_ms)
    # Of an older profile nobody knows when they were taken.
    older = dataclasses.replace(row, set_aside_blocks=())
    assert sum(len(s) for _, s in blocks_of(older)) == len(row.samples_ms)


def test_looks_of_two_sweeps_or_of_two_shapes_tell_no_pace() -> None:
    rows = sweep()
    assert MachineSpeed.of([*rows, *rows]) is None
    other = [
        dataclasses.replace(row, shape=BatchShape.uniform(1, 1, 8)) if number % 2 else row
        for number, row in enumerate(rows)
    ]
    assert MachineSpeed.of(other) is None


def test_repeat_noise_is_what_another_sweep_of_the_shape_would_show() -> None:
    """Spread between visits counts, which samples of one visit cannot show; and halves of the visits of a row
    differ as two rows would."""
    data = Observations.of(sweep(swing=0.0))
    blind = Observations.of([r for r in sweep(swing=0.2) if r.kind != "sentinel"])
    calm, wild = np.median(data.repeat_noise()), np.median(blind.repeat_noise())
    assert wild > 4 * calm
    seen = float(np.abs(errors(blind)).mean()) * np.sqrt(np.pi / 2)
    assert wild == pytest.approx(seen, rel=0.35)
    again = repeat_error(blind)
    assert again is not None
    # Two rows differ by √2 of what one is off; the mean of a normal is √(2 / π) of its deviation.
    assert again["mape"] / 100 == pytest.approx(float(wild) * np.sqrt(2) * 0.8, rel=0.35)
    single = [dataclasses.replace(r, blocks=()) for r in sweep() if r.kind != "sentinel"]
    assert repeat_error(Observations.of(single)) is None


def test_no_bound_lies_below_the_floor_and_knowing_the_pace_lowers_it() -> None:
    data = Observations.of(sweep())
    floor, speed_corrected = noise_floor(data, (0.9, 0.95)), noise_floor(data, (0.9, 0.95), True)
    assert 1 < speed_corrected[0.95] < 1.12 < 1.25 < floor[0.95]
    assert floor[0.9] < floor[0.95]
