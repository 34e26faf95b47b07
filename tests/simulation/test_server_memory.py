"""Prefix reuse, preemption and server-side speculation of the simulated server."""

from __future__ import annotations

from dataclasses import replace

from wispprof.policies.linear_cost import LinearCost
from wispprof.settings.shared_settings import LinkModel
from wispprof.simulation import Scenario, ServerModel, system
from wispprof.simulation.arrivals import ClosedFleet, Lengths, Replay, Request
from wispprof.simulation.event_loop import Simulation
from wispprof.simulation.scenario import ServerDraft
from wispprof.simulation.synthetic_acceptance import SyntheticAcceptance
from wispprof.types import Slo

COST = LinearCost(10.0, row_ms=0.05, kv_ms=1e-4)


def run(name: str, **changes: object) -> Simulation:
    base = Scenario(
        system(name),
        ServerModel(COST),
        ClosedFleet(8, Lengths(200, 60)),
        SyntheticAcceptance(0.75),
        links=((LinkModel(20.0), 1.0),),
        slos=((Slo(4.0), 1.0),),
        seconds=20.0,
        warmup_s=1.0,
    )
    sim = Simulation(replace(base, **changes))  # type: ignore[arg-type]
    sim.report = sim.run()  # type: ignore[attr-defined]
    sim.server.check_integrity()
    return sim


def test_equal_blocks_are_prefilled_once() -> None:
    requests = tuple(Request(2000.0 * n, 1400, 8, blocks=(1, 2)) for n in range(5))
    load = Replay(requests)
    cold = run("server-only", load=load, warmup_s=0.0)
    warm = run("server-only", load=load, warmup_s=0.0, server=ServerModel(COST, prefix_tokens=4096))
    assert cold.counters.prefill_rows == 5 * 1400
    assert warm.counters.reused_tokens == 4 * 1024
    assert warm.counters.prefill_rows == 5 * 1400 - 4 * 1024
    assert warm.records[1].ttft_ms < cold.records[1].ttft_ms


def test_a_share_of_each_prompt_may_be_held_already() -> None:
    load = ClosedFleet(4, Lengths(200, 20, reused=0.75))
    sim = run("server-only", load=load)
    assert sim.counters.reused_tokens > 0
    assert sim.counters.prefill_rows <= sim.counters.reused_tokens / 2


def test_preemption_admits_by_prompt_and_loses_no_token() -> None:
    load = ClosedFleet(8, Lengths(100, 300), ramp_ms=1.0)
    whole = run("server-only", load=load, server=ServerModel(COST, kv_tokens=900), seconds=60.0)
    early = run("server-only", load=load, server=ServerModel(COST, kv_tokens=900, preempt=True), seconds=60.0)
    assert whole.counters.preemptions == 0
    assert early.counters.preemptions > 0
    assert early.report.mean_items > whole.report.mean_items  # type: ignore[attr-defined]
    done = [r for r in early.records if r.done]
    assert done
    assert all(r.tokens == r.output_tokens for r in done)


def test_a_draft_model_on_the_server_pays_while_steps_have_room() -> None:
    plain = run("server-only").report  # type: ignore[attr-defined]
    drafted = run("server-spec", server=ServerModel(COST, draft=ServerDraft(0.5, 0.0))).report  # type: ignore[attr-defined]
    assert drafted.throughput > 1.5 * plain.throughput
    assert abs(drafted.acceptance - sum(0.75**d for d in range(1, 6)) / 5) < 0.04
    slow = run("server-spec", server=ServerModel(COST, draft=ServerDraft(50.0))).report  # type: ignore[attr-defined]
    assert slow.accepted_per_round == 0.0
    assert abs(slow.throughput - plain.throughput) < 0.05 * plain.throughput
