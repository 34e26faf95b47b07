"""Axes, ranges and the shapes made of them."""

from __future__ import annotations

import pytest

from wispprof.errors import ArtifactMissing, ProfileError
from wispprof.profiling.drafter_runner import EDGE_GRIDS, load_edge_axes
from wispprof.profiling.shape_grid import (
    GRIDS,
    Axes,
    DeviceCapacity,
    load_axes,
    longest_full_session,
    parse_range,
    required_capacity,
    server_workloads,
)

ROOMY = DeviceCapacity(1 << 22, 256, 1 << 16)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("8", (8,)),
        ("1-4", (1, 2, 3, 4)),
        ("64-1024*2", (64, 128, 256, 512, 1024)),
        ("0-512+128", (0, 128, 256, 384, 512)),
        ("4, 1-2 ,4-16*2", (1, 2, 4, 8, 16)),
        ("3-20*3", (3, 9)),
    ],
)
def test_ranges(text, values):
    assert parse_range(text) == values


@pytest.mark.parametrize("text", ["", "a", "4-1", "0-8*2", "1-8*1", "1-8+0", "1--2", "-1", "0-9999999"])
def test_ranges_that_make_no_sense_say_so(text):
    with pytest.raises(ProfileError):
        parse_range(text)


@pytest.mark.parametrize("name", list(GRIDS))
def test_grids_hold_what_they_promise(name):
    workloads = server_workloads(GRIDS[name], ROOMY)
    shapes = [workload.subject for workload in workloads]
    assert len({workload.key for workload in workloads}) == len(workloads)
    assert {"verify", "prefill", "mixed"} == {workload.kind for workload in workloads}
    assert any(len(set(s.items)) > 1 and not s.prefill_tokens for s in shapes), "ragged shapes"
    assert any(s.max_new == 1 for s in shapes), "k = 0"
    for workload in workloads:
        assert (workload.kind == "verify") == (workload.subject.prefill_tokens == 0)
        assert (workload.kind == "prefill") == all(item.prefill for item in workload.subject.items)


def test_grids_stay_within_the_device():
    small = DeviceCapacity(3000, 4, 512, step_tokens=128)
    for name in GRIDS:
        assert all(small.holds(workload.subject) for workload in server_workloads(GRIDS[name], small))
    with pytest.raises(ProfileError, match="fits"):
        server_workloads(Axes((8,), (5,), (64,)), small)


def test_rows_near_the_memory_limit():
    capacity = DeviceCapacity(40_000, 64, 4096)
    longest_full_session = max(s.subject.cached_tokens for s in server_workloads(GRIDS["standard"], capacity))
    assert longest_full_session > 0.9 * capacity.kv_tokens


@pytest.mark.parametrize("context", [48, 2048])
def test_contexts_beyond_the_model_are_measured_at_its_very_end(context):
    capacity = DeviceCapacity(1 << 22, 256, context)
    shapes = [s.subject for s in server_workloads(GRIDS["full"], capacity) if s.kind == "verify"]
    ends = {i.new for s in shapes for i in s.items if i.cached + i.new == context}
    assert ends == set(GRIDS["full"].new)


@pytest.mark.parametrize("name", list(GRIDS))
@pytest.mark.parametrize("context", [300, 2048, 1 << 16])
def test_what_a_grid_wants_is_the_most_it_can_use(name, context):
    axes = GRIDS[name]
    most = required_capacity(axes, context)
    endless = server_workloads(axes, DeviceCapacity(1 << 40, 1 << 20, context))
    if not axes.full_share:
        assert all(most.holds(workload.subject) for workload in endless)
    held = server_workloads(axes, DeviceCapacity(most.kv_tokens, most.sessions, context))
    longest = max(i.cached + i.new for s in held for i in s.subject.items)
    assert longest <= max(most.context, min(context, longest_full_session(axes, most.kv_tokens)))


def test_axes_from_toml(tmp_path):
    file = tmp_path / "grid.toml"
    file.write_text('[server]\nbase = "quick"\nitems = "1-4*2"\ncached = [10, 20]\nfull_share=[0.5]\n')
    axes = load_axes(str(file))
    assert (axes.items, axes.cached, axes.full_share) == ((1, 2, 4), (10, 20), (0.5,))
    assert axes.new == GRIDS["quick"].new
    for text, says in (
        ("itemz = [1]", "no axis"),
        ("items = [", "not TOML"),
        ('base = "x"', "base"),
        ("items = [true]", "numbers"),
        ("items = 4", "numbers"),
    ):
        file.write_text(text)
        with pytest.raises(ProfileError, match=says):
            load_axes(str(file))
    with pytest.raises(ArtifactMissing, match="neither"):
        load_axes("nowhere")


def test_edge_axes_from_toml(tmp_path):
    file = tmp_path / "grid.toml"
    file.write_text('[server]\nitems = [1]\n[edge]\nbase = "standard"\ncontexts = "64-256*2"\nburst_s = 1\n')
    axes = load_edge_axes(str(file))
    assert (axes.contexts, axes.burst_s) == ((64, 128, 256), 1.0)
    assert axes.sustained_s == EDGE_GRIDS["standard"].sustained_s >= 60
    for text, says in (
        ("context = [1]", "no axis"),
        ("contexts = 4", "numbers"),
        ("burst_s = -1", "number >= 0"),
        ("chunk_context = true", "number >= 0"),
    ):
        file.write_text(text)
        with pytest.raises(ProfileError, match=says):
            load_edge_axes(str(file))
    with pytest.raises(ArtifactMissing, match="neither"):
        load_edge_axes("nowhere")
