"""A batching policy and a controller of another package, by ``module:Class`` and by entry point."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from wispprof import plugins
from wispprof.errors import PlanError
from wispprof.policies import make_batch_policy, make_controller
from wispprof.policies.linear_cost import LinearCost
from wispprof.simulation import Scenario, ServerModel, System, simulate
from wispprof.simulation.arrivals import ClosedFleet, Lengths
from wispprof.simulation.devices import DeviceProfile, LinkModel
from wispprof.simulation.synthetic_acceptance import SyntheticAcceptance

MODULE = '''
from dataclasses import dataclass

from wispprof.policies.baselines import FcfsPolicy


@dataclass
class LastComeFirstServed(FcfsPolicy):
    """Reverses the order of arrival."""

    def plan(self, now_ms, sessions, estimator, limits):
        newest = [s._replace(arrived_ms=-s.arrived_ms) for s in sessions]
        return super().plan(now_ms, newest, estimator, limits)


class AlwaysTwo:
    name = "always-two"

    def __init__(self, drafts=2):
        self.drafts = drafts

    def begin(self, context):
        return self.drafts

    def go_on(self, depth, features):
        return depth + 1 < self.drafts

    def acceptance_prob(self):
        return 0.5

    def finish(self, drafted, accepted):
        pass
'''


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lcfs_policy.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)


def scenario(system: System) -> Scenario:
    return Scenario(
        system,
        ServerModel(LinearCost(20.0, row_ms=0.3, kv_ms=0.0002), prefill_chunk=128),
        ClosedFleet(6, Lengths(60, 24, 0.3, 0.3), ramp_ms=500.0),
        SyntheticAcceptance(0.75),
        devices=((DeviceProfile("d", draft_ms=8.0), 1.0),),
        links=((LinkModel(20.0), 1.0),),
        seconds=4.0,
        warmup_s=0.5,
    )


def test_a_policy_and_a_controller_of_a_module_run_in_the_simulator() -> None:
    mine = System("mine", "lcfs_policy:LastComeFirstServed", "lcfs_policy:AlwaysTwo")
    narrow = System("narrow", "lcfs_policy:LastComeFirstServed", "fixed", batching_options={"max_batch": 1})
    report = simulate(scenario(mine))
    assert report.sessions > 0
    assert simulate(scenario(narrow)).goodput < report.goodput


def test_options_of_a_plugin_are_checked() -> None:
    assert make_batch_policy("lcfs_policy:LastComeFirstServed", max_batch=3).max_batch == 3  # type: ignore[attr-defined]
    with pytest.raises(PlanError, match="max_batch"):
        make_batch_policy("lcfs_policy:LastComeFirstServed", width=3)
    assert make_controller("lcfs_policy:AlwaysTwo", drafts=5).begin(None) == 5  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="drafts"):
        make_controller("lcfs_policy:AlwaysTwo", k=5)


def test_an_installed_entry_point_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    points = importlib.metadata.EntryPoints(
        importlib.metadata.EntryPoint(name, f"lcfs_policy:{attribute}", f"wispprof.{group}")
        for name, attribute, group in (
            ("lcfs", "LastComeFirstServed", "policies"),
            ("two", "AlwaysTwo", "controllers"),
        )
    )
    monkeypatch.setattr(plugins, "entry_points", lambda **wanted: points.select(**wanted))
    assert type(make_batch_policy("lcfs")).__name__ == "LastComeFirstServed"
    assert make_controller("two").name == "always-two"
