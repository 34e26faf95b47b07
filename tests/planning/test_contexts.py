"""Context as an axis of a plan: planned, looked up by the session's own length, exported."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest

from wispprof.artifacts.plan import load_plan, save_plan
from wispprof.planning import Runs, make_plan
from wispprof.planning.explain import explain
from wispprof.planning.plan_export import export
from wispprof.policies.interface import RoundContext
from wispprof.policies.linear_cost import LinearCost
from wispprof.policies.stopping import PlannedRows
from wispprof.reporting.plan_section import context_map
from wispprof.settings.planner_settings import PlanSettings
from wispprof.simulation.devices import DeviceProfile
from wispprof.types import Slo

SERVER = LinearCost(8.0, row_ms=0.2, kv_ms=5e-5)
LAPTOP = DeviceProfile.from_speed("laptop", 60.0)
MANY = PlanSettings(rtts_ms=(20.0,), slos=(4.0,), k_max=6, max_sessions=64, contexts=(500, 4000, 32000))


@pytest.fixture(scope="module")
def plan():
    return make_plan(SERVER, [LAPTOP], Runs.geometric(0.75), MANY)


def test_every_context_has_the_tables_of_a_plan_of_its_own(plan) -> None:
    assert plan.contexts == (500, 4000, 32000)
    for context in plan.contexts:
        alone = make_plan(SERVER, [LAPTOP], Runs.geometric(0.75), replace(MANY, contexts=(context,)))
        part = plan.at_context(context)
        assert (part.draft, part.batch, part.capacity) == (alone.draft, alone.batch, alone.capacity)
        assert (part.break_even, part.mixes) == (alone.break_even, alone.mixes)


def test_long_contexts_draft_where_short_ones_do_not(plan) -> None:
    level = max(r.load_level for r in plan.draft if r.context == 32000)
    short, long = (plan.draft_row("laptop", 20.0, level, 4.0, "round", c) for c in (500, 32000))
    assert short.k < long.k
    assert "k by cached tokens" in "\n".join(explain(plan, long.cell))
    shown = context_map(plan, "laptop", "round")
    assert shown is not None
    assert list(shown.rows) == [500, 4000, 32000]


def test_edges_look_up_the_row_of_their_committed_length(plan) -> None:
    rows = PlannedRows(plan, "laptop", "round")
    seen = [
        rows(RoundContext(16.0, 20.0, 30.0, 2, 0, Slo(4.0), n)).context for n in (1, 1400, 1500, 11313, 11314)
    ]
    assert seen == [500, 500, 4000, 4000, 32000]
    assert plan.batch_row(4.0, 0, 10_000).context == 4000
    assert plan.batch_row(4.0, 0, 10**6).context == 32000
    assert plan.batch_row(4.0, 0).context == plan.context == 4000


def test_cells_name_their_context_and_are_found_without(plan, tmp_path) -> None:
    save_plan(plan, tmp_path / "plan.json")
    plan = load_plan(tmp_path / "plan.json")
    assert plan.find("laptop/20/0/4").cell == "laptop/20/0/4/stream/4000"
    assert plan.find("laptop/20/0/4/round").cell == "laptop/20/0/4/round/4000"
    assert plan.find("laptop/20/0/4/500").cell == "laptop/20/0/4/stream/500"


def test_exports_take_the_context_as_far_as_the_format_does(plan) -> None:
    key = "num_speculative_tokens_per_batch_size"
    both = json.loads(export(plan, "vllm-context", rtt_ms=20.0))[key]
    for context in plan.contexts:
        one = json.loads(export(plan, "vllm", rtt_ms=20.0, context=context))[key]
        assert [[a, b, k] for a, b, low, high, k in both if low <= context <= high] == one
    edges = sorted({(low, high) for _, _, low, high, _ in both})
    assert edges[0][0] == 0
    assert all(a[1] + 1 == b[0] for a, b in itertools.pairwise(edges))
    short, long = (
        json.loads(export(plan, "sglang", rtt_ms=20.0, context=c))["sample_steps_per_sec"]
        for c in (500, 32000)
    )
    assert short[0] > long[0]
