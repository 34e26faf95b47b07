"""The ``wispprof`` controller: obeys the plan, stops where drafting stops paying, rests, keeps its lead."""

from __future__ import annotations

from dataclasses import replace

import pytest
from depth_acceptance import DepthAcceptance

from wispprof.artifacts.plan import DraftRow, Plan
from wispprof.policies import RoundContext, make_controller
from wispprof.policies.interface import TreeShape, tree_shape
from wispprof.policies.stopping import PlannedRows
from wispprof.types import DraftFeatures, Slo

CONTEXT = RoundContext(draft_ms=10.0, rtt_ms=40.0, server_ms=30.0, slo=Slo(4.0))
FEATURES = DraftFeatures(0.9, 0.1, 3.0, 1.0)
ROW = DraftRow(
    device="d",
    rtt_ms=40.0,
    load_level=0,
    tokens_per_s=4.0,
    mode="stream",
    k=3,
    stop=0.3,
    draft_ahead=6,
    expected_tokens_per_s=20.0,
    slow_tokens_per_s=18.0,
    round_ms=100.0,
    step_ms=30.0,
    commits=2.0,
    draft_ms=10.0,
    server_tokens_per_ms=0.1,
    feasible=True,
    nearest_tokens_per_s=18.0,
)


def sure(probability: float) -> DepthAcceptance:
    return DepthAcceptance(tuple(probability ** (j + 1) for j in range(32)))


def drafted(controller, context: RoundContext = CONTEXT) -> int:
    most = controller.begin(context)
    for depth in range(most):
        if not controller.go_on(depth, FEATURES):
            return depth + 1
    return most


def settled(probability: float, context: RoundContext = CONTEXT) -> int:
    """Drafts of a round once the controller knows its acceptance."""
    controller = make_controller("wispprof", sure(probability), stream=False)
    count = 0
    for _ in range(60):
        count = drafted(controller, context)
        controller.finish(count, count)
    return count


@pytest.mark.parametrize("stream", [True, False])
def test_the_plans_zero_is_obeyed_and_its_row_followed(stream):
    none = make_controller("wispprof", sure(0.95), rows=lambda _: replace(ROW, k=0), stream=stream)
    assert none.begin(CONTEXT) == 0
    some = make_controller("wispprof", sure(0.95), rows=lambda _: ROW, stream=stream)
    assert 0 < some.begin(CONTEXT) <= (ROW.draft_ahead if stream else ROW.k)
    assert some.row == ROW


def test_rows_follow_the_load_level():
    light, heavy = ROW, replace(ROW, load_level=3, k=0)
    rows = PlannedRows(Plan(draft=(light, heavy), batch=()), "d")
    assert rows(CONTEXT).k == 3
    assert rows(CONTEXT._replace(load_level=3)).k == 0


def test_rounds_are_longer_for_better_drafts_and_longer_links():
    assert settled(0.9) > settled(0.5) >= 1
    far = CONTEXT._replace(rtt_ms=200.0)
    assert settled(0.8, far) >= settled(0.8)
    assert settled(0.02) <= 1


def test_a_slow_draft_is_not_worth_a_round():
    assert settled(0.6, CONTEXT._replace(draft_ms=2000.0)) == 0


def test_a_doubtful_token_ends_the_round():
    controller = make_controller("wispprof", DepthAcceptance((0.9, 0.8, 0.02, 0.01)), stream=False)
    assert drafted(controller) == 3
    assert controller.acceptance_prob() < 0.1


def test_a_stream_drafts_no_farther_than_a_reply_can_take():
    controller = make_controller("wispprof", sure(0.99))
    ahead = controller.begin(CONTEXT)
    assert ahead >= (CONTEXT.rtt_ms + CONTEXT.server_ms) / CONTEXT.draft_ms
    assert controller.begin(CONTEXT._replace(draft_ahead=ahead)) == 0
    assert make_controller("wispprof", sure(0.99)).begin(CONTEXT._replace(rtt_ms=1e5)) <= 32


def test_a_stream_pauses_behind_a_doubtful_lead_and_goes_on_after_a_commit():
    controller = make_controller("wispprof", DepthAcceptance((0.9, 0.01, 0.005)))
    count = drafted(controller)
    assert count == 2
    assert controller.begin(CONTEXT._replace(draft_ahead=count)) == 0
    assert controller.begin(CONTEXT) > 0


def test_a_stream_that_never_pays_rests_and_tries_again():
    controller = make_controller("wispprof", sure(0.9))
    begun = []
    for _ in range(60):
        begun.append(drafted(controller) > 0)
        controller.finish(0, 0)  # overtaken before they could be verified
    assert begun[0]
    assert 0 < sum(begun) < len(begun)
    resting = begun.index(False)
    assert any(begun[resting:])
    paying = make_controller("wispprof", sure(0.9))
    for _ in range(60):
        assert drafted(paying) > 0
        paying.finish(8, 3)


@pytest.mark.parametrize("stream", [True, False])
def test_trees_where_nodes_and_rows_are_cheap(stream):
    def shape(node_ms, context=CONTEXT, rows=None):
        controller = make_controller("wispprof", sure(0.7), stream=stream, node_ms=node_ms, rows=rows)
        return tree_shape(controller, context)

    assert shape(None) is None
    assert shape(10.0) is None
    assert shape(0.05).beams > 1
    # Under load, rows are dear; a plan knows what they cost.
    assert shape(0.05, CONTEXT._replace(load_level=3)) is None
    assert shape(0.05, rows=lambda context: ROW) is None
    planned = replace(ROW, nodes=32, depth=5, width=8, beams=4)
    assert shape(0.05, CONTEXT._replace(load_level=3), lambda context: planned) == TreeShape(32, 5, 8, 4)
    assert shape(None, rows=lambda context: planned) is None


def test_only_controllers_of_trees_name_a_shape():
    assert tree_shape(make_controller("specedge", nodes=16), CONTEXT) == TreeShape(16, 4, 16, 32)
    assert tree_shape(make_controller("fixed", k=3), CONTEXT) is None
