"""Several drafts of one machine, and objectives: what is chosen is the best of what is there."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wispprof.artifacts.plan import load_plan, machine_of, save_plan
from wispprof.errors import PlanError
from wispprof.planning import Runs, make_plan
from wispprof.planning.explain import explain
from wispprof.planning.objective import Figures, choose, draft_front, pareto_front
from wispprof.policies.linear_cost import LinearCost
from wispprof.settings.planner_settings import PlanSettings, device_price, weights_of
from wispprof.simulation.devices import DeviceProfile

COST = LinearCost(18.0, row_ms=0.25, kv_ms=0.00006)
BIG, SMALL = (
    DeviceProfile.from_speed("laptop:3b-q4", 40.0, draft_w=30.0),
    DeviceProfile.from_speed("laptop:1b-q4", 110.0, draft_w=12.0),
)
PI = DeviceProfile.from_speed("pi", 9.0, draft_w=8.0)
SETTINGS = PlanSettings(
    rtts_ms=(20.0, 80.0),
    slos=(8.0, 24.0),
    max_sessions=200,
    k_max=6,
    server_price=5.05,
    edge_prices=(("", 0.35), ("pi", 0.01)),
)
figures = st.builds(
    Figures, st.floats(0.1, 100), st.floats(0.01, 50), st.one_of(st.just(0.0), st.floats(0.01, 9))
)


@pytest.fixture(scope="module")
def plans():
    return {
        name: make_plan(COST, [BIG, SMALL, PI], Runs.geometric(0.75), replace(SETTINGS, objective=name))
        for name in ("goodput", "cost", "energy", "goodput=0.5,cost=0.3,energy=0.2")
    }


# --- what a choice is worth ---


def test_objectives_are_weights() -> None:
    assert weights_of("cost") == {"cost": 1.0}
    assert weights_of("goodput=3, energy=1") == {"goodput": 0.75, "energy": 0.25}
    assert weights_of("goodput=1,cost=0") == {"goodput": 1.0}


@pytest.mark.parametrize(
    "text",
    [
        *("", "speed", "goodput=x", "goodput=0", "goodput=inf", "goodput=nan"),
        *("goodput=-1,cost=2", "goodput,cost", "cost=1,cost=2"),
    ],
)
def test_what_is_no_objective_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="objective"):
        weights_of(text)


@given(st.lists(figures, min_size=1, max_size=12))
def test_the_front_is_what_nothing_beats(many: list[Figures]) -> None:
    front_of = pareto_front(many)
    assert front_of
    keyed = [(f.tokens_per_s, -f.dollars_per_mtoken, -f.energy_j_per_token) for f in many]
    for place, one in enumerate(keyed):
        beaten = any(other != one and all(a >= b for a, b in zip(other, one, strict=True)) for other in keyed)
        assert beaten == (one not in [keyed[p] for p in front_of]), place
    speeds = [many[p].tokens_per_s for p in front_of]
    assert speeds == sorted(speeds, reverse=True)


@given(
    st.lists(figures, min_size=1, max_size=12),
    st.sampled_from(["goodput", "cost", "goodput=1,cost=1", "goodput=2,cost=1,energy=1"]),
)
def test_the_best_lies_on_the_front_or_equals_it(many: list[Figures], objective: str) -> None:
    best = many[choose(many, range(len(many)), weights_of(objective))]
    assert not any(
        rival.tokens_per_s > best.tokens_per_s
        and rival.dollars_per_mtoken < best.dollars_per_mtoken
        and rival.energy_j_per_token < best.energy_j_per_token
        for rival in many
    )


def test_not_drafting_is_left_only_for_a_gain() -> None:
    near = [Figures(10.0, 1.0, 0.0), Figures(10.1, 1.0, 1.0)]
    assert choose(near, (0, 1), weights_of("goodput")) == 1
    assert choose(near, (0, 1), weights_of("goodput"), undrafted=0, min_gain=1.02) == 0


# --- in a plan ---


def test_each_objective_is_best_by_its_own_figure(plans) -> None:
    for place, row in enumerate(plans["goodput"].draft):
        cheap, frugal = plans["cost"].draft[place], plans["energy"].draft[place]
        assert cheap.cell == frugal.cell == row.cell
        keeping = [k for k, slow in enumerate(row.slow_by_k) if slow >= row.tokens_per_s]
        if not keeping:
            assert cheap.k == frugal.k == row.k
            continue
        assert cheap.k in keeping
        assert cheap.dollars_per_mtoken <= min(row.dollars_by_k[k] for k in keeping) * 1.02
        assert frugal.energy_j_per_token <= row.energy_j_per_token + 1e-12
        assert row.dollars_per_mtoken == row.dollars_by_k[row.k]


def test_dollars_are_server_and_edge_time(plans) -> None:
    """By hand, undrafted: 5.05 dollars buy an hour of steps, each of which commits one token a session."""
    row = next(r for r in plans["cost"].draft if r.load_level == 0)
    step_h = (18.0 + 0.25 + 512 * 0.00006) / 3.6e6
    assert row.dollars_by_k[0] == pytest.approx(5.05 * step_h * 1e6, rel=1e-6)
    assert row.dollars_by_k[0] == pytest.approx(25.6, rel=0.01)
    free = make_plan(COST, [PI], Runs.geometric(0.75), replace(SETTINGS, edge_prices=()))
    billed = [r for r in plans["goodput"].draft if r.device == "pi"]
    for dear, cheap in zip(billed, free.draft, strict=True):
        assert dear.dollars_by_k[0] == cheap.dollars_by_k[0]
        assert all(a > b for a, b in zip(dear.dollars_by_k[1:], cheap.dollars_by_k[1:], strict=True))


def test_a_machine_chooses_among_its_drafts_and_the_front_holds_the_choice(plans) -> None:
    for objective, plan in plans.items():
        assert {c.machine for c in plan.choices} == {"laptop"}
        assert len(plan.choices) == len([r for r in plan.draft if r.device == "laptop:3b-q4"])
        for choice in plan.choices:
            row = plan.find(f"{choice.machine}/{choice.cell.split('/', 1)[1]}")
            assert row.device == choice.device
            assert row.k == choice.k
            rivals = [
                r
                for r in plan.draft
                if machine_of(r.device) == "laptop" and r.cell.split("/")[1:] == row.cell.split("/")[1:]
            ]
            assert len(rivals) == 2
            kept = [r for r in rivals if r.feasible]
            assert choice.feasible == bool(kept)
            if objective == "cost" and kept:
                assert choice.dollars_per_mtoken == min(r.dollars_per_mtoken for r in kept)
            if objective == "goodput" and kept:
                assert choice.expected_tokens_per_s == max(r.expected_tokens_per_s for r in kept)
            options, best = draft_front(
                plan, "laptop", row.rtt_ms, row.load_level, row.tokens_per_s, row.mode
            )
            assert len(options) == 2 * (SETTINGS.k_max + 1)
            fastest = max(o.figures.tokens_per_s for o in options)
            assert options[best[0]].figures.tokens_per_s == fastest


def test_the_draft_depends_on_the_objective(plans) -> None:
    """Negative control: were the objective ignored, all plans would be alike."""
    chosen = {name: [(c.device, c.k) for c in plan.choices] for name, plan in plans.items()}
    assert chosen["goodput"] != chosen["energy"]
    assert chosen["goodput"] != chosen["cost"]


def test_power_that_is_not_known_is_not_taken_for_none() -> None:
    deaf = replace(BIG, draft_w=0.0)
    plan = make_plan(COST, [deaf, SMALL, PI], Runs.geometric(0.8), SETTINGS)
    options, _ = draft_front(plan, "laptop", 20.0, 0, 8.0, "stream")
    assert {o.figures.energy_j_per_token for o in options} == {0.0}
    with pytest.raises(PlanError, match="energy cannot be an objective"):
        make_plan(COST, [deaf, PI], Runs.geometric(0.8), replace(SETTINGS, objective="energy"))


def test_prices_are_checked() -> None:
    with pytest.raises(PlanError, match="price of the server"):
        PlanSettings(objective="cost")
    with pytest.raises(PlanError, match="negative"):
        PlanSettings(server_price=1.0, edge_prices=(("", -1.0),))
    with pytest.raises(PlanError, match="no device"):
        make_plan(COST, [PI], Runs.geometric(0.7), replace(SETTINGS, edge_prices=(("tv", 1.0),)))
    assert device_price("0.35") == ("", 0.35)
    assert device_price("laptop:1b-q4=0.35") == ("laptop:1b-q4", 0.35)
    with pytest.raises(PlanError, match="not a price"):
        device_price("laptop=cheap")
    assert SETTINGS.edge_price("pi") == 0.01
    assert SETTINGS.edge_price("laptop:1b-q4") == 0.35
    assert replace(SETTINGS, edge_prices=(("laptop", 2.0),)).edge_price("laptop:1b-q4") == 2.0


def test_choices_are_kept_and_explained(plans, tmp_path) -> None:
    plan = plans["cost"]
    save_plan(plan, tmp_path / "plan.json")
    again = load_plan(tmp_path / "plan.json")
    assert again.choices == plan.choices
    text = "\n".join(explain(again, "laptop/20/0/8"))
    assert "Best draft model of laptop by cost" in text
    assert "Pareto front" in text
    assert "$" in text
    # A machine's own name finds the most careful of its rows, not of the whole plan's.
    assert machine_of(plan.draft_row("laptop", 20.0, 0, 8.0).device) == "laptop"
    assert machine_of(plan.draft_row("laptop:7b", 20.0, 0, 8.0).device) == "laptop"
