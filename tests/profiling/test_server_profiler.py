"""profile-server and profile-edge on tiny models, with real forwards and counted time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from wispprof.artifacts import Manifest, load_edge, load_server, make_profile
from wispprof.drafters.torch_drafter import TorchDrafter
from wispprof.engines.loading import random_model
from wispprof.engines.torch.engine import TorchEngine
from wispprof.errors import ArtifactError, PhysicsViolation, ProfileError
from wispprof.fitting.observations import MINIMUM_SHAPES
from wispprof.profiling import drafter_runner, edge_profiler, server_profiler
from wispprof.profiling.physics_checks import check_edge
from wispprof.profiling.profile_run import journal_path
from wispprof.profiling.shape_grid import Axes
from wispprof.profiling.sweep import Sweep
from wispprof.profiling.sweep_cost import pilot
from wispprof.settings import profiler_settings
from wispprof.settings.profiler_settings import Output, SweepSettings
from wispprof.types import ModelInfo, Sampling

AXES = Axes(items=(1, 4), new=(1, 5), cached=(16, 128), skew_items=(4,), chunk=(32,), mixed_items=(2,))
SWEEP = SweepSettings(max_samples=8, sentinel_every=5)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny():
    return random_model("tiny-llama", seed=1)


class CountedTime:
    """A clock that moves by what the engine has just computed: exact, and the same on any machine."""

    def __init__(self, monkeypatch, blind=False, die_after=None):
        self.now, self.steps, self.die_after = 0.0, 0, die_after
        real = TorchEngine.step

        def step(engine, feeds, **more):
            cached = sum(engine.cached(feed.session) for feed in feeds)
            new = sum(len(feed.tokens) for feed in feeds)
            outcomes = real(engine, feeds, **more)
            self.steps += 1
            if self.die_after is not None and self.steps > self.die_after:
                raise KeyboardInterrupt
            self.now += 0.005 if blind else 0.001 + 2e-5 * new + 4e-6 * cached
            return outcomes

        monkeypatch.setattr(TorchEngine, "step", step)

    def __call__(self):
        self.now += 1e-7
        return self.now


def settings(path=None, **more):
    output = Output(path, resume=more.pop("resume", False))
    return profiler_settings.ServerProfilerSettings(axes=AXES, sweep=SWEEP, output=output, **more)


def test_a_server_profile_from_end_to_end(tiny, monkeypatch, tmp_path):
    clock = CountedTime(monkeypatch)
    profile = server_profiler.profile_server(settings(tmp_path / "p"), loaded=tiny, clock=clock)
    assert load_server(tmp_path / "p") == profile
    assert not journal_path(tmp_path / "p").exists()
    kinds = {row.kind for row in profile.rows}
    assert kinds == {"verify", "prefill", "mixed", "sentinel"}
    for row in profile.rows:
        shape = row.shape
        ms = 1 + 0.02 * shape.new_tokens + 0.004 * shape.cached_tokens
        assert row.median_ms == pytest.approx(ms, rel=0.01), row.key
    manifest = profile.manifest
    assert manifest.model.parameters == tiny.info.parameters
    assert manifest.engine["backend"] == "dense"
    assert (manifest.engine["attention"], manifest.engine["graphs"]) == ("dense", False)
    assert manifest.summary["physics"]["growth"] > 1.15
    assert manifest.hardware["hash"]
    assert manifest.summary["drift"]["drifted"] is False
    with pytest.raises(ArtifactError, match="--overwrite"):
        server_profiler.profile_server(settings(tmp_path / "p"), loaded=tiny, clock=clock)


def test_interrupted_and_resumed(tiny, monkeypatch, tmp_path):
    clock = CountedTime(monkeypatch, die_after=120)
    with pytest.raises(KeyboardInterrupt):
        server_profiler.profile_server(settings(tmp_path / "p"), loaded=tiny, clock=clock)
    assert journal_path(tmp_path / "p").exists()
    assert not (tmp_path / "p.jsonl").exists()
    clock.die_after = None
    with pytest.raises(ArtifactError, match="--resume"):
        server_profiler.profile_server(settings(tmp_path / "p"), loaded=tiny, clock=clock)
    profile = server_profiler.profile_server(settings(tmp_path / "p", resume=True), loaded=tiny, clock=clock)
    keys = [row.key for row in profile.rows if row.kind != "sentinel"]
    planned = server_profiler.plan_server(settings(), loaded=tiny, clock=clock)
    assert sorted(keys) == sorted(workload.key for workload in planned.workloads)


def test_a_backend_that_ignores_its_batch_is_refused(tiny, monkeypatch, tmp_path):
    clock = CountedTime(monkeypatch, blind=True)
    heavy = Axes(items=(1, 2, 4, 8), new=(1, 9), cached=(16, 64, 240))
    chosen = profiler_settings.ServerProfilerSettings(axes=heavy, sweep=SWEEP, output=Output(tmp_path / "p"))
    with pytest.raises(PhysicsViolation):
        server_profiler.profile_server(chosen, loaded=tiny, clock=clock)
    assert not (tmp_path / "p.jsonl").exists()


def test_every_repeat_meets_the_same_state(tiny):
    engine = TorchEngine(tiny, kv_tokens=2000, max_sessions=8)
    runner = server_profiler.EngineRunner(engine, 200)
    workload = next(
        s
        for s in server_profiler.server_workloads(AXES, server_profiler.DeviceCapacity(1000, 8, 256))
        if s.subject.prefill_tokens and len(s.subject.items) > 1
    )
    runner.prepare(workload)
    shapes = []
    for _ in range(4):
        runner.run_once()
        shapes.append(engine.last_step.shape)
    assert all(shape == workload.subject for shape in shapes)
    engine.check_integrity()
    runner.finish()
    runner.close()
    assert engine.sessions == []
    assert engine.kv_free == 2000


def test_too_little_memory_is_said(tiny, monkeypatch):
    with pytest.raises(ProfileError, match="KV tokens"):
        server_profiler.profile_server(settings(kv_tokens=40), loaded=tiny)


def test_a_budget_leaves_workloads_out(tiny, monkeypatch):
    clock = CountedTime(monkeypatch)
    whole = server_profiler.plan_server(settings(), loaded=tiny, clock=clock)
    some = server_profiler.plan_server(
        settings(budget_minutes=whole.expected_s / 60 / 3), loaded=tiny, clock=clock
    )
    assert 0 < len(some.workloads) < len(whole.workloads)
    assert some.expected_s < whole.expected_s / 2


def test_a_budget_holds_from_the_call_to_the_end(tiny, monkeypatch):
    """Loading, first prefill and pilot included; the corners are there."""
    clock = CountedTime(monkeypatch)
    whole = server_profiler.plan_server(settings(), loaded=tiny, clock=clock)
    begin, budget_s = clock(), whole.expected_s / 2
    profile = server_profiler.profile_server(settings(budget_minutes=budget_s / 60), loaded=tiny, clock=clock)
    assert 0.5 * budget_s < clock() - begin <= budget_s
    work = [workload.subject.cached_tokens for workload in whole.workloads]
    kept = [row.shape.cached_tokens for row in profile.rows if row.kind != "sentinel"]
    assert min(kept) == min(work)
    assert max(kept) == max(work)
    assert len(kept) < len(work)


def test_a_slow_disk_costs_the_quick_grid_no_shapes(tiny, monkeypatch):
    """Nobody asked for a time. Negative control: a time that was asked for counts from the call."""
    clock = CountedTime(monkeypatch)

    def load(asked):
        clock.now += 60 * profiler_settings.QUICK_MINUTES
        return tiny

    monkeypatch.setattr(server_profiler, "_load", load)
    monkeypatch.setattr(server_profiler, "load_axes", lambda name: AXES)
    quick = profiler_settings.ServerProfilerSettings(sweep=SWEEP)
    profile = server_profiler.profile_server(quick, clock=clock)
    shapes = {row.key for row in profile.rows if row.kind != "sentinel"}
    whole = server_profiler.plan_server(settings(), loaded=tiny, clock=clock)
    assert shapes == {workload.key for workload in whole.workloads}
    with pytest.raises(ProfileError, match="--budget-minutes"):
        server_profiler.profile_server(
            replace(quick, budget_minutes=profiler_settings.QUICK_MINUTES), clock=clock
        )


def test_another_engine_loads_the_target_alone_and_in_its_own_time(tiny, monkeypatch):
    clock = CountedTime(monkeypatch)

    def load(asked, axes, sweep, clock):
        clock.now += 60 * profiler_settings.QUICK_MINUTES
        return server_profiler._torch_engine(asked, tiny, axes, sweep, clock)

    monkeypatch.setattr("wispprof.profiling.vllm_profile.load_profiled_vllm", load)
    monkeypatch.setattr(server_profiler, "_load", lambda asked: pytest.fail("the torch engine loaded it too"))
    monkeypatch.setattr(server_profiler, "load_axes", lambda name: AXES)
    quick = profiler_settings.ServerProfilerSettings(engine="vllm", sweep=SWEEP)
    profile = server_profiler.profile_server(quick, clock=clock)
    whole = server_profiler.plan_server(settings(), loaded=tiny, clock=clock)
    measured = {row.key for row in profile.rows if row.kind != "sentinel"}
    assert measured == {workload.key for workload in whole.workloads}


def test_a_slow_machine_gets_the_shapes_that_a_fit_needs(tiny, monkeypatch):
    """The quick grid's own time may not leave too few. Negative control: a time that was asked for may."""
    assert server_profiler.QUICK_SHAPES > MINIMUM_SHAPES
    monkeypatch.setattr(server_profiler, "QUICK_SHAPES", 5)
    monkeypatch.setattr(profiler_settings, "QUICK_MINUTES", 1e-4)
    monkeypatch.setattr(server_profiler, "load_axes", lambda name: AXES)
    clock = CountedTime(monkeypatch)
    whole = server_profiler.plan_server(settings(), loaded=tiny, clock=clock)
    profile = server_profiler.profile_server(
        profiler_settings.ServerProfilerSettings(sweep=SWEEP), loaded=tiny, clock=clock
    )
    shapes = {row.shape.key() for row in profile.rows if row.kind != "sentinel"}
    assert len(shapes) == 5
    assert profile.manifest.summary["left_out"] == len(whole.workloads) - 5 > 0
    with pytest.raises(ProfileError, match="--budget-minutes"):
        server_profiler.profile_server(settings(budget_minutes=1e-4), loaded=tiny, clock=clock)


