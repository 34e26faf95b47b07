"""Replay: tokens and waste counted right, the clairvoyant on top, real controllers like their rules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from synthetic_traces import synthetic_trace

from wispprof.artifacts.rows import TracePath
from wispprof.errors import FitError
from wispprof.fitting import fit_predictor
from wispprof.fitting.controller_replay import (
    Fold,
    RoundCost,
    Walk,
    acceptance_tables,
    clairvoyant_lengths,
    compare_controllers,
    count_rounds,
    fixed_lengths,
    summarise,
    threshold_lengths,
    walk,
)
from wispprof.fitting.rejection_predictor import fit_scorer
from wispprof.fitting.rejection_scorers import split_prompts
from wispprof.policies.controllers import FixedController, WispController
from wispprof.policies.interface import Controller, RoundContext


def _path(accepted: list[int], depth: int) -> TracePath:
    length = len(accepted)
    zeros = np.zeros((length, depth, 4), dtype=np.float32)
    return TracePath((1,), tuple(range(length)), np.zeros((length, depth), int), zeros, np.array(accepted))


def test_rounds_are_counted_by_hand() -> None:
    path = _path([2, 0, 0, 4, 0, 0, 0, 0, 1, 0, 0, 0], 4)
    # Rounds start at 0 (2 of 3 accepted, the third rejected), at 3 (3 of 3) and at 7 (0 of 3).
    result = walk([path], fixed_lengths([path], 3))
    assert result == (3 + 4 + 1, 3, 9, 5, 0 + 0 + 2)
    cost = RoundCost(10.0, 20.0, server_ms=30.0, row_ms=1.0)
    assert result.total_ms(cost) == 9 * 10 + 3 * 50 + 12
    assert result.tokens_per_s(cost) == pytest.approx(8000 / 252)
    assert result.wasted_ms(cost) == 20 / 8
    with pytest.raises(FitError, match="long enough"):
        walk([_path([1, 1], 4)], fixed_lengths([path], 3))


def test_the_clairvoyant_wastes_nothing_and_nobody_beats_it() -> None:
    trace = synthetic_trace(16, 56)
    _, tune, test = split_prompts(trace.paths)
    predictors = {"margin-logistic": fit_predictor(trace, "margin-logistic")}
    records = compare_controllers([Fold(tune, test, predictors)])
    cells = {(r["device"], r["rtt_ms"]) for r in records}
    assert len(cells) == 9
    for cell in cells:
        rows = {r["controller"]: r for r in records if (r["device"], r["rtt_ms"]) == cell}
        assert rows["clairvoyant"]["wasted_ms"] == 0
        best = max(r["tokens_per_s"] for r in rows.values())
        assert rows["clairvoyant"]["tokens_per_s"] == pytest.approx(best)
        assert set(rows) == {
            "fixed",
            "clairvoyant",
            "threshold:margin-logistic",
            "gain:margin-logistic",
        }
    fast = {
        r["controller"]: r
        for r in records
        if r["device"] == "fast" and r["rtt_ms"] == 30 and r["aim"] != "frugal"
    }
    assert fast["threshold:margin-logistic"]["wasted_ms"] < fast["fixed"]["wasted_ms"]


def test_a_frugal_rule_is_chosen_by_its_tuning_prompts_alone() -> None:
    trace = synthetic_trace(16, 56)
    _, tune, test = split_prompts(trace.paths)
    predictors = {"margin-logistic": fit_predictor(trace, "margin-logistic")}
    records = compare_controllers([Fold(tune, test, predictors)])
    other = compare_controllers([Fold(tune, tune, predictors)])
    frugal = {(r["device"], r["rtt_ms"], r["controller"]): r for r in records if r["aim"] == "frugal"}
    assert frugal
    for r in other:
        if r["aim"] != "frugal":
            continue
        tuned = frugal[r["device"], r["rtt_ms"], r["controller"]]
        assert tuned["value"] == r["value"]
        assert tuned["tuned_wasted_ms"] == r["wasted_ms"]
    for cell in summarise(records):
        if cell["frugal"] is not None:
            assert cell["frugal"]["tuned_wasted_ms"] <= cell["fastest"]["tuned_wasted_ms"]


def test_folds_are_scored_together() -> None:
    trace = synthetic_trace(16, 56)
    learn, one, two = split_prompts(trace.paths)
    predictors = {"margin-logistic": fit_scorer("margin-logistic", learn, one)}
    both = compare_controllers([Fold(one, two, predictors), Fold(two, one, predictors)])
    clairvoyant = next(r for r in both if r["controller"] == "clairvoyant")
    whole = walk([*two, *one], clairvoyant_lengths([*two, *one], int(clairvoyant["value"])))
    cost = RoundCost(clairvoyant["draft_ms"], clairvoyant["rtt_ms"])
    assert clairvoyant["tokens_per_s"] == pytest.approx(whole.tokens_per_s(cost))
    rule = next(r for r in both if r["controller"] == "gain:margin-logistic" and r["aim"] == "fast")
    parts = [
        next(r for r in compare_controllers([fold]) if _same(r, rule))
        for fold in (Fold(one, two, predictors), Fold(two, one, predictors))
    ]
    speeds = sorted(r["tokens_per_s"] for r in parts)
    assert speeds[0] <= rule["tokens_per_s"] <= speeds[1]


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(a[k] == b[k] for k in ("device", "rtt_ms", "controller", "aim"))


def replay_controller(paths: Sequence[TracePath], make: Callable[[], Controller], cost: RoundCost) -> Walk:
    """Play rounds under a real controller object, one per path, as an edge would drive it."""
    return count_rounds(_controlled_rounds(paths, make, cost))


def _controlled_rounds(
    paths: Sequence[TracePath], make: Callable[[], Controller], cost: RoundCost
) -> Iterator[tuple[int, int]]:
    context = RoundContext(cost.draft_ms, cost.rtt_ms, cost.server_ms)
    for path in paths:
        controller = make()
        position = 0
        while position < path.scored_rows():
            most = min(controller.begin(context), path.depth)
            length = 0
            while length < most:
                length += 1
                if not controller.go_on(length - 1, path.features_at(position, length - 1)):
                    break
            good = min(length, int(path.accepted[position]))
            controller.finish(length, good)
            yield length, good
            position += good + 1


def test_controllers_replay_like_their_rules() -> None:
    trace = synthetic_trace(12, 48)
    predictor = fit_predictor(trace, "threshold")
    cost = RoundCost(10.0, 30.0)
    paths = trace.paths
    assert replay_controller(paths, lambda: FixedController(3), cost) == walk(paths, fixed_lengths(paths, 3))
    rule = threshold_lengths(acceptance_tables(paths, predictor), 0.6)
    assert replay_controller(paths, lambda: WispController(predictor, 0.6, 8), cost) == walk(paths, rule)
    assert walk(paths, clairvoyant_lengths(paths, 8)).wasted == 0
