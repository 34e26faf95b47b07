"""The request log: what a line says, what it never says, its bounds, and the reader's end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from raw_edge import edge

from wispprof.planning.traffic import workload_of
from wispprof.server import running_server
from wispprof.server.request_log import DepthCounts, EndedRequest, RequestLog, block_ids
from wispprof.sessions.pending_drafts import PendingDrafts
from wispprof.sessions.session_state import SessionState
from wispprof.settings.server_settings import ServerSettings
from wispprof.testing.fake_engine import FakeDrafter, FakeEngine
from wispprof.types import Slo

KEY = "key-of-some-customer"


def ended(prompt: list[int], output: int, **changes: object) -> EndedRequest:
    state = SessionState(
        "s1",
        [*prompt, *range(7000, 7000 + output)],
        slo=Slo(8.0, 900.0),
        max_new=output + 1,
        max_context=10_000,
        now_ms=500.0,
        generated=output,
    )
    depths = DepthCounts()
    depths.add(3, 2)
    depths.add(1, 1)
    return EndedRequest(state, depths, int(changes.get("resumed", 0)), KEY, "stop")  # type: ignore[call-overload]


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_holds_lengths_and_counts_alone(tmp_path: Path) -> None:
    log = RequestLog(tmp_path / "requests.jsonl", lambda ms: ms + 2000.0)
    log.put(ended(list(range(5000, 5600)), 3))
    log.put(ended(list(range(5000, 5600)), 3, resumed=3))
    log.close()
    first, second = lines(log.path)
    (block,) = first.pop("prefix")  # type: ignore[misc]
    assert first == {
        "arrival_s": 2.5,
        "prompt": 600,
        "output": 3,
        "drafted": [2, 1, 1],
        "accepted": [2, 1, 0],
        "end": "stop",
        "tokens_per_s": 8.0,
        "ttft_ms": 900.0,
    }
    assert second["prefix"] == [block]
    assert second["resumed"] == 3
    text = log.path.read_text()
    assert KEY not in text
    assert "5000" not in text


def test_equal_prefixes_of_one_owner_have_equal_ids() -> None:
    tokens, salt = list(range(1600)), b"s" * 32
    ids = block_ids(tokens, "a", salt)
    assert len(ids) == 3
    assert block_ids([*tokens[:1024], *range(9000, 9600)], "a", salt)[:2] == ids[:2]
    other = block_ids([1, *tokens[1:]], "a", salt), block_ids(tokens, "b", salt), block_ids(tokens, "a", b"t")
    assert all(not set(ids) & set(found) for found in other)


def test_the_log_is_bounded(tmp_path: Path) -> None:
    log = RequestLog(tmp_path / "requests.jsonl", lambda ms: ms, max_bytes=1000)
    for _ in range(40):
        log.put(ended([1, 2, 3], 3))
    log.close()
    assert log.written == 40
    kept = [log.path, tmp_path / "requests.jsonl.1"]
    assert sorted(tmp_path.iterdir()) == sorted(kept)
    assert all(0 < path.stat().st_size <= 1000 for path in kept)
    assert all(line["prompt"] == 3 for path in kept for line in lines(path))


def test_the_round_trip_is_what_a_contradicted_edge_needs_besides_drafting() -> None:
    drafts = PendingDrafts(16)
    drafts.merge([1], 0, 1, [2, 3], [0.9, 0.9], 10.0, 8.0)
    drafts.reconcile([2, 9], 1, 100.0)
    drafts.merge([1, 2, 9], 1, 3, [4], [0.9], 137.0, 5.0)
    assert drafts.arrivals.rtt_ms == 32.0
    # A late frame that contradicts an earlier commit says nothing about the link.
    drafts.merge([1, 2, 9, 4, 5], 1, 4, [8, 8], [0.9, 0.9], 150.0, 5.0)
    drafts.merge([1, 2, 9, 4, 5], 2, 5, [4], [0.9], 151.0, 1.0)
    assert drafts.arrivals.rtt_ms == 32.0


async def test_serve_writes_the_log_that_traffic_reads(tmp_path: Path) -> None:
    log, engine = tmp_path / "requests.jsonl", FakeEngine(64)
    settings = ServerSettings(policy="wisp", admit="all", request_log=log)
    async with (
        running_server(settings, engine=engine, model=engine.served) as running,
        edge(running.split_url) as one,
    ):
        drafter = FakeDrafter(engine.target, 0.5)
        for number in range(3):
            await one.generate(number, [1, 2, 3], 60, drafter=drafter)
    rows = lines(log)
    assert [(row["prompt"], row["output"], row["end"]) for row in rows] == [(3, 60, "length")] * 3
    assert all(row["drafted"][0] >= row["accepted"][0] > 0 for row in rows)  # type: ignore[index]
    assert all(row["rtt_ms"] >= 0 for row in rows)
    found = workload_of([log])
    assert found.requests == 3
    assert found.quantile("output", 0.5) == pytest.approx(60, rel=0.2)
