"""Estimators: all methods agree, predictions never fall, bounds cover, and saved files predict the same."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_steps import random_shape, synthetic_rows, true_ms

from wispprof.artifacts.document import read_document, write_document
from wispprof.errors import ArtifactDamaged, ArtifactMissing, FitError
from wispprof.fitting import ESTIMATOR_KINDS, FittedEstimator, fit_estimator, load_estimator
from wispprof.fitting.batch_totals import (
    EMPTY,
    ArrayTotals,
    decode_totals_of,
    extend,
    extend_many,
    select,
    totals_of,
    upper_corner,
)
from wispprof.fitting.drift import recalibrate
from wispprof.fitting.evaluation import coverage_of, evaluate, fit_on, folds_of, groups_of
from wispprof.fitting.observations import Observations
from wispprof.fitting.physical_terms import PhysicalTerms, graph_buckets
from wispprof.fitting.wispprof_model import WispprofStepTime
from wispprof.types import BatchShape, BatchTotals, VerifyItem

MONOTONE = tuple(k for k in ESTIMATOR_KINDS if k != "forest")


@pytest.fixture(scope="module")
def data() -> Observations:
    return Observations.of(synthetic_rows(140))


@pytest.fixture(scope="module")
def fitted(data: Observations) -> dict[str, FittedEstimator]:
    return {kind: fit_on(kind, data) for kind in ESTIMATOR_KINDS}


items = st.builds(VerifyItem, st.integers(1, 300), st.integers(0, 20000), st.booleans() | st.just(False))


# --- features -------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.lists(items, min_size=1, max_size=30))
def test_totals_are_those_of_the_shape(batch: list[VerifyItem]) -> None:
    shape, totals = BatchShape(tuple(batch)), totals_of(batch)
    assert totals.items == len(batch)
    assert totals.sum_new == shape.new_tokens
    assert totals.sum_cached == shape.cached_tokens
    assert totals.attention_pairs == shape.attention_pairs
    assert totals.max_cached == shape.max_cached
    assert totals.max_new == shape.max_new
    assert totals.prefill == shape.prefill_tokens


@settings(max_examples=40)
@given(st.lists(items, max_size=8), st.lists(items, min_size=1, max_size=8))
def test_extending_by_many_equals_extending_by_each(
    batch: list[VerifyItem], candidates: list[VerifyItem]
) -> None:
    totals = totals_of(batch)
    new, cached, prefill = zip(*candidates, strict=True)
    table = extend_many(totals, np.array(new), np.array(cached), np.array(prefill))
    assert list(zip(*table, strict=True)) == [extend(totals, *c) for c in candidates]


# --- all methods agree ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ESTIMATOR_KINDS)
def test_whole_incremental_and_vectorised_predictions_agree(
    kind: str, fitted: dict[str, FittedEstimator]
) -> None:
    estimator = fitted[kind]
    rng = np.random.default_rng(3)
    shapes = [random_shape(rng, 60) for _ in range(25)]
    totals = BatchTotals.stack([totals_of(s.items) for s in shapes])
    decode = BatchTotals.stack([decode_totals_of(s) for s in shapes])
    many = np.stack(estimator.predict_many(totals, decode), axis=1)
    for shape, row in zip(shapes, many, strict=True):
        whole = estimator.predict(shape)
        running = estimator.start()
        order = rng.permutation(len(shape.items))
        for i in order[:-1]:
            running = running.add(*shape.items[i])
        last = shape.items[order[-1]]
        grown = running.add(*last)
        p50, bound = running.add_many(*(np.array([v]) for v in last))
        chunks = estimator.start()
        for item in shape.items:
            chunks = chunks.add(*item) if item.prefill else chunks
        steps = [(i.new, i.cached) for i in shape.items if not i.prefill]
        together = chunks.add_all([new for new, _ in steps], [held for _, held in steps])
        for other in (
            (grown.p50_ms, grown.bound_ms),
            (p50[0], bound[0]),
            (together.p50_ms, together.bound_ms),
            row,
        ):
            assert other == pytest.approx(whole, rel=1e-9)


def test_adding_leaves_the_batch_as_it_was(fitted: dict[str, FittedEstimator]) -> None:
    batch = fitted["wispprof"].start().add(5, 500)
    before = batch.p50_ms, batch.bound_ms
    batch.add(8, 8000)
    batch.add(64, 0, True)
    assert (batch.p50_ms, batch.bound_ms) == before


@pytest.mark.parametrize("kind", ESTIMATOR_KINDS)
def test_the_empty_batch_costs_nothing(kind: str, fitted: dict[str, FittedEstimator]) -> None:
    start = fitted[kind].start()
    assert (start.p50_ms, start.bound_ms) == (0.0, 0.0)
    assert start.totals == EMPTY
    assert fitted[kind].predict(BatchShape(())) == (0.0, 0.0)


# --- never falls ----------------------------------------------------------------------------------


def _more(rng: np.random.Generator, shape: BatchShape) -> BatchShape:
    """The shape with work added: an item, or more new or cached tokens of one."""
    change = rng.integers(3)
    if change == 0:
        extra = VerifyItem(int(2 ** rng.uniform(0, 8)), int(2 ** rng.uniform(0, 14)), rng.random() < 0.3)
        return BatchShape((*shape.items, extra))
    place = int(rng.integers(len(shape.items)))
    item = shape.items[place]
    grown = item._replace(
        new=item.new + int(change == 1) * int(rng.integers(1, 40)),
        cached=item.cached + int(change == 2) * int(rng.integers(1, 4000)),
    )
    return BatchShape((*shape.items[:place], grown, *shape.items[place + 1 :]))


Totals4 = tuple[ArrayTotals, ArrayTotals, ArrayTotals, ArrayTotals]


@pytest.fixture(scope="module")
def pairs() -> Totals4:
    """Totals of 10,000 batches and of the same with work added: (before, decode, after, decode)."""
    rng = np.random.default_rng(11)
    shapes = [random_shape(rng, 40) for _ in range(2_000)]
    before = [shape for shape in shapes for _ in range(5)]
    after = [_more(rng, shape) for shape in before]
    return tuple(  # type: ignore[return-value]
        BatchTotals.stack([totals(s) for s in part])
        for part in (before, after)
        for totals in (lambda s: totals_of(s.items), decode_totals_of)
    )


def _falls(estimator: FittedEstimator, pairs: Totals4) -> int:
    low = np.stack(estimator.predict_many(*pairs[:2]))
    high = np.stack(estimator.predict_many(*pairs[2:]))
    return int((high < low * (1 - 1e-12)).any(axis=0).sum())


@pytest.mark.parametrize("kind", MONOTONE)
def test_predictions_never_fall_when_work_is_added(
    kind: str,
    fitted: dict[str, FittedEstimator],
    pairs: Totals4,
) -> None:
    for coverage in (0.95, 0.99):
        assert _falls(fitted[kind].with_coverage(coverage), pairs) == 0


def test_the_check_can_fail(fitted: dict[str, FittedEstimator], pairs: Totals4) -> None:
    assert not fitted["forest"].step_model.monotone
    assert _falls(fitted["forest"], pairs) > 0


# --- physics, domain ------------------------------------------------------------------------------


def test_graph_buckets_are_found_and_believed_only_where_padding_follows(
    data: Observations,
) -> None:
    buckets = graph_buckets(data)
    assert set(buckets) <= {1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024}
    shuffled = dataclasses.replace(data, padded=np.random.default_rng(0).permutation(data.padded))
    assert len(graph_buckets(shuffled)) == 0
    assert len(graph_buckets(dataclasses.replace(data, padded=data.totals.sum_new))) == 0


def test_physical_weights_are_not_negative(data: Observations) -> None:
    terms = PhysicalTerms().fit(data)
    assert min(*terms.weights_, *terms.new_.slopes, *terms.cached_.slopes) >= 0


def test_prompt_tokens_that_emit_nothing_cost_less() -> None:
    """An output head of 0.05 ms per sampled token is learned, extrapolated, and never makes times fall."""
    rows = []
    for row in synthetic_rows(160, seed=6, noise=0.002):
        emit = row.shape.new_tokens - row.shape.prefill_tokens
        times = tuple(ms + 0.05 * emit for ms in row.samples_ms)
        rows.append(dataclasses.replace(row, samples_ms=times))
    data = Observations.of(rows)
    step_model = WispprofStepTime().fit(data)
    assert step_model.physical_.weights_[5] == pytest.approx(0.05, rel=0.3)
    high = upper_corner(data.totals)
    full = [VerifyItem(8, 4000)] * (high.items + 4)
    before = totals_of([*full, VerifyItem(high.prefill, 0, True)])
    after = totals_of([*full, VerifyItem(high.prefill + 99, 0, True)])
    assert step_model.clipped(after, high) >= step_model.clipped(before, high)
    assert step_model.p50(after) > step_model.p50(before)
    each = [step_model.clipped(totals, high) for totals in (before, after)]
    together = BatchTotals.stack([before, after])
    assert step_model.clipped_many(together, high) == pytest.approx(each, rel=1e-12)


def test_mixed_and_many_deep_items_cost_more_than_their_sums() -> None:
    """Terms in two totals are learned, equal by all methods, and grow outside the box too."""
    rows = []
    for row in synthetic_rows(160, seed=6, noise=0.002):
        totals = totals_of(row.shape.items)
        more = 0.05 * math.sqrt(totals.items * totals.max_cached)
        more += 0.1 * min(totals.prefill, totals.sum_new - totals.prefill)
        rows.append(dataclasses.replace(row, samples_ms=tuple(ms + more for ms in row.samples_ms)))
    data = Observations.of(rows)
    estimator = fit_on("wispprof", data)
    step_model = estimator.step_model
    assert isinstance(step_model, WispprofStepTime)
    assert step_model.physical_.weights_[6] == pytest.approx(0.05, rel=0.3)
    assert step_model.physical_.weights_[7] == pytest.approx(0.1, rel=0.5)
    rng = np.random.default_rng(2)
    before = [random_shape(rng, 80) for _ in range(2_000)]
    after = [_more(rng, shape) for shape in before]
    tables, decode = (
        [BatchTotals.stack([totals(s) for s in part]) for part in (before, after)]
        for totals in (lambda s: totals_of(s.items), decode_totals_of)
    )
    assert any(not estimator.in_domain(shape) for shape in before)
    assert _falls(estimator, (tables[0], decode[0], tables[1], decode[1])) == 0
    each = [step_model.p50(totals_of(shape.items)) for shape in before[:200]]
    assert step_model.p50_many(select(tables[0], np.arange(200))) == pytest.approx(each, rel=1e-12)


def test_beyond_the_domain_it_is_flagged_inflated_and_still_growing(
    fitted: dict[str, FittedEstimator],
) -> None:
    estimator = fitted["wispprof"]
    inside = BatchShape.uniform(8, 5, 1000)
    assert estimator.in_domain(inside)
    far = [BatchShape.uniform(8 * n, 5, 12_000) for n in (8, 16, 32)]
    assert not any(estimator.in_domain(s) for s in far)
    times = [estimator.predict(s) for s in far]
    assert times[0][0] < times[1][0] < times[2][0]
    # What the physical part adds is true to scale, and the bound's margin widens with distance.
    assert times[2][0] == pytest.approx(true_ms(far[2]), rel=0.35)
    margins = [bound / p50 for p50, bound in times]
    assert margins[0] < margins[1] < margins[2] < estimator.inflation * 1.3


# --- bounds ---------------------------------------------------------------------------------------


def test_bounds_cover_as_stated(fitted: dict[str, FittedEstimator]) -> None:
    fresh = Observations.of(synthetic_rows(300, seed=77))
    estimator = fitted["wispprof"]
    inside = fresh.take([i for i, s in enumerate(fresh.shapes) if estimator.in_domain(s)])
    for level, tolerance in ((0.95, 0.035), (0.99, 0.015)):
        p50, bound = estimator.with_coverage(level).predict_many(inside.totals, inside.decode)
        assert abs(coverage_of(bound, inside.samples) - level) < tolerance
        assert (bound / p50).mean() < 1.15
        assert (bound >= p50).all()
    # Negative control: the median is no bound.
    assert coverage_of(p50, inside.samples) < 0.8


def test_regimes_with_few_shapes_share_a_factor(data: Observations) -> None:
    plain = data.take(data.totals.prefill == 0)
    estimator = fit_on("wisp-linear", plain)
    assert estimator.ratio.shapes[2:] == (0, 0)
    assert all(f >= 1 for row in estimator.ratio.factors for f in row)


@pytest.mark.parametrize("coverage", [0.3, 1.0, 1.5])
def test_impossible_coverage_is_refused(coverage: float, fitted: dict[str, FittedEstimator]) -> None:
    with pytest.raises(ValueError, match="coverage"):
        fitted["wisp-linear"].with_coverage(coverage)


# --- choosing and evaluating ----------------------------------------------------------------------


def test_the_choice_is_by_held_out_error_and_never_the_forest(data: Observations) -> None:
    estimator = fit_estimator(data)
    errors = estimator.report["held_out"]
    assert estimator.kind == estimator.report["chosen"] == "wispprof"
    assert set(errors) == set(ESTIMATOR_KINDS)
    for other in ("wisp-linear", "staircase", "forest"):
        assert errors["wispprof"]["mape"] < errors[other]["mape"]
    assert errors["wispprof"]["median_ape"] < 2.5
    assert errors["wispprof"]["p90_ape"] < 8


def test_folds_and_blocks_never_divide_a_shape() -> None:
    rows = synthetic_rows(60)
    again = [dataclasses.replace(r, key=r.key + "'", order=r.order + 100) for r in rows]
    data = Observations.of([*rows, *again])
    assert len(data) == 60
    assert len(set(data.groups)) == 60
    assert all(len(s) == 14 for s in data.samples)
    assert np.bincount(folds_of(data)).tolist() == [6] * 10
    schemes = set()
    for scheme, held in groups_of(data):
        schemes.add(scheme)
        name = {"items": "items", "new": "max_new", "cached": "max_cached"}.get(scheme)
        if name is not None:
            values = getattr(data.totals, name)
            assert not set(values[held]) & set(values[~held])
    assert schemes == {"items", "new", "cached", "corner"}


def test_evaluation_tells_inside_from_outside_and_counts_its_steps(data: Observations) -> None:
    seen: list[tuple[int, int]] = []
    found = evaluate(
        data, ("wisp-linear", "staircase"), splits=3, progress=lambda d, t, _: seen.append((d, t))
    )
    assert seen[-1][0] == seen[-1][1] == len(seen)
    assert {r["scheme"] for r in found.groups} == {"items", "new", "cached", "corner", "all"}
    every = [r for r in found.groups if (r["estimator"], r["scheme"]) == ("wisp-linear", "all")]
    inside, outside = sorted(every, key=lambda r: -r["in_domain"])
    blocks = sum(int(h.sum()) for _, h in groups_of(data))
    assert inside["shapes"] + outside["shapes"] == blocks
    assert all(math.isfinite(r["coverage"]) and r["sharpness"] >= 1 for r in found.groups)
    assert [r["level"] for r in found.splits] == [0.95, 0.99] * 2
    assert len({r["shapes"] for r in found.learning}) >= 3


# --- on disk --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ESTIMATOR_KINDS)
def test_saved_estimators_answer_the_same(
    kind: str, fitted: dict[str, FittedEstimator], tmp_path: object
) -> None:
    path = tmp_path / "estimator.json"  # type: ignore[operator]
    original = fitted[kind].with_coverage(0.97).with_scale(1.1, 1.2)
    original.save(path, {"profile": "blake2b:0"})
    loaded = load_estimator(path)
    rng = np.random.default_rng(5)
    for _ in range(20):
        shape = random_shape(rng, 90)
        assert loaded.predict(shape) == pytest.approx(original.predict(shape), rel=1e-12)
    assert loaded.coverage == 0.97
    assert load_estimator(path, 0.9).coverage == 0.9


@pytest.mark.parametrize("kind", ["oracle", "os:system"])
def test_a_kind_that_is_not_installed_is_refused_and_not_imported(
    kind: str, fitted: dict[str, FittedEstimator], tmp_path: object
) -> None:
    path = tmp_path / "estimator.json"  # type: ignore[operator]
    write_document(path, "estimator", {"kind": kind, "step_model": {}})
    with pytest.raises(ArtifactDamaged, match=kind):
        load_estimator(path)


def test_damaged_estimators_are_refused(fitted: dict[str, FittedEstimator], tmp_path: object) -> None:
    path = tmp_path / "estimator.json"  # type: ignore[operator]
    with pytest.raises(ArtifactMissing):
        load_estimator(path)
    fitted["wispprof"].save(path)
    payload = read_document(path, "estimator").payload
    weights = payload["step_model"]["physical"]["weights"]
    for bad in ([*weights[:2], -1.0, *weights[3:]], weights[:6]):
        payload["step_model"]["physical"]["weights"] = bad
        write_document(path, "estimator", payload)
        with pytest.raises(ArtifactDamaged, match="weights"):
            load_estimator(path)


def test_prediction_needs_no_learning_library(fitted: dict[str, FittedEstimator], tmp_path: object) -> None:
    path = tmp_path / "estimator.json"  # type: ignore[operator]
    fitted["wispprof"].save(path)
    code = (
        "import sys; from pathlib import Path; from wispprof.fitting import load_estimator\n"
        f"e = load_estimator(Path({str(path)!r})); b = e.start().add(5, 500); b.bound_ms\n"
        "b.add_many([1, 2], [3, 4])\n"
        "bad = {'torch', 'sklearn', 'lightgbm', 'pandas', 'scipy', 'matplotlib'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- update ---------------------------------------------------------------------------------------


def test_recalibration_follows_a_slower_server(fitted: dict[str, FittedEstimator]) -> None:
    log = synthetic_rows(300, seed=9, samples=1, factor=1.3)
    updated = recalibrate(fitted["wispprof"], log)
    fresh = Observations.of(synthetic_rows(200, seed=10, factor=1.3))
    inside = fresh.take([i for i, s in enumerate(fresh.shapes) if updated.in_domain(s)])
    _, stale = fitted["wispprof"].predict_many(inside.totals, inside.decode)
    p50, bound = updated.predict_many(inside.totals, inside.decode)
    assert coverage_of(stale, inside.samples) < 0.1
    assert abs(coverage_of(bound, inside.samples) - 0.95) < 0.03
    assert np.median(p50 / inside.median_ms) == pytest.approx(1.0, abs=0.02)
    assert updated.report["update"]["scale"] == pytest.approx(1.3, rel=0.03)
    with pytest.raises(FitError, match="too few"):
        recalibrate(updated, log[:20])


@settings(max_examples=25)
@given(st.lists(items, min_size=1, max_size=12))
def test_the_bound_is_never_below_the_median(
    fitted: dict[str, FittedEstimator], batch: list[VerifyItem]
) -> None:
    p50, bound = fitted["wispprof"].predict(BatchShape(tuple(batch)))
    assert 0 < p50 <= bound
