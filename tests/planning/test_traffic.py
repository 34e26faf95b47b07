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
VLLM = {
    "start_times": [10.0, 11.5, 12.0],
    "input_lens": [7, 8, 9],
    "output_lens": [3, 0, 5],
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
GUIDELLM = {
    "benchmarks": [
        {
            "requests": {
                "successful": [
                    {
                        "info": {"timings": {"request_start": 9.0}},
                        "input_metrics": {"text_tokens": 21},
                        "output_metrics": {"text_tokens": 4},
                    }
                ]
            }
        }
    ]
}
AIPERF = "".join(
    json.dumps(
        {
            "metadata": {"session_num": n, "request_start_ns": 1_764_400_000_000_000_000 + n * 500_000_000},
            "metrics": {
                "input_sequence_length": {"value": 550 + n, "unit": "tokens"},
                "output_sequence_length": {"value": 90, "unit": "tokens"},
            },
            "error": "timeout" if n == 1 else None,
        }
    )
    + "\n"
    for n in range(3)
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
