"""Files that other tools write, request traces and results of llama-bench, are read or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fuzzing import counts, fuzz
from hypothesis import given
from hypothesis import strategies as st

from wispprof.errors import WispprofError
from wispprof.profiling.llama_bench import import_results
from wispprof.settings.profiler_settings import Output
from wispprof.simulation.request_traces import read_requests

BENCH = {
    "build_commit": "abc123",
    "cpu_info": "Cortex-A76",
    "model_filename": "/models/llama-1b-q4.gguf",
    "model_type": "llama 1B Q4_0",
    "model_n_params": 1235814432,
    "n_threads": 4,
    "n_prompt": 0,
    "n_gen": 128,
    "n_depth": 0,
    "avg_ts": 14.0,
    "samples_ts": [14.0, 14.5],
}
NUMBERS = (None, True, 0, -1, 1 << 63, 1 << 80, 10**400, 1e308, 1e-320, float("nan"), float("inf"))
TEXTS = ("", "x", "9" * 5000, "2024-05-10 00:00:05+00:00", "0001-01-01T00:00:00+23:59", "\x00", "\ud83d")
STRANGE = st.sampled_from([*NUMBERS, *TEXTS, [], [[]], {}, [1e308, 1e-308]])
DAMAGE = st.tuples(st.floats(0, 1), st.integers(0, 40), st.binary(max_size=6))


def damaged(data: bytes, where: float, cut: int, junk: bytes) -> bytes:
    at = int(where * len(data))
    return data[:at] + junk + data[at + cut :]


def refused_or_read(reader: Any, file: Path, data: bytes) -> Any:
    """What the reader returns; its refusal says what to do. Any other exception is a fault."""
    counts["files"] += 1
    file.write_bytes(data)
    try:
        return reader(file)
    except WispprofError as err:
        refusal = err
    assert refusal.hint
    return None


def with_odd_values(record: dict[str, Any], odd: dict[str, Any]) -> str:
    return json.dumps({**record, **odd})


@fuzz(60)
@given(
    odd=st.dictionaries(st.sampled_from(sorted(BENCH)), STRANGE, max_size=3),
    damage=DAMAGE,
    broken=st.booleans(),
    repeats=st.integers(0, 3),
)
def test_llama_bench_results(
    tmp_path_factory: pytest.TempPathFactory, odd: Any, damage: Any, broken: bool, repeats: int
) -> None:
    file = tmp_path_factory.getbasetemp() / "bench.json"
    tests = [
        with_odd_values(BENCH, odd),
        *[json.dumps({**BENCH, "n_depth": 512 * n}) for n in range(repeats)],
    ]
    data = f"[{','.join(tests)}]".encode()
    profile = refused_or_read(
        lambda path: import_results(path, Output()), file, damaged(data, *damage) if broken else data
    )
    if profile is not None:
        assert all(0 < ms < float("inf") for row in profile.rows for ms in row.samples_ms)


AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:04.0319600,3180,8\n"


@fuzz(60)
@given(
    values=st.lists(st.tuples(STRANGE, STRANGE, STRANGE), max_size=3),
    damage=DAMAGE,
    broken=st.booleans(),
    azure=st.booleans(),
)
def test_request_traces(
    tmp_path_factory: pytest.TempPathFactory, values: Any, damage: Any, broken: bool, azure: bool
) -> None:
    file = tmp_path_factory.getbasetemp() / "requests"
    if azure:
        rows = [",".join(map(str, row)) for row in values]
        data = (AZURE + "\n".join(rows)).encode("utf-8", "surrogatepass")
    else:
        names = ("timestamp", "input_length", "output_length")
        lines = [{"timestamp": 0, "input_length": 1, "output_length": 1}]
        lines += [dict(zip(names, row, strict=True)) for row in values]
        data = "\n".join(map(json.dumps, lines)).encode()
    requests = refused_or_read(read_requests, file, damaged(data, *damage) if broken else data)
    if requests is not None:
        assert requests[0].time_ms == 0.0
        assert all(0.0 <= r.time_ms < float("inf") and min(r[1:3]) >= 0 for r in requests)
