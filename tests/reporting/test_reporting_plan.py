"""The plan section of the report, and the figure of simulated capacities."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from wispprof.artifacts import read_document, write_document
from wispprof.artifacts.plan import Plan, save_plan
from wispprof.errors import ArtifactDamaged
from wispprof.planning import Runs, make_plan
from wispprof.policies.linear_cost import LinearCost
from wispprof.reporting import CAPACITY_KIND, load_run, render_report
from wispprof.reporting.plan_section import (
    HeatMap,
    break_even_map,
    capacity_curves,
    draft_length_map,
    drafts_front,
)
from wispprof.reporting.report import page_macros
from wispprof.settings.planner_settings import PlanSettings
from wispprof.simulation.devices import DeviceProfile

DEVICES = (
    DeviceProfile.from_speed("laptop:3b", 40.0, draft_w=30.0),
    DeviceProfile.from_speed("laptop:1b", 110.0, draft_w=12.0),
)
SETTINGS = PlanSettings(rtts_ms=(5.0, 80.0), slos=(8.0, 24.0), max_sessions=100, k_max=5)
CURVES = {
    "violations": 0.05,
    "load": "A load <in words>.",
    "systems": [
        {"system": "wispprof", "devices": 24, "probes": [[16, 1.0], [24, 0.96], [32, 0.5]]},
        {"system": "wisp", "devices": 12, "probes": [[8, 1.0], [12, 0.97], [16, None]]},
    ],
}


def planned(**changes: object) -> Plan:
    cost = LinearCost(18.0, row_ms=0.25, kv_ms=0.00006)
    return make_plan(cost, DEVICES, Runs.geometric(0.75), replace(SETTINGS, **changes))  # type: ignore[arg-type]


def test_the_break_even_map_states_the_least_acceptance_that_pays() -> None:
    plan = planned()
    shown = html(break_even_map(plan, "laptop:1b", "round"))
    rows = [r for r in plan.break_even if (r.device, r.mode) == ("laptop:1b", "round")]
    assert shown.count('<td class="k') == len(rows)
    for row in rows:
        assert f"× {row.gain:.2f}" in shown
        assert ("never pays" if row.needed is None else f"pays from {row.needed:.2f}") in shown
    assert shown.count("k no") == sum(r.verdict != "split" for r in rows) > 0
    assert break_even_map(plan, "nobody", "round") is None
    assert draft_length_map(plan, "nobody", "round", 8.0) is None


@pytest.mark.parametrize("speed", [8.0, 24.0, 40.0])
@pytest.mark.parametrize("mode", ["stream", "round"])
def test_hatching_means_on_both_maps_that_drafting_does_not_pay(mode: str, speed: float) -> None:
    """An SLO that no draft length meets is not hatched, and neither is one that drafts would miss."""
    plan = planned(slos=(8.0, 24.0, 40.0))
    rows = [r for r in plan.draft if (r.device, r.mode) == ("laptop:1b", mode)]
    rows = [r for r in rows if r.tokens_per_s == speed]
    seen = cells(draft_length_map(plan, "laptop:1b", mode, speed))
    pays = ["no" not in cell for cell in cells(break_even_map(plan, "laptop:1b", mode))]
    assert len(seen) == len(pays) == len(rows)
    for row, shown, gains in zip(rows, seen, pays, strict=True):
        assert ("no" in shown) == (not row.k and not gains)
        assert ("short" in shown) == (not row.feasible)
    # The plan has cells that miss the SLO, both with and without a gain from drafting.
    if speed == 40.0:
        short = [("short" in shown, "no" in shown) for shown in seen]
        assert (True, mode == "round") in short


def test_an_slo_that_forbids_drafts_that_pay_is_not_hatched() -> None:
    plan = planned()
    index = next(i for i, r in enumerate(plan.draft) if r.device == "laptop:1b" and r.k)
    row = replace(plan.draft[index], k=0)
    forbidden = replace(plan, draft=(*plan.draft[:index], row, *plan.draft[index + 1 :]))
    shown = (cells(draft_length_map(p, row.device, row.mode, row.tokens_per_s)) for p in (plan, forbidden))
    assert [c.count("no") for c in next(shown)] == [c.count("no") for c in next(shown)]


def html(heat_map: HeatMap | None) -> str:
    assert heat_map is not None
    return str(page_macros().heat_map(heat_map))


def cells(heat_map: HeatMap | None) -> list[list[str]]:
    """Classes of the cells of a map, row by row."""
    return [found.split() for found in re.findall(r'<td class="([^"]*)"', html(heat_map))]


def test_the_front_shows_price_or_energy() -> None:
    no_power = [replace(device, draft_w=0.0) for device in DEVICES]
    cost = LinearCost(18.0, row_ms=0.25)
    assert drafts_front(make_plan(cost, no_power, Runs.geometric(0.75), SETTINGS), 8.0) == ""
    energy, both = drafts_front(planned(), 8.0), drafts_front(planned(server_price=5.0), 8.0)
    assert "joules of drafting per token" in energy
    assert energy.count("joules") >= 3  # one axis a panel
    assert "joules" in both
    billed = drafts_front(planned(server_price=5.0, objective="cost"), 8.0)
    assert "dollars per million tokens" in billed
    for figure in (energy, billed):
        assert "1b" in figure
        assert "Pareto front" in figure
        assert "planned for its draft" in figure


def test_capacity_curves_and_a_damaged_document(tmp_path: Path) -> None:
    write_document(tmp_path / "capacity.json", CAPACITY_KIND, CURVES)
    figure = capacity_curves(read_document(tmp_path / "capacity.json", CAPACITY_KIND))
    assert "wispprof: 24" in figure
    assert "wisp: 12" in figure
    assert "target 95 %" in figure
    write_document(tmp_path / "capacity.json", CAPACITY_KIND, {"violations": 0.05})
    with pytest.raises(ArtifactDamaged, match="systems"):
        capacity_curves(read_document(tmp_path / "capacity.json", CAPACITY_KIND))


def test_a_page_holds_every_plan_section_once(tmp_path: Path) -> None:
    save_plan(planned(), tmp_path / "plan.json")
    write_document(tmp_path / "capacity.json", CAPACITY_KIND, CURVES)
    page = render_report(load_run(tmp_path))
    assert "Where speculation pays" in page
    assert "What speed is paid with" in page
    assert "How many devices one server carries" in page
    assert "A load &lt;in words&gt;." in page
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_every_device_has_its_maps(tmp_path: Path) -> None:
    """The first device is open, others are folded. A single device is not folded."""
    save_plan(planned(), tmp_path / "plan.json")
    page = render_report(load_run(tmp_path))
    for device in ("laptop:1b", "laptop:3b"):
        for caption in ("SLO of", "measured acceptance"):
            assert len(re.findall(rf"<caption>{device}, stream mode, {caption}", page)) == 1
        assert page.count(f"<summary>{device}</summary>") == 3  # lengths, break-even, capacity
    assert page.count("<details open>") == 3
    alone = make_plan(LinearCost(18.0), DEVICES[:1], Runs.geometric(0.75), SETTINGS)
    save_plan(alone, tmp_path / "plan.json")
    assert "<details open" not in render_report(load_run(tmp_path))