def test_an_edge_profile_from_end_to_end(tiny, monkeypatch, tmp_path):
    now = 0.0
    forward = TorchDrafter._forward

    def counted(*args):
        nonlocal now
        now += 0.004  # each forward takes 4 ms
        return forward(*args)

    def clock():
        nonlocal now
        now += 1e-6
        return now

    forward_tree = TorchDrafter._forward_tree

    def counted_nodes(drafter, first, places, expanded):
        nonlocal now
        now += 0.004 + 0.001 * (len(places) - 1)
        return forward_tree(drafter, first, places, expanded)

    monkeypatch.setattr(TorchDrafter, "_forward", counted)
    monkeypatch.setattr(TorchDrafter, "_forward_tree", counted_nodes)
    axes = edge_profiler.EdgeAxes((16, 64), (16, 32), 64, burst_s=0.1, sustained_s=0.2, rounds=(16,))
    rests = []
    monkeypatch.setitem(drafter_runner.EDGE_GRIDS, "quick", axes)
    chosen = profiler_settings.EdgeProfilerSettings(
        output=Output(tmp_path / "e"), sampling=Sampling(0.7, seed=1)
    )
    seen = []
    profile = edge_profiler.profile_edge(
        chosen,
        lambda *update: seen.append(update[:2]),
        loaded=tiny,
        clock=clock,
        sleep=rests.append,
    )
    assert load_edge(tmp_path / "e") == profile
    assert not journal_path(tmp_path / "e").exists()
    kinds = {row.kind for row in profile.rows}
    assert kinds == set(edge_profiler.EdgeRow.__doc__.split("``")) & kinds | {"sentinel"}
    assert {
        "draft_step",
        "catch_up",
        "round",
        "forward",
        "nodes",
        "prefill",
        "controller",
        "burst",
        "sustained",
        "energy",
    } < kinds
    assert {row.context for row in profile.of_kind("draft_step")} == {16, 64}
    assert profile.draft_ms(40) == pytest.approx(4.0, rel=1e-3)
    assert profile.resume_ms(40) == pytest.approx(0.0, abs=1e-2)
    times = {row.tokens: row.median_ms for row in profile.of_kind("nodes")}
    assert times == pytest.approx({1: 4.0, 2: 5.0, 4: 7.0, 8: 11.0, 16: 19.0}, rel=1e-2)
    assert profile.manifest.summary["extra_node_ms"] == pytest.approx(1.0, rel=1e-2)
    [rested] = profile.of_kind("round")
    assert (rested.tokens, rested.rested_ms) == (4, 20.0)
    assert len(rests) > len(rested.samples_ms)
    assert set(rests) == {0.02}
    assert seen[-1][0] == seen[-1][1]
    [energy] = profile.of_kind("energy")
    assert energy.energy_j is None
    assert profile.manifest.summary["energy_sensor"] == "no sensor"
    assert profile.manifest.summary["burst_tokens_per_s"] == pytest.approx(250, rel=1e-3)


