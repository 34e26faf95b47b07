"""The load generator: its figures are consistent, and it reports outputs that differ from the trace."""

from __future__ import annotations

import asyncio
import dataclasses
import selectors

import pytest
from fake_pair import hash_trace, in_process, linear_cost

from wispprof.bench import BenchResult, run_bench
from wispprof.bench.bench_result import RequestResult, summarise
from wispprof.bench.fleet import run_high_res
from wispprof.cli.serve import undrafted
from wispprof.edge import RequestStats
from wispprof.errors import WispprofError
from wispprof.server.process import running_server
from wispprof.settings.fleet_settings import BenchSettings
from wispprof.settings.server_settings import ServerSettings
from wispprof.settings.shared_settings import LinkModel
from wispprof.simulation.devices import DEVICES, device_of
from wispprof.testing.fake_engine import FakeEngine
from wispprof.testing.virtual_time import run_virtual
from wispprof.types import Slo

TRACE = hash_trace(paths=6, length=40, depth=6)


def virtual(settings: BenchSettings, policy: str, trace=TRACE, **options: object) -> BenchResult:  # type: ignore[no-untyped-def]
    async def main() -> BenchResult:
        async with in_process(policy, **options) as server:
            return await run_bench(settings, server.connect, trace)

    return run_virtual(main())


@pytest.mark.parametrize(
    ("system", "policy"),
    [
        ("server-only", "server-only"),
        ("sled", "sled"),
        ("wisp", "wisp"),
        ("wispprof", "wispprof"),
    ],
)
def test_every_system_is_lossless_and_adds_up(system: str, policy: str) -> None:
    settings = BenchSettings(
        system=system,
        devices=5,
        device=(DEVICES["fast"], DEVICES["slow"]),
        tokens_per_s=(2.0, 8.0),
        requests=2,
        max_new=32,
        link=LinkModel(20.0, 5.0),
    )
    result = virtual(settings, policy)
    figures = result.figures
    assert result.lossless
    assert figures["requests"] == 10
    assert figures["failed"] == figures["mismatches"] == 0
    assert figures["goodput_tokens_per_s"] <= figures["tokens_per_s"]
    assert sum(r.stats.tokens for r in result.results) == 320
    assert figures["ttft_p50_ms"] > 20.0
    assert figures["tpot_p50_ms"] <= figures["tpot_p95_ms"]
    assert {"attainment_at_2_tokens_per_s", "attainment_at_8_tokens_per_s"} <= figures.keys()
    if system == "server-only":
        assert figures["accepted_per_round"] == 0
        assert figures["wasted_ms"] == 0
    else:
        assert figures["accepted_per_round"] > 0
        assert 0 < figures["acceptance"] <= 1


def test_the_same_seed_gives_the_same_load_and_result() -> None:
    settings = BenchSettings(devices=3, rate_per_s=20.0, requests=6, link=LinkModel(10.0, 3.0))
    one, two = virtual(settings, "wisp"), virtual(settings, "wisp")
    assert one.figures == two.figures
    assert one.load == two.load
    other = virtual(dataclasses.replace(settings, seed=1), "wisp")
    assert other.figures["seconds"] != one.figures["seconds"]


def test_an_unreachable_slo_is_missed() -> None:
    easy = virtual(BenchSettings(devices=2, tokens_per_s=(1.0,)), "wisp").figures
    hard = virtual(BenchSettings(devices=2, tokens_per_s=(500.0,)), "wisp").figures
    assert (easy["attainment"], hard["attainment"]) == (1.0, 0.0)
    assert easy["goodput_tokens_per_s"] == easy["tokens_per_s"]
    assert hard["goodput_tokens_per_s"] == 0.0
    late = virtual(BenchSettings(devices=2, tokens_per_s=(1.0,), ttft_ms=0.5), "wisp").figures
    assert late["attainment"] == 0.0


@pytest.mark.parametrize("system", ["wisp", "server-only"])
def test_a_target_that_left_the_trace_is_reported(system: str) -> None:
    """Negative control: the check fails if the server's output differs from the trace's path."""
    wrong = tuple(
        dataclasses.replace(p, path=(*p.path[:20], p.path[20] ^ 1, *p.path[21:])) for p in TRACE.paths
    )
    result = virtual(BenchSettings(system=system, devices=2), "wisp", dataclasses.replace(TRACE, paths=wrong))
    assert not result.lossless
    assert result.figures["mismatches"] == result.figures["requests"]


