"""Parts of the demo: its SLOs, its record, and the text spans of the answer."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from wispprof.demo import DemoResult
from wispprof.demo.core_sets import running_on, two_sets_of_cores
from wispprof.demo.demo_run import _merge_spans
from wispprof.demo.measure_machine import DemoSettings, first_token_ms, slo_classes
from wispprof.reporting import Answer, Bench, TextSpan
from wispprof.types import BatchShape


class Linear:
    """A step of 2 ms and 1 ms per new token."""

    def predict(self, shape: BatchShape) -> tuple[float, float]:
        return 2.0 + shape.new_tokens, 3.0 + shape.new_tokens


LINEAR = cast(Any, Linear())


def test_slo_classes_are_shares_of_the_server_only_speed() -> None:
    settings = DemoSettings(shares=(0.5, 1.2))
    assert slo_classes(settings, 101.0) == (50.0, 120.0)


def test_chance_does_not_decide_whether_the_server_alone_meets_an_slo() -> None:
    assert all(abs(share - 1.0) >= 0.2 - 1e-9 for share in DemoSettings().shares)


def test_the_ttft_slo_follows_from_the_prompts_and_is_at_least_500_ms() -> None:
    settings = DemoSettings(devices=8, prompt_tokens=98)
    assert first_token_ms(settings, LINEAR) == pytest.approx(3 * 8 * 100)
    assert first_token_ms(replace(settings, devices=1, prompt_tokens=1), LINEAR) == 500.0


def test_quick_is_less_of_everything() -> None:
    full, quick = DemoSettings(), DemoSettings.quick()
    assert quick.systems == full.systems, "the comparison stays whole"
    assert (quick.shares, quick.rounds) == (full.shares, full.rounds)
    for name in ("prompts", "prompt_tokens", "path_tokens", "requests", "max_new"):
        assert getattr(quick, name) < getattr(full, name)


def test_traces_hold_what_the_load_asks_for() -> None:
    for settings in (DemoSettings(), DemoSettings.quick()):
        assert settings.max_new <= settings.path_tokens
        assert settings.prompts * settings.path_tokens >= 8 * settings.depth


def test_a_custom_pair() -> None:
    settings = DemoSettings(pair=Path("mine"))
    assert (settings.target, settings.draft) == (Path("mine/target"), Path("mine/draft"))


def test_adjacent_spans_of_one_origin_are_merged() -> None:
    spans = [
        TextSpan("a", "draft"),
        TextSpan("", "target"),
        TextSpan("b", "draft"),
        TextSpan("c", "target"),
    ]
    assert _merge_spans(spans) == (TextSpan("ab", "draft"), TextSpan("c", "target"))


def result(mismatches: float) -> DemoResult:
    figures = {"goodput_tokens_per_s": 1.0, "attainment": 1.0, "mismatches": mismatches}
    return DemoResult(
        answer=Answer("p", (), {"tokens_per_s": 3.0}),
        benches=(Bench("wisp", {}, figures),),
        order="wisp",
        report=Path("r.html"),
        seconds=1.0,
        estimator_mape=2.0,
        cum_acceptance=(0.5,),
        flagged=0.0,
    )


def test_the_record_is_plain_and_says_whether_texts_differ() -> None:
    assert result(0.0).record()["lossless"] is True
    assert result(1.0).record()["lossless"] is False
    assert result(0.0).record()["systems"]["wisp"]["accepted_per_round"] is None


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system does not pin")
def test_engines_and_edges_have_cores_of_their_own_and_all_is_as_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    with two_sets_of_cores() as (engine_cores, fleet_cores):
        assert set(engine_cores) | set(fleet_cores) == (cores if len(cores) > 1 else set())
        assert len(fleet_cores) == (len(cores) > 1)
        assert os.environ["OMP_NUM_THREADS"] == str(torch.get_num_threads())
        with running_on(fleet_cores):
            assert os.sched_getaffinity(0) == (set(fleet_cores) or cores)
    assert os.sched_getaffinity(0) == cores
    assert torch.get_num_threads() == threads
    assert "OMP_NUM_THREADS" not in os.environ