def test_edge_workloads_do_what_their_kind_says(tiny):
    drafter = TorchDrafter(tiny)
    rests = []
    runner = edge_profiler.DrafterRunner(drafter, 96, Sampling(), sleep=rests.append)
    for workload in edge_profiler.edge_workloads(drafter_runner.EDGE_GRIDS["quick"], 256, True):
        runner.prepare(workload)
        rests.clear()
        for _ in range(3):
            before = drafter.length
            runner.run_once()
            if workload.kind != "controller":
                assert drafter.length == before
        assert rests == ([0.02] * 3 if workload.kind == "round" else [])
        if workload.kind in ("draft_step", "forward"):
            assert drafter.length == workload.subject.context
            assert drafter.cached_kv().shape[3] == workload.subject.context
        if workload.kind == "nodes":  # over a middle context, and forgotten after each forward
            assert (drafter.length, drafter.cached_kv().shape[3]) == (64, 64)
            assert workload.subject.tokens in (1, 2, 4, 8, 16)
        if workload.kind == "catch_up":  # over as many tokens as a draft step, two of them unread
            assert drafter.length == workload.subject.context
            assert drafter.cached_kv().shape[3] == workload.subject.context - workload.subject.tokens
        if workload.kind == "prefill":
            assert drafter.length == max(1, workload.subject.context) + workload.subject.tokens + 1
        runner.finish()
    with pytest.raises(ProfileError, match="too short"):
        edge_profiler.edge_workloads(drafter_runner.EDGE_GRIDS["quick"], 20)


