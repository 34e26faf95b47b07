"""The sweep engine under an injected clock: repeats, drift, resume, budget, expectation, physics."""

from __future__ import annotations

import contextlib
import random
import statistics
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wispprof.artifacts import RowJournal, StepRow
from wispprof.errors import EngineError, PhysicsViolation
from wispprof.hardware import Reading
from wispprof.profiling.measurement_log import (
    MeasurementLog,
    half_width,
    median_interval,
    relative_spread,
    samples_needed,
)
from wispprof.profiling.physics_checks import check_physics
from wispprof.profiling.shape_grid import (
    GRIDS,
    DeviceCapacity,
    select_within_budget,
    server_workloads,
    shape_features,
)
from wispprof.profiling.sweep import Sweep
from wispprof.profiling.sweep_cost import choose_probes, fit_line, pilot
from wispprof.profiling.workload import Workload, format_duration
from wispprof.settings.profiler_settings import SweepSettings
from wispprof.types import BatchShape, ModelInfo

MODEL = ModelInfo("tiny", "float32", 1_000_000, kv_bytes_per_token=4096)
CAPACITY = DeviceCapacity(20_000, 16, 2048)


class FakeMachine:
    """A device whose time is counted, not spent: linear cost, given noise, optional hog and faults."""

    def __init__(
        self,
        noise=0.0,
        hog=(9e9, 9e9),
        refuse=(),
        die_at=None,
        blind=False,
        seed=0,
        block_noise=0.0,
    ):
        self.now, self.noise, self.hog, self.block_noise = 0.0, noise, hog, block_noise
        self.refuse, self.die_at, self.blind = refuse, die_at, blind
        self.random = random.Random(seed)
        self.runs, self.prepared, self.workload = 0, [], None

    def clock(self):
        return self.now

    def prepare(self, workload):
        if workload.key in self.refuse:
            raise EngineError("too large", "")
        self.prepared.append(workload.key)
        if self.die_at is not None and len(self.prepared) > self.die_at:
            raise KeyboardInterrupt
        self.now += 0.002 + 1e-6 * workload.subject.cached_tokens
        self.workload = workload
        self.layout = 1 + self.block_noise * self.random.gauss(0, 1)

    def step_ms(self, shape):
        if self.blind:
            return 5.0
        return 1.0 + 0.02 * shape.new_tokens + 0.004 * shape.cached_tokens

    def run_once(self):
        ms = self.step_ms(self.workload.subject) * (1 + self.noise * self.random.random())
        ms *= self.layout
        self.runs += 1
        if self.hog[0] < self.now < self.hog[1]:
            ms *= 1.6
        self.now += ms / 1000
        return ms

    def finish(self):
        self.workload = None

    def row(self, workload, samples, flags, order):
        return StepRow(workload.key, workload.kind, workload.subject, samples, flags, order=order)


def workloads(grid="quick"):
    return server_workloads(GRIDS[grid], CAPACITY)


MIDDLE = BatchShape.uniform(4, 5, 256)
SENTINEL = Workload("sentinel", "sentinel", MIDDLE, shape_features(MIDDLE))


def sweep(machine, chosen=None, journal=None, **how):
    sweep_settings = how.pop("settings", SweepSettings(sentinel_every=5))
    return Sweep(
        machine,
        workloads() if chosen is None else chosen,
        sweep_settings,
        sentinel=SENTINEL,
        journal=journal,
        clock=machine.clock,
        **how,
    )


# --- statistics -----------------------------------------------------------------------------------


@given(st.lists(st.floats(0.1, 1e6), max_size=60))
def test_the_interval_brackets_the_median(samples):
    low, high = median_interval(samples)
    if samples:
        assert low <= statistics.median(samples) <= high
    assert half_width(samples) >= 0
    assert (half_width(samples) < float("inf")) == (len(samples) >= 6)


def test_thousands_of_samples_give_an_interval_as_hundreds_do():
    samples = [float(i) for i in range(100_001)]
    low, high = median_interval(samples)
    assert low < 50_000 < high
    assert 300 < high - low < 640
    ranks = [median_interval([float(i) for i in range(n)])[0] for n in (999, 1000, 1001, 1002)]
    assert max(ranks) - min(ranks) <= 2


def test_the_interval_covers_as_it_says():
    """Coverage of the true median over many draws; a 75 % interval must cover less."""
    generator = random.Random(1)
    hits = {0.95: 0, 0.75: 0}
    for _ in range(2000):
        draw = [generator.expovariate(1.0) for _ in range(15)]
        for confidence in hits:
            low, high = median_interval(draw, confidence)
            hits[confidence] += low <= 0.693147 <= high
    assert hits[0.95] / 2000 >= 0.94
    assert hits[0.75] / 2000 < 0.90


