"""A busy machine makes times contradict each other: those are measured again, by a resumed run too."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from wispprof.artifacts import load_edge
from wispprof.errors import ArtifactError, PhysicsViolation
from wispprof.profiling.drafter_runner import DrafterRunner, EdgeAxes, edge_workloads
from wispprof.profiling.physics_checks import check_edge
from wispprof.profiling.profile_run import ProfilerSetup, check_output, collect_profile, journal_path
from wispprof.profiling.sweep_cost import pilot
from wispprof.settings.profiler_settings import Output, SweepSettings
from wispprof.types import ModelInfo

SWEEP = SweepSettings(min_samples=6, max_samples=6, block=3, sentinel_every=1)
STEP = "draft_step 1@64"


class Machine:
    """A draft step takes 2 ms, a round of four 8 ms; steps that are timed while it is busy take 24 ms.

    ``calm_after``: number of blocks of draft steps after which it is no longer busy.
    """

    def __init__(self, calm_after, round_ms=8.0):
        self.now, self.calm_after, self.round_ms = 0.0, calm_after, round_ms
        self.blocks, self.references = [], itertools.cycle((2.0, 24.0))

    def prepare(self, workload):
        self.blocks.append(workload.key)
        busy = 0 < self.calm_after >= self.blocks.count(STEP)
        self.ms = {"round": self.round_ms, "draft_step": 24.0 if busy else 2.0}.get(workload.kind, 2.0)
        if workload.kind == "sentinel" and busy:
            self.ms = next(self.references)

    def run_once(self):
        self.now += self.ms / 1000
        return self.ms

    def finish(self):
        pass

    def row(self, *measured):
        return DrafterRunner.row(self, *measured)


def profile(machine, path, budget_s=None, **how):
    axes = EdgeAxes((64,), (16,), 64, 0.0, 0.0, rounds=(64,))
    workloads = [w for w in edge_workloads(axes, 256) if w.kind in ("draft_step", "round")]
    sentinel = replace(workloads[0], key="sentinel", kind="sentinel")
    cost = pilot(machine, workloads, sentinel, SWEEP, lambda: machine.now)
    machine.blocks.clear()
    return collect_profile(
        ProfilerSetup(
            *("edge", machine, workloads, sentinel, cost, SWEEP, ModelInfo("d")), {"device": "cpu"}, {}
        ),
        Output(path, **how),
        check=check_edge,
        finish=lambda result, journal: (result.rows, {}),
        clock=lambda: machine.now,
        budget_s=budget_s,
    )


def test_contradicting_rows_alone_are_measured_again(tmp_path):
    machine = Machine(calm_after=3)
    made = profile(machine, tmp_path / "e")
    assert load_edge(tmp_path / "e") == made
    [step], [whole] = made.of_kind("draft_step"), made.of_kind("round")
    assert (step.median_ms, whole.median_ms) == (2.0, 8.0)
    assert step.set_aside_ms == (24.0,) * 9  # two blocks of the sweep, one of those after it
    measured = [key for key in machine.blocks if key != "sentinel"]
    assert sorted(measured[:4]) == [STEP, STEP, whole.key, whole.key]
    assert sorted(measured[4:]) == [STEP, STEP, whole.key, whole.key]


def test_a_machine_that_stays_busy_is_named_and_a_resumed_run_measures_again(tmp_path):
    output = tmp_path / "e"
    with pytest.raises(PhysicsViolation) as raised:
        profile(Machine(calm_after=99), output)
    assert raised.value.keys == {STEP, "round 4@64/20ms"}
    said = str(raised.value)
    assert "A round of 4 draft steps over 64 tokens takes 8.000 ms, one step 24.000 ms." in said
    assert "or the machine was too busy to tell" in said
    assert "reference measurements deviated. When it is idle, --resume measures these shapes again" in said
    assert not output.with_suffix(".jsonl").exists()
    idle = Machine(calm_after=0)
    made = profile(idle, output, resume=True)
    assert {row.kind: row.median_ms for row in made.rows if row.kind != "sentinel"} == {
        "draft_step": 2.0,
        "round": 8.0,
    }
    assert sorted(key for key in idle.blocks if key != "sentinel") == [STEP, "round 4@64/20ms"]
    assert not journal_path(output).exists()


def test_a_draft_that_skips_steps_is_refused_on_any_machine(tmp_path):
    """Measuring again does not pass a wrong time: here the round drafts one token of four."""
    machine = Machine(calm_after=0, round_ms=2.0)
    with pytest.raises(PhysicsViolation, match="without doing all its steps: do not trust these times"):
        profile(machine, tmp_path / "e")
    assert machine.blocks.count(STEP) == 2 + 5


def test_measuring_again_keeps_to_the_budget(tmp_path):
    machine = Machine(calm_after=2)
    with pytest.raises(PhysicsViolation):
        profile(machine, tmp_path / "e", budget_s=0.5)
    assert machine.now < 2 * 0.5


def test_rows_of_an_unfinished_sweep_are_seen_before_the_model_is_loaded(tmp_path):
    with pytest.raises(PhysicsViolation):
        profile(Machine(calm_after=99), tmp_path / "e")
    with pytest.raises(ArtifactError, match="Go on with --resume, or start over with --overwrite"):
        check_output(Output(tmp_path / "e"))
    check_output(Output(tmp_path / "e", resume=True))
    check_output(Output(tmp_path / "e", overwrite=True))