async def test_against_a_real_server_with_its_step_records() -> None:
    engine = FakeEngine()
    settings = ServerSettings(policy="wisp", admit="all")
    load = BenchSettings(devices=4, requests=1, max_new=16, ramp_ms=0.0, device=(device_of("0.2"),))
    reports: list[tuple[int, int]] = []
    async with running_server(
        settings, engine=engine, model=engine.served, estimator=linear_cost()
    ) as running:
        handle = await run_bench(
            load, running, TRACE_OF_HASH, lambda done, total, _: reports.append((done, total))
        )
        scraped = await run_bench(load, running.split_url, TRACE_OF_HASH)
    assert handle.lossless
    assert scraped.lossless
    assert reports[-1] == (4, 4)
    assert len(handle.steps) == handle.figures["steps"] > 0
    assert all(predicted > 0 for predicted, _, _ in handle.steps)
    assert scraped.figures["steps"] > 0
    assert scraped.figures["step_predicted_mean_ms"] > 0
    assert handle.figures["up_bytes_per_token"] < 80  # sixteen tokens share a hello and an opening


TRACE_OF_HASH = dataclasses.replace(TRACE, tokenizer_hash="hash")


def test_timers_keep_microseconds_up_to_a_thousand_connections() -> None:
    """Above that, ``select`` has no descriptors left; larger fleets must still run."""

    async def selector() -> type:
        return type(asyncio.get_running_loop()._selector)  # type: ignore[attr-defined]

    assert run_high_res(selector(), 900) is selectors.SelectSelector
    assert run_high_res(selector(), 5000) is selectors.DefaultSelector


def test_devices_by_name_by_number_and_by_nonsense() -> None:
    assert device_of("medium").draft_ms == 16.0
    assert device_of("2.5").draft_ms == 2.5
    assert 50.0 < device_of("rpi-5").draft_ms < 90.0
    with pytest.raises(WispprofError, match="no device"):
        device_of("toaster")
    with pytest.raises(WispprofError, match="more than 0 ms"):
        device_of("0")


def test_a_failed_request_counts_neither_as_attained_nor_as_throughput() -> None:
    good, bad = RequestStats(), RequestStats()
    for stats in (good, bad):
        stats.first_ms, stats.last_ms, stats.tokens, stats.first_tokens = 10.0, 110.0, 11, 1
    results = [
        RequestResult(0, Slo(5.0), good, True),
        RequestResult(1, Slo(5.0), bad, True, "gone"),
    ]
    result = summarise("wisp", {}, results, 1.0, [(10.0, 12.0, 11.0), (10.0, 12.0, 20.0)], {}, (110, 220))
    assert result.figures["attainment"] == 0.5
    assert result.figures["goodput_tokens_per_s"] == 11.0
    assert result.figures["failed"] == 1
    assert result.errors == {"gone": 1}
    assert result.figures["tpot_p50_ms"] == 10.0
    assert result.figures["step_within_bound"] == 0.5
    assert result.figures["up_bytes_per_token"] == 10.0
    assert result.record(requests=True)["requests"][0]["met_slo"]


def test_a_held_load_lets_fast_devices_continue_until_the_slow_ones_finish() -> None:
    settings = BenchSettings(
        devices=4, device=(DEVICES["fast"], device_of("400")), requests=2, max_new=24, ramp_ms=0.0
    )
    ends = virtual(settings, "wisp")
    held = virtual(dataclasses.replace(settings, hold=True), "wisp")
    assert ends.lossless
    assert held.lossless
    assert len(ends.results) == 8 < len(held.results)
    made = [sum(r.device == n for r in held.results) for n in range(4)]
    assert min(made[1], made[3]) == 2
    assert min(made[0], made[2]) > 2
    assert held.figures["tokens_per_s"] > ends.figures["tokens_per_s"]


def test_a_check_of_texts_without_accepted_drafts_is_called_vacuous() -> None:
    made = virtual(BenchSettings(system="wisp", devices=2, device=(DEVICES["fast"],), requests=1), "wisp")
    assert made.figures["accepted_per_round"] > 0
    none = dataclasses.replace(made, figures={**made.figures, "accepted_per_round": 0.0})
    undefined = dataclasses.replace(made, figures={**made.figures, "accepted_per_round": float("nan")})
    alone = dataclasses.replace(none, policy="server-only")
    assert undrafted([made, alone]) == []
    assert undrafted([none, undefined]) == ["wisp", "wisp"]