# --- the sweep ------------------------------------------------------------------------------------


def test_every_workload_once_in_random_order_with_raw_samples():
    machine = FakeMachine(noise=0.01)
    result = sweep(machine).run()
    rows = [row for row in result.rows if row.kind != "sentinel"]
    assert sorted(row.key for row in rows) == sorted(workload.key for workload in workloads())
    assert [row.key for row in rows] != [workload.key for workload in workloads()]
    assert all(6 <= len(row.samples_ms) <= 30 for row in result.rows)
    orders = [row.order for row in result.rows]
    assert orders == sorted(set(orders))
    assert not any(row.flags for row in result.rows)
    again = sweep(FakeMachine(noise=0.01)).run()
    assert [row.key for row in again.rows] == [row.key for row in result.rows]


def test_samples_of_a_workload_are_spread_over_the_sweep():
    """No workload gets a second block before all have one, and each pass has another order."""
    machine = FakeMachine(noise=0.01)
    result = sweep(machine).run()
    measured = [key for key in machine.prepared if key != "sentinel"]
    keys = {workload.key for workload in workloads()}
    first, second = measured[: len(keys)], measured[len(keys) : 2 * len(keys)]
    assert set(first) == set(second) == keys
    assert first != second
    for row in result.rows:
        if row.kind != "sentinel":
            assert len(row.blocks) == measured.count(row.key) >= 2
            assert sum(count for _, count in row.blocks) == len(row.samples_ms)
            assert [order for order, _ in row.blocks] == sorted({order for order, _ in row.blocks})
            assert row.blocks[0][0] == row.order


def test_noise_asks_for_repeats_and_is_flagged_where_they_do_not_help():
    calm, wild = FakeMachine(noise=0.01), FakeMachine(noise=2.0)
    few, many = sweep(calm).run(), sweep(wild).run()
    count = lambda result: sum(len(row.samples_ms) for row in result.rows)  # noqa: E731
    assert count(many) > 2 * count(few)
    assert any("noisy" in row.flags for row in many.rows)


def test_slow_blocks_are_cut_short_but_not_below_three():
    machine = FakeMachine(noise=0.5)
    result = sweep(machine, settings=SweepSettings(max_workload_s=0.005)).run()
    assert {3} == {len(row.samples_ms) for row in result.rows if row.median_ms > 5}


def test_a_hog_in_the_middle_is_seen_by_the_sentinel():
    quiet = sweep(FakeMachine(noise=0.01)).run()
    assert not any("drift" in row.flags for row in quiet.rows)
    half = quiet.seconds / 2
    disturbed = sweep(FakeMachine(noise=0.01, hog=(half, 9e9)), budget_s=2 * quiet.seconds).run()
    marked = [row for row in disturbed.rows if row.kind != "sentinel" and "drift" in row.flags]
    assert len(marked) > len(workloads()) / 3
    # Rows without a flag contain samples of the quiet part only; set-aside samples are kept.
    for row in disturbed.rows:
        calm_ms = FakeMachine().step_ms(row.shape) * 1.011
        if "drift" not in row.flags:
            assert max(row.samples_ms) < calm_ms
    assert any(min(row.set_aside_ms) > FakeMachine().step_ms(row.shape) for row in marked)


def test_a_hog_that_goes_away_leaves_no_mark():
    """Workloads measured while it ran are measured again, and their disturbed samples are set aside."""
    whole = sweep(FakeMachine(noise=0.01)).run().seconds
    machine = FakeMachine(noise=0.01, hog=(0.4 * whole, 0.6 * whole))
    result = sweep(machine).run()
    rows = [row for row in result.rows if row.kind != "sentinel"]
    aside = [row for row in rows if row.set_aside_ms]
    assert len(aside) > 5
    assert not any("drift" in row.flags for row in rows)
    for row in rows:
        assert len(row.samples_ms) >= 6
        assert max(row.samples_ms) < FakeMachine().step_ms(row.shape) * 1.011


def test_throttling_is_flagged():
    class Hot:
        name = "hot"

        def read(self):
            return Reading(throttled=True)

    result = sweep(FakeMachine(), sensors=Hot()).run()
    assert all("throttled" in row.flags for row in result.rows)