class _Waking:
    """A drafter whose steps take 2 ms, and 1.5 ms more after a rest; clock and sleep are its own."""

    def __init__(self, deaf=False):
        self.now, self.length, self.rested, self.deaf = 0.0, 0, False, deaf

    def open(self, tokens, sampling):
        self.length = len(tokens)

    def prefill(self):
        self.now += 0.001

    def draft(self):
        self.now += 0.0035 if self.rested and not self.deaf else 0.002
        self.length, self.rested = self.length + 1, False

    forward = draft

    def extend(self, tokens):
        self.length += len(tokens)

    def rollback(self, length):
        self.length = length

    def sleep(self, seconds):
        self.now += seconds
        self.rested = True


@pytest.mark.parametrize(("deaf", "added"), [(False, 1.5), (True, 0.0)])
def test_a_round_after_a_rest_is_timed_without_the_rest_and_announced_with_it(deaf, added):
    device = _Waking(deaf)
    runner = edge_profiler.DrafterRunner(device, 96, Sampling(), clock=lambda: device.now, sleep=device.sleep)
    axes = edge_profiler.EdgeAxes((64,), (16,), 64, 0.0, 0.0, rounds=(64,), rest_ms=50.0)
    workloads = [s for s in edge_profiler.edge_workloads(axes, 256) if s.kind != "controller"]
    sweep = SweepSettings(min_samples=20, block=10)
    cost = pilot(runner, workloads, None, sweep, lambda: device.now)
    have = [(workload, (), 0) for workload in workloads]
    announced, begin = cost.total(have, None)[1], device.now
    rows = Sweep(runner, workloads, sweep, clock=lambda: device.now).run().rows
    assert announced == pytest.approx(device.now - begin, rel=0.1)
    assert announced > 20 * 0.05
    profile = make_profile(Manifest("edge", ModelInfo("d")), rows)
    assert profile.resume_ms(64) == pytest.approx(added)
    assert profile.draft_ms(64) == pytest.approx(2.0)


def test_an_edge_that_does_not_draft_is_refused():
    row = edge_profiler.EdgeRow
    short = [row("d", "draft_step", 64, (2.0,)), row("r", "round", 64, (2.5,), 4, rested_ms=20.0)]
    with pytest.raises(PhysicsViolation, match="all its steps"):
        check_edge(short)
    check_edge([short[0], replace(short[1], samples_ms=(9.0,))])
    lazy = [row("d", "draft_step", 64, (0.1,)), row("f", "forward", 64, (4.0,))]
    with pytest.raises(PhysicsViolation, match="without doing its work"):
        check_edge(lazy)
    one, many = row("1", "nodes", 64, (4.0,), 1), row("16", "nodes", 64, (1.0,), 16)
    with pytest.raises(PhysicsViolation, match="all its nodes"):
        check_edge([one, many])
    deaf = [row("a", "prefill", 0, (4.0,), 64), row("b", "prefill", 0, (4.0,), 512)]
    with pytest.raises(PhysicsViolation, match="ignore its prompt"):
        check_edge(deaf)
