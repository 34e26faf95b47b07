"""Limits of a step, the plan's row they follow, and where both can be read afterwards."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
from pathlib import Path

import httpx
import psutil
import pytest
from fake_pair import hash_trace, linear_cost
from prometheus_client.parser import text_string_to_metric_families
from raw_edge import edge

from wispprof.artifacts import save_trace
from wispprof.artifacts.plan import BatchRow, Plan
from wispprof.bench import FleetProcess
from wispprof.server import running_server
from wispprof.server.metrics import Metrics, StepRecord
from wispprof.settings.fleet_settings import BenchSettings
from wispprof.settings.server_settings import ServerSettings
from wispprof.simulation.devices import device_of
from wispprof.testing.cpu_burner import CpuBurner
from wispprof.testing.fake_engine import FakeDrafter, FakeEngine

NARROW = BatchRow(2.0, 0, 4, token_budget=6, max_items=2, prefill_chunk=3, p50_ms=1, bound_ms=2)
WIDE = BatchRow(9.0, 0, 4, token_budget=512, max_items=32, prefill_chunk=64, p50_ms=1, bound_ms=2)
PLAN = Plan(draft=(), batch=(NARROW, WIDE), hash="plan")


@pytest.mark.parametrize("policy", ["fcfs", "wisp", "wispprof"])
async def test_a_plan_limits_every_step_and_log_metrics_and_page_name_its_row(
    policy: str, tmp_path: Path
) -> None:
    engine, log = FakeEngine(64), tmp_path / "steps.jsonl"
    settings = ServerSettings(policy=policy, admit="all", step_log=log)
    prompt = list(range(10))
    async with running_server(
        settings, engine=engine, model=engine.served, plan=PLAN, estimator=linear_cost()
    ) as running:
        async with edge(running.split_url) as slow:
            texts = await asyncio.gather(
                *(
                    slow.generate(n, [*prompt, n], 12, drafter=FakeDrafter(engine.target, 0.7))
                    for n in range(5)
                )
            )
        async with httpx.AsyncClient() as client:
            page = (await client.get(f"{running.http_url}/steps")).json()
            shown = (await client.get(f"{running.http_url}/metrics")).text
    assert texts == [engine.target.generate([*prompt, n], 12) for n in range(5)]
    steps = page["steps"]
    assert page["first"] == 0
    assert page["next"] == len(steps) > 20
    assert max(step["items"] for step in steps) == NARROW.max_items
    assert max(step["new_tokens"] for step in steps) <= NARROW.token_budget
    assert max(step["prefill_tokens"] for step in steps) == NARROW.prefill_chunk
    assert {step["row"] for step in steps} == {NARROW.cell} == {"2/0"}
    samples = [s for f in text_string_to_metric_families(shown) for s in f.samples]
    counted = [s for s in samples if s.name == "wispprof:batch_row_steps_total"]
    assert [(s.labels, s.value) for s in counted] == [({"slo_class": "2", "load_level": "0"}, len(steps))]
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {line["row"] for line in lines} == {"2/0"}
    assert all(line["p50_ms"] > 0 for line in lines)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system names no cores")
async def test_a_fleet_stays_on_its_cores() -> None:
    mine = os.sched_getaffinity(0)
    with FleetProcess(cores=(max(mine),)) as fleet:
        assert await fleet.call(os.sched_getaffinity, 0) == {max(mine)}
    assert os.sched_getaffinity(0) == mine


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="the system knows no idle priority")
def test_a_cpu_burner_keeps_a_core_busy_at_the_lowest_priority_and_leaves_nothing() -> None:
    core = max(os.sched_getaffinity(0))
    with CpuBurner((core,)) as burner:
        (pid,) = burner.pids
        process = psutil.Process(pid)
        while os.sched_getscheduler(pid) != os.SCHED_IDLE:
            assert process.is_running()
        assert os.sched_getaffinity(pid) == {core}
        before = process.cpu_times().user
        while process.cpu_times().user == before:
            assert process.is_running()
    assert not psutil.pid_exists(pid)


async def test_the_fastest_open_slo_class_selects_the_row() -> None:
    engine = FakeEngine(64)
    async with running_server(
        ServerSettings(policy="fcfs", admit="all"), engine=engine, model=engine.served, plan=PLAN
    ) as running:
        assert running.server.batch_row is NARROW
        async with edge(running.split_url) as one:
            await one.generate(0, list(range(20)), 4, tokens_per_s=9.0)
        steps = running.server.metrics.steps
        assert {step.row for step in steps} == {"9/0"}
        assert max(step.prefill_tokens for step in steps) == 20


def test_steps_are_numbered_and_the_oldest_are_dropped() -> None:
    metrics = Metrics(keep_steps=4)
    for number in range(10):
        metrics.step(StepRecord(float(number), 1, 1, 0, 1.0, 2.0, 1.0, 1, ""))
    assert metrics.steps_since(8) == (8, list(metrics.steps)[-2:])
    assert metrics.steps_since(0) == (6, list(metrics.steps))
    assert metrics.steps_since(99) == (99, [])


async def test_a_fleet_in_a_process_of_its_own_measures_every_step(tmp_path: Path) -> None:
    engine, said = FakeEngine(), []
    save_trace(
        dataclasses.replace(hash_trace(paths=4, length=20), tokenizer_hash="hash"),
        tmp_path / "trace.jsonl",
    )
    load = BenchSettings(devices=3, requests=2, max_new=16, device=(device_of("0.2"),), ramp_ms=0.0)
    async with running_server(
        ServerSettings(policy="wisp", admit="all"),
        engine=engine,
        model=engine.served,
        estimator=linear_cost(),
    ) as running:
        with FleetProcess() as fleet:
            for _ in range(2):
                before = running.server.metrics.steps_seen
                result = await fleet.bench(
                    load,
                    running.split_url,
                    tmp_path / "trace.jsonl",
                    lambda done, total, _: said.append((done, total)),
                )
                taken = running.server.metrics.steps_seen - before
                assert result.lossless
                assert len(result.steps) == result.figures["steps"] == taken > 0
                assert result.figures["step_predicted_p50_ms"] > 0
            told = len(said)
            await fleet.bench(load, running.split_url, tmp_path / "trace.jsonl")
            assert len(said) == told
            assert fleet._progress.empty()  # what nobody reads would fill the pipe one day
            with pytest.raises(FileNotFoundError):
                await fleet.call(open, tmp_path / "nothing")
    assert said == [(n, 6) for n in (*range(1, 7), *range(1, 7))]