def test_what_the_backend_refuses_is_named_and_the_rest_measured():
    victim = workloads()[3].key
    result = sweep(FakeMachine(refuse=(victim,))).run()
    assert result.refused == {victim: "too large"}
    assert victim not in {row.key for row in result.rows}


@given(st.integers(0, 60), st.integers(0, 40))
@settings(max_examples=12, deadline=None)
def test_killed_anywhere_and_resumed_every_key_is_there_once(tmp_path_factory, die_at, torn):
    """Also with the last line torn, as kill -9 in the middle of a write leaves it."""
    path = tmp_path_factory.mktemp("sweep") / "j.jsonl"
    machine = FakeMachine(die_at=die_at)
    with RowJournal(path, "server", {}) as journal, contextlib.suppress(KeyboardInterrupt):
        sweep(machine, journal=journal).run()
    finished = len(path.read_bytes().splitlines()) - 1
    if finished:
        path.write_bytes(path.read_bytes()[: -torn or None])
    second = FakeMachine()
    with RowJournal(path, "server", {}, resume=True) as journal:
        kept = Counter(row.key for row in journal.rows if row.kind != "sentinel")
        result = sweep(second, journal=journal).run()
    rows = [row for row in result.rows if row.kind != "sentinel"]
    assert sorted(row.key for row in rows) == sorted(workload.key for workload in workloads())
    for row in rows:  # no block lost, none measured twice
        assert len(row.blocks) == kept[row.key] + second.prepared.count(row.key) == 2
    orders = [row.order for row in result.rows]
    assert orders == sorted(set(orders))


@pytest.mark.parametrize("budget_s", [0.5, 3.0, 15.0])
def test_a_budget_is_never_exceeded(budget_s):
    machine = FakeMachine(noise=1.0)
    result = sweep(machine, cost=piloted(machine), budget_s=budget_s).run()
    assert result.seconds <= budget_s
    assert result.seconds > 0.7 * budget_s  # nor wasted
    assert (result.out_of_time > 0) == (budget_s < 10)


def test_progress_counts_to_the_end_with_an_eta():
    seen = []
    machine = FakeMachine(noise=0.01)
    sweep(machine, cost=piloted(machine), progress=lambda *update: seen.append(update)).run()
    assert [update[0] for update in seen] == list(range(2 * len(workloads()) + 1))
    assert all(done <= total for done, total, _ in seen)
    assert seen[0][1] == seen[-1][1] == seen[-1][0]
    assert all(update[2].startswith("ETA ") for update in seen[:-1])
    assert (format_duration(65), format_duration(7265)) == ("1:05", "2:01:05")


def test_drift_is_judged_anew_with_every_reference_measurement():
    """Two references that disagree put both in doubt; the third one decides."""

    def reference_sample(ms, order):
        return StepRow("s", "sentinel", MIDDLE, (ms,) * 6, order=order)

    def block(order):
        return StepRow(f"v{order}", "verify", MIDDLE, (1.0,) * 6, order=order)

    log = MeasurementLog(0.1, [reference_sample(1.0, 0), block(1), reference_sample(1.3, 2)])
    assert log.is_disturbed(1)
    for row in (block(3), reference_sample(1.0, 4), block(5), reference_sample(1.01, 6)):
        log.add(row)
    assert [log.is_disturbed(order) for order in (1, 3, 5)] == [True, True, False]
    flags = {row.order: row.flags for row in log.rows(6, 0.03)}
    assert flags == {0: (), 1: ("drift",), 2: ("drift",), 3: ("drift",), 4: (), 5: (), 6: ()}
    with pytest.raises(ValueError, match="comes after"):
        log.add(block(6))


def test_time_that_is_left_goes_to_spare_workloads():
    chosen = workloads()
    machine = FakeMachine(noise=0.02)
    cost = piloted(machine)
    alone = sweep(FakeMachine(noise=0.02), chosen[:4], cost=cost, budget_s=5.0).run()
    assert alone.seconds < 2.5
    result = sweep(machine, chosen[:4], cost=cost, budget_s=5.0, spare=chosen[4:]).run()
    measured = {row.key for row in result.rows} - {"sentinel"}
    assert len(measured) > 8
    assert {w.key for w in chosen[:4]} <= measured
    assert alone.seconds < result.seconds <= 5.0
    assert all(len(row.samples_ms) >= 6 for row in result.rows)


# --- expectation and budget -----------------------------------------------------------------------


def piloted(machine, chosen=None, settings=None):
    chosen = workloads() if chosen is None else chosen
    return pilot(machine, chosen, SENTINEL, settings or SweepSettings(), machine.clock)


