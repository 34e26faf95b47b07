"""A plan names draft trees where rows and nodes are cheap, and chains elsewhere."""

from __future__ import annotations

from dataclasses import replace

import pytest

from wispprof.artifacts.plan import DraftRow, load_plan, save_plan
from wispprof.planning.draft_table import EdgeCosts, draft_row, speed_curve
from wispprof.planning.explain import explain
from wispprof.planning.planner import make_plan
from wispprof.planning.session_speed import LoadedStepTimes, Runs
from wispprof.planning.tree_choice import with_tree
from wispprof.policies.linear_cost import LinearCost
from wispprof.policies.tree_shapes import rank_rates
from wispprof.settings.planner_settings import PlanSettings
from wispprof.simulation.devices import DeviceProfile

RATES = rank_rates(0.7)
GPU = DeviceProfile("gpu", draft_ms=4.0, node_ms=0.02)
CPU = DeviceProfile("cpu", draft_ms=4.0, node_ms=4.0)
FREE_ROWS, DEAR_ROWS = LinearCost(fixed_ms=20.0, row_ms=0.05), LinearCost(fixed_ms=2.0, row_ms=4.0)


def row_of(device: DeviceProfile, cost: LinearCost, mode: str, rates: tuple[float, ...] = RATES) -> DraftRow:
    times, settings = LoadedStepTimes(cost, 500), PlanSettings()
    runs = Runs.geometric(0.7)
    cell = speed_curve(times, 2, EdgeCosts(device, 10.0, mode, runs, runs), settings.k_max)
    return with_tree(draft_row(cell, device, 0, 4.0, settings), rates, device, cell, times)


@pytest.mark.parametrize("mode", ["round", "stream"])
def test_trees_only_where_rows_and_nodes_are_cheap(mode: str) -> None:
    assert row_of(GPU, FREE_ROWS, mode).beams > 1
    assert row_of(CPU, FREE_ROWS, mode).beams == 0
    assert row_of(GPU, DEAR_ROWS, mode).nodes == 0
    assert row_of(replace(GPU, node_ms=None), FREE_ROWS, mode).nodes == 0
    assert row_of(GPU, FREE_ROWS, mode, ()).nodes == 0


def test_a_plan_with_trees_is_saved_and_explained(tmp_path) -> None:
    """A plan without ranks has none."""
    settings = PlanSettings(rtts_ms=(10.0,), slos=(4.0,), k_max=4)
    plan = make_plan(FREE_ROWS, [GPU], Runs.geometric(0.7), settings)
    assert not any(row.nodes for row in plan.draft)
    row = replace(next(r for r in plan.draft if r.k), nodes=64, depth=8, width=16, beams=32)
    plan = replace(plan, draft=(row,))
    save_plan(plan, tmp_path / "plan.json")
    back = load_plan(tmp_path / "plan.json")
    assert back.draft == (row,)
    assert any("A tree is faster" in line for line in explain(back, row.cell))
