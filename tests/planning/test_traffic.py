"""Traffic: readers of every format, anonymity of the workload, and what changed."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest
from typer.testing import CliRunner

from wispprof.artifacts.workload import LEAST_COUNT, load_workload, save_workload
from wispprof.cli import app
from wispprof.errors import ArtifactDamaged, PlanError
from wispprof.planning.traffic import changes, workload_of
from wispprof.simulation.request_traces import read_trace
from wispprof.simulation.workload_lengths import WorkloadLengths

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2024-05-10 {10 + n // 60:02d}:{n % 60:02d}:00+00:00,{300 + n % 7},{40 + n % 3}\n" for n in range(150)
)
BURSTGPT = (
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,ChatGPT,472,18,490,Conversation log\n45,GPT-4,1087,230,1317,API log\n"
)
# As `vllm bench serve --save-detailed` of vLLM 0.32 writes it (without its sums and percentiles).
VLLM = {
    "backend": "openai",
    "total_input_tokens": 24,
    "start_times": [10.0, 11.5, 12.0],
    "input_lens": [7, 8, 9],
    "output_lens": [3, 0, 5],
    "ttfts": [0.1, 0.0, 0.1],
    "itls": [[0.01, 0.01], [], [0.01, 0.01, 0.01, 0.01]],
    "errors": ["", "x", ""],
}
GUIDELLM_OLD = {
    "benchmarks": [
        {
            "requests": {
                "successful": [
                    {"start_time": 4.5, "prompt_tokens": 12, "output_tokens": 6, "prompt": "secret"}
                ]
            }
        }
    ]
}
# As GuideLLM 0.8.1 and aiperf 0.13.0 write their rows (without what is empty or a duration).
GUIDELLM = {
    "benchmarks": [
        {
            "requests": {
                "successful": [
                    {
                        "type_": "generative_request_stats",
                        "request_id": "r1",
                        "info": {
                            "status": "completed",
                            "timings": {"request_start": 9.0, "resolve_end": 12.1},
                        },
                        "input_metrics": {"text_tokens": 21, "total_tokens": 21},
                        "output_metrics": {"text_tokens": 4, "total_tokens": 4},
                        "request_start_time": 9.0,
                        "request_end_time": 12.0,
                        "prompt_tokens": 21,
                        "output_tokens": 4,
                        "total_tokens": 25,
                    }
                ],
                "incomplete": [],
                "errored": [],
            }
        }
    ]
}
AIPERF_ENDS = [
    ("warmup", False, {}),
    ("profiling", False, {}),
    ("profiling", False, {"error": {"code": 504, "type": "Timeout", "message": "x"}}),
    ("profiling", False, {}),
    ("profiling", True, {}),
]
AIPERF = "".join(
    json.dumps(
        {
            "metadata": {
                "session_num": n,
                "conversation_id": f"s{n}",
                "turn_index": 0,
                "request_start_ns": 1_764_400_000_000_000_000 + n * 500_000_000,
                "request_end_ns": 1_764_400_001_000_000_000 + n * 500_000_000,
                "worker_id": "worker_1",
                "record_processor_id": "record_processor_1",
                "benchmark_phase": phase,
                "was_cancelled": cancelled,
                "context_overflow_skip": False,
                "agent_depth": 0,
            },
            "metrics": {
                "input_sequence_length": {"value": 549 + n, "unit": "tokens"},
                "output_sequence_length": {"value": 90, "unit": "tokens"},
                "time_to_first_token": {"value": 12.5, "unit": "ms"},
            },
            **error,
        }
    )
    + "\n"
    for n, (phase, cancelled, error) in enumerate(AIPERF_ENDS)
)


REQUEST_LOG = "".join(
    json.dumps(
        {
            "arrival_s": 1_764_400_000.0 + 0.5 * n,
            "prompt": 1030,
            "output": 0 if resumed is None else 40,
            "prefix": [11, 12 + n],
            "drafted": [20, 10],
            "accepted": [15, 5],
            "end": "length",
            "tokens_per_s": 8.0,
            "rtt_ms": 20.0 + n,
        }
        | ({"resumed": resumed} if resumed else {})
    )
    + "\n"
    for n, resumed in enumerate((0, 0, 12, None))
)


@pytest.mark.parametrize(
    ("text", "name", "requests"),
    [
        (BURSTGPT, "burstgpt", [(0.0, 472, 18), (40_000.0, 1087, 230)]),
        (json.dumps(VLLM), "vllm", [(0.0, 7, 3), (2000.0, 9, 5)]),
        (json.dumps(VLLM, indent=2), "vllm", [(0.0, 7, 3), (2000.0, 9, 5)]),
        (json.dumps(GUIDELLM_OLD), "guidellm", [(0.0, 12, 6)]),
        (json.dumps(GUIDELLM), "guidellm", [(0.0, 21, 4)]),
        (AIPERF, "aiperf", [(0.0, 550, 90), (1000.0, 552, 90)]),
        (REQUEST_LOG, "wispprof", [(0.0, 1030, 40), (500.0, 1030, 40)]),
    ],
)
def test_every_format_is_recognised(
    tmp_path: Path, text: str, name: str, requests: list[tuple[float, int, int]]
) -> None:
    file = tmp_path / "seen"
    file.write_text(text)
    found, read, _ = read_trace(file)
    assert found == name
    assert [r[:3] for r in read] == requests


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({**VLLM, "start_times": []}),
        json.dumps({"total_input_tokens": 24}),
        REQUEST_LOG + '{"arrival_s": 1.0}\n',
        json.dumps({**VLLM, "input_lens": [1]}),
        json.dumps({"benchmarks": [{}]}),
        '{"neither": 1}',
        AIPERF + '{"metadata": {}}\n',
        BURSTGPT + "x,y,1,2,3,z\n",
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "seen"
    file.write_text(text)
    with pytest.raises(ArtifactDamaged):
        read_trace(file)


def test_a_workload_counts_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "azure.csv"
    file.write_text(AZURE + "2024-05-10 12:30:00+00:00,99999,7777\n")
    found = workload_of([file])
    assert found.requests == 151 == sum(b.count for b in found.lengths)
    assert min(b.count for b in found.lengths) >= LEAST_COUNT
    # The one long request cannot be told: it counts in the nearest common bin.
    assert found.quantile("prompt", 1.0) < 1000
    hours = {hour: rate for hour, rate in enumerate(found.by_hour) if rate is not None}
    assert set(hours) == {10, 11, 12}
    assert hours[10] == pytest.approx(1 / 60)
    assert found.busiest_per_s == pytest.approx(1 / 60, rel=0.05)
    save_workload(found, tmp_path / "workload.json")
    assert load_workload(tmp_path / "workload.json") == found
    assert "azure.csv" not in (tmp_path / "workload.json").read_text()


def test_a_request_log_tells_links_slos_and_acceptance(tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_text(REQUEST_LOG * 3)
    found = workload_of([file])
    assert found.source == "wispprof"
    assert found.slos == {"8": 12}
    assert found.rtts_ms == (20.0, 22.0, 23.0)
    assert found.cum_acceptance == (0.75, 0.5)
    assert found.reused == pytest.approx((512 * 7 + 512 * 4) / (1030 * 6), rel=0.35)
    slower = workload_of([file])
    file.write_text(REQUEST_LOG.replace('"rtt_ms": 2', '"rtt_ms": 4') * 3)
    assert [c.figure for c in changes(slower, workload_of([file]))] == ["round trip, p50"]


def test_lengths_are_drawn_as_they_were_seen(tmp_path: Path) -> None:
    file = tmp_path / "azure.csv"
    file.write_text(AZURE)
    lengths, rng = WorkloadLengths(workload_of([file])), Random(1)
    drawn = [lengths.request(rng, 0.0, 3) for _ in range(400)]
    assert {r.client for r in drawn} == {3}
    assert sum(r.prompt_tokens for r in drawn) / 400 == pytest.approx(303, rel=0.12)


def test_blocks_that_came_before_are_reused(tmp_path: Path) -> None:
    rows = [(0, [1, 2]), (500, [1, 2, 3]), (900, [4]), (950, [1, 9])]
    file = tmp_path / "mooncake.jsonl"
    file.write_text(
        "".join(
            json.dumps({"timestamp": t, "input_length": 512 * len(ids), "output_length": 9, "hash_ids": ids})
            + "\n"
            for t, ids in rows
        )
    )
    with pytest.raises(PlanError, match="too few"):
        workload_of([file])
    found = workload_of([file, file, file])
    assert found.reused == pytest.approx((8 + 2 * (2 + 3 + 1 + 2) - 5) / (3 * 8))


def test_what_changed_since(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(AZURE)
    (tmp_path / "b.csv").write_text(AZURE.replace(",30", ",120").replace(":00+00:00", ":30+00:00"))
    before, after = workload_of([tmp_path / "a.csv"]), workload_of([tmp_path / "b.csv"])
    assert changes(before, before) == []
    assert {c.figure for c in changes(before, after)} == {
        f"{what}, p{q}" for what in ("prompt", "context") for q in (50, 90, 99)
    }
    save_workload(before, tmp_path / "before.json")
    out = ["--since", str(tmp_path / "before.json"), "--out", str(tmp_path / "after.json")]
    done = CliRunner().invoke(app, ["traffic", str(tmp_path / "b.csv"), *out])
    assert done.exit_code == 0, done.output
    assert "Changed since" in done.output
    assert load_workload(tmp_path / "after.json") == after