@pytest.mark.parametrize("grid", ["quick", "standard"])
@pytest.mark.parametrize(
    "how", [{"noise": 0.05}, {"noise": 0.2}, {"noise": 1.5}, {"noise": 0.02, "block_noise": 0.1}]
)
def test_the_announced_time_is_right_within_thirty_percent(grid, how):
    """Quiet and noisy machines, and one whose blocks differ more than the samples of a block."""
    machine, chosen, rules = FakeMachine(**how), workloads(grid), SweepSettings()
    cost = piloted(machine, chosen, rules)
    result = sweep(machine, chosen, settings=rules, cost=cost).run()
    assert 0.7 < result.seconds / result.expected_s < 1.3


def test_a_pilot_alone_would_be_wrong_where_the_machine_slows_down():
    """Negative control: the time of a machine that halves its speed cannot be announced."""
    machine, chosen = FakeMachine(noise=0.01), workloads("standard")
    cost = piloted(machine, chosen)
    machine.hog = (machine.now, 9e9)
    machine.step_ms = lambda shape, own=machine.step_ms: 2 * own(shape)
    result = sweep(machine, chosen, settings=SweepSettings(), cost=cost).run()
    assert result.seconds / result.expected_s > 1.3


def test_spread_and_samples_needed_fit_together():
    """Samples of a known spread: its estimate, and as many of them as are said to be enough, are."""
    generator = random.Random(3)
    draw = lambda n: [1 + 0.04 * generator.gauss(0, 1) for _ in range(n)]  # noqa: E731
    estimates = [relative_spread(draw(8)) for _ in range(400)]
    assert statistics.fmean(estimates) == pytest.approx(0.04, rel=0.08)
    assert relative_spread([1.0]) == 0
    needed = samples_needed(0.04, 0.03, 6, 60)
    widths = {n: statistics.fmean(half_width(draw(n)) for _ in range(400)) for n in (6, needed)}
    assert widths[needed] == pytest.approx(0.03, rel=0.15)
    assert widths[6] > 0.04
    assert samples_needed(0.001, 0.03, 6, 60) == 6
    assert samples_needed(9.0, 0.03, 6, 60) == 60


def test__fit_line_recovers_a_line_and_never_goes_below_zero():
    import numpy as np

    work = np.array([[1, x, y] for x in (1, 5, 20) for y in (2, 9, 40)], dtype=float)
    assert fit_line(work, work @ [2, 0.5, 0]) == pytest.approx([2, 0.5, 0], abs=1e-3)
    assert (fit_line(work, 5 - 0.1 * work[:, 1]) >= 0).all()


def test_a_budget_takes_corners_first_and_stays_within():
    chosen = workloads("standard")
    some = select_within_budget(chosen, 20.0, [1.0] * len(chosen))
    assert len(some) == 20
    works = [sum(workload.work) for workload in chosen]
    assert min(works) in [sum(workload.work) for workload in some[:2]]
    assert max(works) in [sum(workload.work) for workload in some[:3]]
    assert [s.key for s in choose_probes(chosen, 5)] == [s.key for s in some[:5]]


# --- physics --------------------------------------------------------------------------------------


def test_an_honest_backend_passes():
    report = check_physics(sweep(FakeMachine(noise=0.1)).run().rows, MODEL)
    assert report.growth > 1.15
    assert report.order > 0.5
    assert report.memory > 1.05


def test_a_backend_that_ignores_its_batch_is_refused():
    rows = sweep(FakeMachine(noise=0.1, blind=True)).run().rows
    with pytest.raises(PhysicsViolation, match="ignore its batch"):
        check_physics(rows, MODEL)


def test_a_backend_that_ignores_its_cache_is_refused():
    class Forgetful(FakeMachine):
        def step_ms(self, shape):
            return 1.0 + 0.5 * shape.new_tokens

    rows = sweep(Forgetful()).run().rows
    with pytest.raises(PhysicsViolation, match="ignore its cache: do not trust"):
        check_physics([replace(row, flags=()) for row in rows], MODEL)
    with pytest.raises(PhysicsViolation, match="ignore its cache, or the machine was too busy"):
        check_physics([replace(row, flags=("noisy",)) for row in rows], MODEL)


def test_times_without_waiting_for_the_device_are_refused():
    big = ModelInfo("8b", "bfloat16", 8_000_000_000, kv_bytes_per_token=147_456)
    row = StepRow("k", "verify", BatchShape.uniform(4, 5, 64), (0.05, 0.06))
    with pytest.raises(PhysicsViolation, match="waiting for the device"):
        check_physics([row], big)
