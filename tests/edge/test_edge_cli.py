"""Commands of the device: what is wrong is told in one line, with the fix and the right exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_pair import hash_trace
from typer.testing import CliRunner

from wispprof.artifacts import save_trace
from wispprof.artifacts.plan import DraftRow, Plan, load_plan, save_plan
from wispprof.cli import app
from wispprof.cli.edge import link_in_words
from wispprof.settings.shared_settings import LinkModel, LinkSettings

RUN = CliRunner()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["link", "nonsense"], 2, "Expected HOST:PORT"),
        (["link", "h:1", "--stall-ms", "9", "--stall-every-ms", "3"], 2, "never ends"),
        (["generate", "x", "--mode", "sideways"], 2, "mode must be empty or round or stream"),
        (["generate", "x", "--fallback", "hope"], 2, "fallback must be none or draft"),
        (["generate", "x", "--draft", "/no/such/folder"], 1, "no model folder"),
        (["bench", "--trace", "/no/such/trace"], 1, "acceptance trace"),
        (["edge", "--host", "0.0.0.0"], 1, "Refusing to listen"),
    ],
)
def test_mistakes_are_one_clear_line(arguments: list[str], code: int, said: str) -> None:
    result = RUN.invoke(app, arguments)
    assert result.exit_code == code
    assert said in " ".join(result.stderr.split())
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_an_emulated_link_says_all_that_it_does() -> None:
    plain = LinkSettings(LinkModel(120.0))
    assert link_in_words(plain) == "round trip 120 ms"
    bad = LinkSettings(LinkModel(120.0, jitter_ms=30.0, loss=0.02, up_mbps=5.0), 1000.0, 50.0, 9000.0)
    assert link_in_words(bad) == (
        "round trip 120 ms, jitter 30 ms each way on average, 2 % of frames 200 ms late, "
        "Mbit/s up 5, down unlimited, 50 ms of silence every 1000 ms, cut every 9000 ms"
    )


def test_a_device_that_the_plan_does_not_know_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    save_plan(Plan((_row("laptop:1b", 20.0), _row("laptop:3b", 40.0), _row("phone", 60.0)), ()), file)
    given = ["edge", "--draft", "/no/such/folder", "--plan", str(file), "--plan-device"]
    result = RUN.invoke(app, [*given, "macbook"])
    assert result.exit_code == 1
    said = " ".join(result.stderr.split())
    assert "The plan has no device 'macbook'. It has laptop:1b, laptop:3b, phone." in said
    assert "no model folder" in " ".join(RUN.invoke(app, [*given, "laptop"]).stderr.split())
    plan = load_plan(file)
    assert [plan.device_for(name) for name in ("phone", "laptop:1b")] == ["phone", "laptop:1b"]
    assert plan.device_for("laptop") == "laptop:3b"  # the slowest draft of this machine
    assert plan.device_for("") == "phone"


def _row(device: str, draft_ms: float) -> DraftRow:
    return DraftRow(device, 20.0, 0, 4.0, "stream", 1, 0.1, 2, *(1.0,) * 5, draft_ms, 1.0, True, 4.0)


def test_bench_names_what_it_cannot_use(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    save_trace(hash_trace(paths=1, length=8, depth=2), trace)
    device = RUN.invoke(app, ["bench", "--trace", str(trace), "--device", "toaster"])
    assert device.exit_code == 1
    assert "no device" in device.stderr
    system = RUN.invoke(app, ["bench", "--trace", str(trace), "--system", "magic"])
    assert system.exit_code == 1
    assert "no system" in system.stderr


def test_bench_prints_one_document_and_fails_on_a_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wispprof.bench import BenchResult
    from wispprof.bench.bench_result import summarise
    from wispprof.bench.fleet import offered_load
    from wispprof.settings.fleet_settings import BenchSettings

    trace = tmp_path / "trace.jsonl"
    save_trace(hash_trace(paths=1, length=8, depth=2), trace)

    def offered(lossless: bool):  # type: ignore[no-untyped-def]
        def run(settings: BenchSettings, *_: object) -> BenchResult:
            from wispprof.bench import RequestResult
            from wispprof.edge import RequestStats
            from wispprof.types import Slo

            request = RequestResult(0, Slo(4.0), RequestStats(tokens=4, first_ms=1.0, last_ms=9.0), lossless)
            return summarise(settings.system, offered_load(settings), [request], 1.0, [], {}, (8, 16))

        return run

    arguments = ["bench", "--trace", str(trace), "--json", "--system", "sled"]
    monkeypatch.setattr("wispprof.bench.bench", offered(True))
    fine = RUN.invoke(app, arguments)
    assert fine.exit_code == 0
    document = json.loads(fine.stdout)
    assert document["policy"] == "sled"
    assert document["figures"]["up_bytes_per_token"] == 2.0
    monkeypatch.setattr("wispprof.bench.bench", offered(False))
    lossy = RUN.invoke(app, arguments)
    assert lossy.exit_code == 1
    assert "differ from the trace" in lossy.stderr
