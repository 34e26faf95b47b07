"""Capacity for a mix of SLO classes: between those of its classes, falling with stricter SLOs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wispprof.artifacts.plan import load_plan, save_plan
from wispprof.errors import PlanError
from wispprof.planning import Runs, make_plan
from wispprof.planning.batch_table import mix_row
from wispprof.planning.draft_table import EdgeCosts
from wispprof.planning.explain import explain
from wispprof.planning.session_speed import LoadedStepTimes
from wispprof.policies.linear_cost import LinearCost
from wispprof.settings.planner_settings import PlanSettings, class_mix
from wispprof.simulation.devices import DeviceProfile

COST = LinearCost(18.0, row_ms=0.25, kv_ms=0.00006)
LAPTOP = DeviceProfile.from_speed("laptop", 60.0)
SETTINGS = PlanSettings(
    rtts_ms=(20.0,),
    slos=(12.0, 24.0),
    max_sessions=400,
    k_max=6,
    mixes=(((12.0, 3.0), (24.0, 1.0)), ((24.0, 1.0),)),
)
RUNS = Runs.geometric(0.75)


@pytest.fixture(scope="module")
def plan():
    return make_plan(COST, [LAPTOP], RUNS, SETTINGS)


def fits(mix, mode: str = "stream", cost: LinearCost = COST) -> int:
    times = LoadedStepTimes(cost, SETTINGS.context)
    return mix_row(times, EdgeCosts(LAPTOP, 20.0, mode, RUNS, RUNS), mix, SETTINGS).split


@pytest.mark.parametrize("mode", ["stream", "round"])
def test_a_mix_of_one_class_is_that_class(plan, mode: str) -> None:
    single = next(r for r in plan.mixes if r.mode == mode and len(r.slos) == 1)
    alone = next(r for r in plan.capacity if r.mode == mode and r.tokens_per_s == 24.0)
    assert single.split == pytest.approx(alone.split, abs=1)
    assert single.server_only == alone.server_only


def test_a_mix_lies_between_its_classes_and_only_the_fast_one_drafts(plan) -> None:
    mixed = next(r for r in plan.mixes if r.mode == "stream" and len(r.slos) == 2)
    slow, fast = (r.split for r in plan.capacity if r.mode == "stream")
    assert fast < mixed.split < slow
    assert mixed.shares == (0.75, 0.25)
    assert mixed.ks[0] == 0 < mixed.ks[1]
    # Server-only serving makes the same step for all: the strictest SLO decides.
    assert mixed.server_only < mixed.split


@settings(max_examples=15, deadline=None)
@given(st.floats(0.05, 0.9), st.floats(0.01, 0.09), st.sampled_from(["stream", "round"]))
def test_more_of_the_strict_class_never_raises_capacity(share: float, more: float, mode: str) -> None:
    def at(strict: float) -> int:
        return fits(((12.0, 1.0 - strict), (24.0, strict)), mode)

    assert at(share + more) <= at(share)


@pytest.mark.parametrize("mode", ["stream", "round"])
def test_stricter_slos_and_slower_servers_never_raise_capacity(mode: str) -> None:
    capacities = [fits(((12.0, 1.0), (speed, 1.0)), mode) for speed in (14.0, 20.0, 26.0, 60.0)]
    assert capacities == sorted(capacities, reverse=True)
    servers = [fits(((12.0, 1.0), (20.0, 1.0)), mode, replace(COST, fixed_ms=ms)) for ms in (9, 18, 36, 900)]
    assert servers == sorted(servers, reverse=True)
    assert servers[-1] == 0


def test_mixes_are_kept_and_explained(plan, tmp_path) -> None:
    save_plan(plan, tmp_path / "plan.json")
    again = load_plan(tmp_path / "plan.json")
    assert again.mixes == plan.mixes
    told = "\n".join(explain(again, "laptop/20/0/24"))
    assert "12 tok/s 75 %, 24 tok/s 25 %" in told
    assert str(next(r.split for r in plan.mixes if r.mode == "stream")) in told


def test_without_a_mix_all_classes_share_alike() -> None:
    assert replace(SETTINGS, mixes=()).mixes_or_equal == (((12.0, 1.0), (24.0, 1.0)),)
    assert replace(SETTINGS, mixes=(), slos=(4.0,)).mixes_or_equal == ()


@pytest.mark.parametrize("text", ["4", "4=x", "4=0.5;8=0.5", ""])
def test_what_is_no_mix_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="class mix"):
        class_mix(text)


def test_shares_are_above_zero() -> None:
    assert class_mix("4=0.7,8=0.3") == ((4.0, 0.7), (8.0, 0.3))
    with pytest.raises(PlanError, match="above 0"):
        replace(SETTINGS, mixes=(((4.0, 0.0),),))
