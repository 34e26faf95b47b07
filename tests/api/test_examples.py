"""The examples run and give what they say."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest

import wispprof
from examples import batching_policy, custom_drafter, measure_and_plan
from wispprof.artifacts import bundled_path


def test_the_custom_drafter_changes_no_text() -> None:
    drafted, alone = custom_drafter.main()
    assert drafted == alone
    assert len(drafted) > 20


def test_the_batching_policy_runs_in_simulator_and_server() -> None:
    goodput, attainment = batching_policy.simulated(batching_policy.NAME, devices=6)
    assert goodput > 0
    assert 0 <= attainment <= 1
    texts = [
        asyncio.run(batching_policy.served(policy, "def area(")) for policy in ("fcfs", batching_policy.NAME)
    ]
    assert texts[0] == texts[1]
    assert len(texts[0]) > 20


def test_measure_and_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the shipped profiles in place of a sweep, which a busy machine could disturb."""

    def shipped(name: str) -> Any:
        def profile(settings: Any) -> None:
            for suffix in (".jsonl", ".manifest.json"):
                source = bundled_path(f"profiles/xeon-2core-reference-{name}{suffix}")
                shutil.copy(source, settings.output.path.with_suffix("").with_suffix(suffix))

        return profile

    monkeypatch.setattr(wispprof, "profile_server", shipped("pair"), raising=False)
    monkeypatch.setattr(wispprof, "profile_edge", shipped("draft"), raising=False)
    lines = measure_and_plan.main(tmp_path)
    assert len(lines) == 4
    assert all("meets the SLO" in line or "misses the SLO" in line for line in lines)
    plan = wispprof.load_plan(tmp_path / "plan.json")
    assert {row.device for row in plan.draft} == {"laptop"}
