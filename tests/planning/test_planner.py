"""The planner: sanity properties, obedience of look-ups, the artifact, exports and words."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wispprof.artifacts.plan import load_plan, save_plan
from wispprof.errors import ArtifactDamaged, ArtifactTooOld, PlanError
from wispprof.planning import Runs, make_plan
from wispprof.planning.batch_table import capacity_row
from wispprof.planning.draft_table import EdgeCosts
from wispprof.planning.explain import compare, explain
from wispprof.planning.plan_export import export
from wispprof.planning.session_speed import (
    LoadedStepTimes,
    round_speed,
    stream_speed,
    undrafted_speed,
)
from wispprof.settings.planner_settings import PlanSettings
from wispprof.simulation.devices import DeviceProfile
from wispprof.types import BatchCost, StepTimeEstimator


@dataclass(frozen=True)
class Batch(BatchCost):
    step: Step
    rows: int = 0
    cached: int = 0

    @property
    def p50_ms(self) -> float:
        step = self.step
        return step.fixed + step.row * self.rows + step.kv * self.cached if self.rows else 0.0

    @property
    def bound_ms(self) -> float:
        return 1.1 * self.p50_ms

    def add(self, new: int, cached: int, prefill: bool = False) -> Batch:
        return Batch(self.step, self.rows + new, self.cached + cached)


@dataclass(frozen=True)
class Step(StepTimeEstimator):
    """``fixed + row·rows + kv·cached`` ms."""

    fixed: float = 20.0
    row: float = 0.2
    kv: float = 1e-4
    coverage: float = 0.95

    def start(self) -> Batch:
        return Batch(self)

    def slower(self, factor: float) -> Step:
        return Step(self.fixed * factor, self.row * factor, self.kv * factor)


class Tiles(Step):
    """20 ms for each tile of 64 rows."""

    def start(self) -> Batch:
        return TileBatch(self)


class TileBatch(Batch):
    @property
    def p50_ms(self) -> float:
        return 20.0 * math.ceil(self.rows / 64)

    def add(self, new: int, cached: int, prefill: bool = False) -> TileBatch:
        return TileBatch(self.step, self.rows + new)


SMALL = PlanSettings(rtts_ms=(5.0, 80.0), slos=(4.0, 12.0), k_max=6, contexts=(1000,), max_sessions=96)
LAPTOP = DeviceProfile.from_speed("laptop", 60.0, draft_w=20.0)
PI = DeviceProfile.from_speed("pi", 8.0, draft_w=6.0)


@pytest.fixture(scope="module")
def plan():
    return make_plan(Step(), [LAPTOP, PI], Runs.geometric(0.7), SMALL)


# --- renewal models -------------------------------------------------------------------------------


def test_stream_with_nothing_ever_accepted_goes_at_undrafted_step_pace():
    times = LoadedStepTimes(Step(row=0.0, kv=0.0), 0)
    pace = stream_speed(times, 4, 4, 1.0, 5.0, Runs.geometric(0.0))
    assert pace.tokens_per_ms == pytest.approx(undrafted_speed(times, 4).tokens_per_ms)


def test_stream_with_everything_accepted_is_bound_by_the_draft_or_by_k():
    times = LoadedStepTimes(Step(row=0.0, kv=0.0), 0)
    sure = Runs.geometric(1.0)
    assert stream_speed(times, 1, 3, 0.01, 0.0, sure).commits == pytest.approx(4.0, rel=0.1)
    # A draft as slow as two steps never gets ahead of a committed length that grows every step.
    assert stream_speed(times, 1, 3, 40.0, 0.0, sure).commits == pytest.approx(1.0, rel=0.05)


def test_round_counts_draft_link_and_step():
    times = LoadedStepTimes(Step(fixed=10.0, row=0.0, kv=0.0), 0)
    pace = round_speed(times, 1, 2, 5.0, 30.0, Runs.geometric(0.5))
    assert pace.round_ms == pytest.approx(2 * 5 + 30 + 10)
    assert pace.commits == pytest.approx(1 + 0.5 + 0.25)
    rested = round_speed(times, 1, 2, 5.0, 30.0, Runs.geometric(0.5), resume_ms=4.0)
    assert rested.round_ms == pytest.approx(pace.round_ms + 4)


def test_a_batch_that_varies_pays_for_the_edge_above_its_mean():
    times = LoadedStepTimes(Tiles(), 0)
    assert times.p50_ms(15, 4) == 20.0
    assert times.mean_ms(15, 4, 15) == 20.0
    assert 20.0 < times.mean_ms(15, 4, 60) < 30.0
    flat = LoadedStepTimes(Step(), 0)
    assert flat.mean_ms(15, 4, 60) == pytest.approx(flat.p50_ms(15, 4))


def test_a_draft_costs_what_the_step_saves_without_it():
    """Not the edge that lies behind the last draft."""
    times = LoadedStepTimes(Tiles(), 0)
    assert times.row_ms(16, 4) == 0.0
    assert times.row_ms(16, 5) == pytest.approx(20.0 / (16 * 4))
    assert LoadedStepTimes(Step(), 0).row_ms(16, 4.5) == pytest.approx(Step().row)
    assert LoadedStepTimes(Step(), 0).row_ms(3, 1.0) == pytest.approx(Step().row)


def test_a_plan_counts_what_a_rest_adds_in_round_mode_alone():
    slow = replace(LAPTOP, resume_ms=30.0)
    fast, other = (make_plan(Step(), [d], Runs.geometric(0.7), SMALL) for d in (LAPTOP, slow))
    for before, after in zip(fast.draft, other.draft, strict=True):
        if before.mode == "stream":
            assert after == before
        else:
            assert after.by_k[0] == before.by_k[0]
            assert all(a < b for a, b in zip(after.by_k[1:], before.by_k[1:], strict=True))
            assert all(a > b for a, b in zip(after.energy_by_k[1:], before.energy_by_k[1:], strict=True))
    for before, after in zip(fast.mixes, other.mixes, strict=True):
        assert after.split <= before.split


@settings(max_examples=40, deadline=None)
@given(
    acceptance=st.floats(0, 0.95),
    draft_ms=st.floats(1, 100),
    rtt=st.floats(0, 150),
    more=st.floats(1, 100),
    sessions=st.integers(1, 40),
    k=st.integers(1, 8),
)
def test_a_longer_link_and_a_slower_draft_never_speed_a_round_up(
    acceptance, draft_ms, rtt, more, sessions, k
):
    times = LoadedStepTimes(Step(), 500)
    runs = Runs.geometric(acceptance)
    now = round_speed(times, sessions, k, draft_ms, rtt, runs).tokens_per_ms
    assert round_speed(times, sessions, k, draft_ms, rtt + more, runs).tokens_per_ms <= now * 1.02
    assert round_speed(times, sessions, k, draft_ms + more, rtt, runs).tokens_per_ms <= now * 1.02


def test_runs_keep_their_shape_when_scaled():
    runs = Runs.of([0.8, 0.7, 0.65])
    assert runs.scaled(0.5).acceptance == pytest.approx(0.5, abs=1e-3)
    assert sum(runs.lengths()) == pytest.approx(1.0)
    with pytest.raises(PlanError, match="falling"):
        Runs.of([0.5, 0.6])


# --- sanity of whole plans ------------------------------------------------------------------------


def capacities(made) -> dict[tuple, tuple[int, int]]:
    return {(r.device, r.rtt_ms, r.tokens_per_s, r.mode): (r.server_only, r.split) for r in made.capacity}


def test_a_slower_server_never_raises_capacity(plan):
    slow = capacities(make_plan(Step().slower(1.5), [LAPTOP, PI], Runs.geometric(0.7), SMALL))
    for cell, (central, split) in capacities(plan).items():
        assert slow[cell][0] <= central
        assert slow[cell][1] <= split


def test_a_stricter_slo_never_raises_capacity(plan):
    for (device, rtt, speed, mode), (central, split) in capacities(plan).items():
        if speed == 4.0:
            strict = capacities(plan)[(device, rtt, 12.0, mode)]
            assert strict[0] <= central
            assert strict[1] <= split
            assert split >= central


def test_a_longer_round_trip_never_lengthens_what_it_can_keep(plan):
    for row in plan.draft:
        if row.rtt_ms == 5.0:
            far = plan.draft_row(row.device, 80.0, row.load_level, row.tokens_per_s, row.mode)
            assert far.expected_tokens_per_s <= row.expected_tokens_per_s * 1.001
            assert far.nearest_tokens_per_s <= row.nearest_tokens_per_s * 1.001


def test_a_longer_round_trip_that_shortens_a_draft_says_why(plan):
    shorter = [
        (row, far)
        for row in plan.draft
        if row.rtt_ms == 5.0
        and (far := plan.draft_row(row.device, 80.0, row.load_level, row.tokens_per_s, row.mode)).k < row.k
    ]
    assert shorter
    for row, far in shorter:
        text = "\n".join(explain(plan, far.cell))
        assert f"At 5 ms round trip k is {row.k}; here" in text
        if far.feasible and far.slow_by_k[row.k] >= far.tokens_per_s:
            assert far.by_k[row.k] < far.by_k[far.k] or far.by_k[row.k] < far.by_k[0] * 1.02
        assert "At 5 ms" not in "\n".join(explain(plan, row.cell))


@settings(max_examples=12, deadline=None)
@given(
    fixed=st.floats(5, 80),
    row=st.floats(0.01, 2),
    acceptance=st.floats(0, 0.95),
    speed=st.floats(2, 300),
    rtt=st.floats(0, 150),
    slower=st.floats(1.05, 3),
    slo=st.floats(2, 30),
    mode=st.sampled_from(["stream", "round"]),
)
def test_slower_servers_and_stricter_slos_never_raise_any_capacity(
    fixed, row, acceptance, speed, rtt, slower, slo, mode
):
    limits = PlanSettings(k_max=4, contexts=(500,), max_sessions=64)
    runs = Runs.geometric(acceptance)
    edge = EdgeCosts(DeviceProfile.from_speed("x", speed), rtt, mode, runs, runs)

    def fits(step: Step, tokens_per_s: float) -> tuple[int, int]:
        found = capacity_row(LoadedStepTimes(step, limits.context), edge, tokens_per_s, limits)
        return found.server_only, found.split

    server = Step(fixed, row)
    central, split = fits(server, slo)
    assert split >= central
    for harder in (fits(server.slower(slower), slo), fits(server, slo * slower)):
        assert harder[0] <= central
        assert harder[1] <= split


def test_do_not_speculate_where_drafting_cannot_pay():
    useless = make_plan(Step(), [LAPTOP], Runs.geometric(0.0), SMALL)
    assert {r.k for r in useless.draft} == {0}
    assert {r.verdict for r in useless.break_even} == {"server-only"}
    crawling = make_plan(Step(kv=0.0), [DeviceProfile.from_speed("clock", 0.1)], Runs.geometric(0.9), SMALL)
    assert {r.k for r in crawling.draft} == {0}


def test_speculate_where_rows_are_free_and_the_draft_is_fast():
    easy = make_plan(Step(row=1e-4), [DeviceProfile.from_speed("fast", 2000.0)], Runs.geometric(0.9), SMALL)
    assert min(r.k for r in easy.draft if r.rtt_ms == 5.0) >= 3


def test_every_k_is_weighed_and_the_best_feasible_taken(plan):
    for row in plan.draft:
        assert len(row.by_k) == SMALL.k_max + 1
        assert row.expected_tokens_per_s == pytest.approx(row.by_k[row.k])
        if row.feasible:
            assert row.slow_by_k[row.k] >= row.tokens_per_s
        else:
            assert max(row.slow_by_k) < row.tokens_per_s
            assert row.nearest_tokens_per_s == pytest.approx(max(row.slow_by_k))
            if row.k:
                assert row.slow_by_k[row.k] >= SMALL.min_gain * row.slow_by_k[0]


def test_energy_objective_never_takes_more_energy(plan):
    frugal = make_plan(Step(), [LAPTOP, PI], Runs.geometric(0.7), replace(SMALL, objective="energy"))
    for row in frugal.draft:
        usual = plan.find(row.cell)
        assert row.energy_j_per_token <= usual.energy_j_per_token + 1e-12
        assert row.expected_tokens_per_s >= usual.expected_tokens_per_s * 0.94


def test_batching_rows_meet_their_slo_if_it_can_be_met(plan):
    for row in plan.batch:
        batch = Step().start()
        for _ in range(row.max_items):
            batch = batch.add(1, SMALL.context)
        assert batch.bound_ms <= 1000.0 / row.tokens_per_s or row.max_items == 1
        assert 1 <= row.prefill_chunk <= SMALL.max_prefill_chunk
        assert row.max_items >= row.sessions
        assert row.token_budget >= row.max_items + row.prefill_chunk


# --- looking up, saving, showing ------------------------------------------------------------------


def test_look_ups_never_fail_on_range_and_err_on_the_safe_side(plan):
    assert plan.draft_row("laptop", 1e6, 99, 1e3).rtt_ms == 80.0
    assert plan.draft_row("laptop", 0.0, -1, 0.1).tokens_per_s == 4.0
    assert plan.draft_row("laptop", 5.0, 0, 5.0).tokens_per_s == 12.0
    assert plan.draft_row("unheard of", 5.0, 0, 4.0).device == "pi"
    assert plan.batch_row(99.0, 99).tokens_per_s == 12.0
    with pytest.raises(PlanError, match="mode"):
        plan.draft_row("laptop", 5.0, 0, 4.0, "tree")


def test_a_plan_survives_the_disk_and_notices_tampering(plan, tmp_path):
    file = tmp_path / "plan.json"
    digest = save_plan(plan, file)
    loaded = load_plan(file)
    assert loaded == replace(plan, hash=digest, settings=loaded.settings)
    document = json.loads(file.read_text())
    document["payload"]["draft"][0]["k"] = 99
    file.write_text(json.dumps(document))
    with pytest.raises(ArtifactDamaged, match="changed"):
        load_plan(file)
    file.write_text(json.dumps({**json.loads(file.read_text()), "schema": 1}))
    with pytest.raises(ArtifactTooOld, match=r"schema 1.*wispprof plan"):
        load_plan(file)


def test_explanations_hold_the_figures(plan):
    row = next(r for r in plan.draft if r.k > 0)
    text = "\n".join(explain(plan, row.cell))
    assert f"k = {row.k}" in text
    assert f"{row.expected_tokens_per_s:.3g}" in text
    none = next(r for r in plan.draft if r.k == 0)
    assert "Do not draft" in "\n".join(explain(plan, none.cell))
    with pytest.raises(PlanError, match="Cells look like"):
        explain(plan, "nowhere")


def test_differences_are_found(plan):
    assert compare(plan, plan) == []
    other = make_plan(Step(row=0.02), [LAPTOP], Runs.geometric(0.7), SMALL)
    fields = {c.field for c in compare(plan, other)}
    assert {"cell", "k", "expected_tokens_per_s"} <= fields


def test_exports_have_the_other_tools_form(plan):
    lines = export(plan, "csv").splitlines()
    assert len(lines) == 1 + len(plan.draft)
    config = json.loads(export(plan, "vllm", "laptop", 5.0))
    ranges = config["num_speculative_tokens_per_batch_size"]
    assert ranges[0][0] == 1
    assert all(b[0] == a[1] + 1 for a, b in itertools.pairwise(ranges))
    assert max(k for *_, k in ranges) <= config["num_speculative_tokens"]
    table = json.loads(export(plan, "sglang"))
    tokens, rates = table["sample_batch_tokens"], table["sample_steps_per_sec"]
    assert tokens == sorted(set(tokens))
    assert rates == sorted(rates, reverse=True)
    assert table["max_batch_tokens"] >= tokens[-1]
    with pytest.raises(PlanError, match="csv"):
        export(plan, "yaml")


def test_contradictory_inputs_are_refused():
    with pytest.raises(PlanError, match="at least one"):
        make_plan(Step(), [], Runs.geometric(0.5), SMALL)
    with pytest.raises(PlanError, match="Two devices"):
        make_plan(Step(), [LAPTOP, LAPTOP], Runs.geometric(0.5), SMALL)
    with pytest.raises(PlanError, match="no acceptance trace"):
        make_plan(Step(), [LAPTOP], {}, SMALL)
    with pytest.raises(PlanError, match="0 ms"):
        make_plan(Step(0.0, 0.0, 0.0), [LAPTOP], Runs.geometric(0.5), SMALL)
    with pytest.raises(PlanError, match="SLO"):
        PlanSettings(slos=())
